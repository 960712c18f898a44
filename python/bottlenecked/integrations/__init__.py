"""Bindings to inference stacks, one module each. None imports another; this package loads none of them."""
