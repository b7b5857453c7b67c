"""whole_run.py is the outline of a run, step_loop.py what happens between its steps, train_step.py one step; engines/,
checkpoints/, monitor/."""
