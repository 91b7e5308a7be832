"""Kernels and the plain PyTorch references beside them."""
