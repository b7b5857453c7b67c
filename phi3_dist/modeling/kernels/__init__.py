"""Triton kernels: imported only where triton is installed, and run on CUDA or in Triton's interpreter.

Begin with passes.py, the simplest; lora.py has LoRA's products, fp8.py FP8 rows, launch.py every call.
"""
