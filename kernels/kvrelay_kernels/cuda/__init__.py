"""The CUDA backend: CuPy, cuDNN, and kernels of its own in CUDA C++."""
