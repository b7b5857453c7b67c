"""A trained model opened, and its answers in batches, files and conversations.

Begin with open_model.py; engine.py generates the answers.
"""
