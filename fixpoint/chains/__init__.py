"""Chains: recurrences whose states are solved for all at once, and their solver."""
