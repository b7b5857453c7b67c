"""The run file: what may stand in it (schema.py), how it is read (load.py), what is said of mistakes
(mistakes.py, cross_checks.py)."""
