"""Measures the product on a machine with a GPU that has neither the product nor a network; see `measure`."""
