"""Kernels for ordinary processors: Numba loops around explicit LLVM vector code; the default that a newcomer meets."""
