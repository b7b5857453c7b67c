"""A run: what comes before its steps, the steps, what comes after. engines/, checkpoints/, monitor/, preflight/.

Begin with whole_run.py, which says in which order a step is read.
"""
