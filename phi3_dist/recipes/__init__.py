"""Other toolkits' files: read, taken over key by key, searched for known faults.

Begin with importing.py, the verb; dialects.py reads a file, rules.py translates its keys, lint.py finds faults.
"""
