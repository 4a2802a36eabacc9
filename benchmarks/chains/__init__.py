"""Parallel samplers side by side: rounds, denoiser rows, time, memory and quality."""
