"""A trained model opened, and its answers in batches, files and conversations.

Begin with opening.py; engine.py generates the answers.
"""
