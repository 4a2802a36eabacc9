"""The commands of ``fixpoint-diffusion`` that have no room of their own, and what commands share."""
