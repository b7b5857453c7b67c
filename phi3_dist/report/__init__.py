"""What people see of runs: their pages, the board, the list of runs, curves.png.

Begin with page.py, the page of one run; runs.py has the list, board.py the live pages.
"""
