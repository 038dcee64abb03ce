"""Kernels of kvrelay: one interface, several backends, and the quantized formats that they share."""
