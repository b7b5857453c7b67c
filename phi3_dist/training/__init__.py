"""loop.py is the outline of a run, run_steps.py what happens between its steps, train_step.py one step; engines/,
checkpoints/, monitor/."""
