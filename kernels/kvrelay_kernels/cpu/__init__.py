"""Kernels for ordinary processors: Numba loops around explicit LLVM vector code; what a newcomer meets."""
