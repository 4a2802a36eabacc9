"""One file a model family, each with a variable ``FAMILY``; the registry finds them here."""
