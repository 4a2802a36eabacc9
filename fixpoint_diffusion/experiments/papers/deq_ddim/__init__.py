"""Deep Equilibrium Approaches to Diffusion Models (Pokle, Geng, Kolter, NeurIPS 2022)."""
