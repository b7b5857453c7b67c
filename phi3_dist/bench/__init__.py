"""Timed work and checks on real machines, each `python -m phi3_dist.bench.NAME`, and the rehearsal of a GPU.

Begin with throughput.py, a step beside its peers; rehearse.py runs the real step on fake CUDA tensors.
"""
