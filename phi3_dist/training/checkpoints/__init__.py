"""Saving (saver.py, files.py, state.py) and going on: resume.py finds where, identity.py says what may differ."""
