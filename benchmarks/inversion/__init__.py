"""Ways to find the noise behind an image, side by side: error, rounds, rows, seconds, bytes, and what they claim."""
