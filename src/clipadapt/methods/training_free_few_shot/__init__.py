"""Few-shot methods in closed form: caches, kernels, Gaussians."""
