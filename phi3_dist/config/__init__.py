"""The run file: what may be in it, how it is read, how mistakes are worded; a first run file and a new project.

Begin with schema.py, its fields; load.py reads it, mistakes.py and cross_checks.py say what is wrong.
"""
