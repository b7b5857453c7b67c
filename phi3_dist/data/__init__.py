"""From rows to the batch of a step: read/, render/ (text to token ids and loss mask), pack/, cache/, then batch.py."""
