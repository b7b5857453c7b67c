"""Attention within documents: backend.py, packed_kernels.py, flex.py. planning/attention_choice.py decides which."""
