"""An adapter in other forms (merged, split, GGUF, combined), of any checkpoint; checked by a server; to the hub.

Begin with exporting.py, the verb; checking.py asks a server, pushing.py uploads.
"""
