"""Files, folders and hub sets into checked conversations: sources.py, raw_rows.py, row_formats.py."""
