"""Pages of runs (page.py; their charts page_charts.py), the board, the list of runs, curves.png (curves_png.py)."""
