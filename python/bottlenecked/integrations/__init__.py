"""Bindings to inference stacks, one module each. None imports another, and importing this package loads none."""
