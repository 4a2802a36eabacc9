"""Gradients through a fixed point: every rule's error, time and memory. Run ``python -m benchmarks.gradients``."""
