"""Which backend computes attention over documents (backend.py), and the kernels (kernels.py, flex.py)."""
