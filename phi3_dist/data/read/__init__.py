"""Files, folders and hub data sets into checked conversations.

Begin with sources.py, what the run file names; raw_rows.py reads rows, row_formats.py checks them.
"""
