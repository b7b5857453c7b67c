"""Saving (saver.py, files.py, state.py) and going on: resume_point.py finds where, compatibility.py what may differ."""
