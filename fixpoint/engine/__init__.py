"""The loop, and what it stands on: states as rows, tolerances, the evaluation of f."""
