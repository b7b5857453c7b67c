"""How good a trained model is: losses by row, scores of answers, and intervals of differences by the bootstrap.

Begin with evaluate.py; held_out.py has the losses, harness.py the tasks of lm-eval.
"""
