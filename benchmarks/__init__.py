"""Comparisons with peers, one script a question. ``python -m benchmarks.NAME`` prints a table and writes JSON."""
