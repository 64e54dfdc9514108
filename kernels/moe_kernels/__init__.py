"""Triton kernels of the expert layer, each beside the torch reference that says what it computes."""
