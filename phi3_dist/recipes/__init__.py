"""Other toolkits' files: read (dialects.py, entries.py), taken over key by key (rules*.py), searched for known
faults (lint.py)."""
