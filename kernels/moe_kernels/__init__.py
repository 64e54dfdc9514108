"""Triton kernels that an engine with an expert group calls, each beside the torch reference that defines its result."""
