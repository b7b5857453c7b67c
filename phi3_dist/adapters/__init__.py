"""The adapter apart from its run: gathered under every strategy, written, verified, read (gather.py, files.py,
reading.py)."""
