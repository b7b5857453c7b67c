"""A trained model opened (opening.py), and its answers in batches, files and conversations (engine.py)."""
