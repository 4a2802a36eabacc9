"""How long one sample takes on N devices, predicted: ``python -m benchmarks.scale``."""
