"""Memory-bound parts of the models as few kernels: activations, normalizations and the additions before them."""
