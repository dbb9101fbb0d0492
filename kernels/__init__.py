"""Triton kernels of resens_fast; installed, and imported, as ``resens_fast.kernels``."""
