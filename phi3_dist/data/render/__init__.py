"""A conversation through the chat template into token ids and the loss mask. Begin with encode.py."""
