"""The names of models and model families, told without importing them."""

from pathlib import Path

EMBEDDED_MODELS = ("ddpm-digits", "dit-digits", "flow-digits", "fpdm-digits")
# Each family has a file of its name.
_FAMILIES = Path(__file__).parents[1] / "denoisers" / "families"
OWN_FAMILIES = tuple(sorted(path.stem.replace("_", "-") for path in _FAMILIES.glob("[a-z]*.py")))
