"""Saving a run (saver.py, files.py, state.py) and resuming it (resume_point.py, compatibility.py).

Begin with saver.py, which decides when and what to save.
"""
