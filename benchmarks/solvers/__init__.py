"""The solver suite: problems of many kinds, every solver counted alike. Run ``python -m benchmarks.solvers``."""
