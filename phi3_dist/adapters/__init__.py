"""The adapter apart from its run: gathered under every strategy, written, verified, read, described.

Begin with gather.py, which collects the tensors; files.py writes the folder and reading.py checks one.
"""
