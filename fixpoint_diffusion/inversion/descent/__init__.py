"""DEQ-DDIM's inversion: gradient descent through the chain, on x_T."""
