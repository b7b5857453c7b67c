"""Timed work and checks on real machines, each `python -m phi3_dist.bench.NAME`."""
