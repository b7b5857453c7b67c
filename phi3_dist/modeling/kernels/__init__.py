"""Triton kernels: imported only where triton is installed, and run on CUDA or in Triton's interpreter."""
