"""Fixed Point Diffusion Models (Bai, Melas-Kyriazi, CVPR 2024)."""
