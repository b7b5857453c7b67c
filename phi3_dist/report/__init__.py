"""What a person sees of runs: pages (page.py), the board, the list, the curves."""
