"""Attention over the documents of a pack; planning/attention.py chooses the kernel.

Begin with backend.py, which hands it to transformers; kernels.py and flex.py compute it.
"""
