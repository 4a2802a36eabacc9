"""Ways to attach gradients to a solved state, one a file."""
