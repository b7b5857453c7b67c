"""One base, many adapters: a sweep trains its candidates together, each as an ordinary run folder.

Read in this order: file.py (candidates), joint.py (one pass over the base for all), candidate.py (what one has of its
own), loop.py (the steps), early.py (who ends early), table.py (what a person sees).
"""
