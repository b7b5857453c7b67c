"""What a run says about itself: metrics, health, times, trackers, transcript.

Begin with metrics.py, the rows of metrics.jsonl; readout.py reads a step's numbers.
"""
