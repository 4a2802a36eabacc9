"""Charts and tables of the pages on benchmarks, from the committed results."""
