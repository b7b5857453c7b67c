"""Attention over documents: backends (backend.py), kernels (kernels.py, flex.py). planning/attention.py chooses."""
