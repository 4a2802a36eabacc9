"""Training by every backward rule at equal wall time. Run ``python -m benchmarks.training``."""
