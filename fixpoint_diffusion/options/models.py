"""The names of the models that are part of this package."""

EMBEDDED_MODELS = ("ddpm-digits", "dit-digits", "flow-digits", "fpdm-digits")
