"""Attention over the documents of a pack; planning/attention_choice.py chooses the kernel.

Begin with backend.py, which hands it to transformers; packed_kernels.py and flex.py compute it.
"""
