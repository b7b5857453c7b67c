"""From rows to the batch of a step: read/, render/ (text to token ids and loss mask), pack/, cache/.

Begin with prepare.py, which runs all four for a data set; batch.py makes the batch of a step.
"""
