"""A trained model opened (open_model.py), and its answers in batches, files and conversations (engine.py)."""
