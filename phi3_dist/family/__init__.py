"""The Phi-3 family as data: shapes, templates, windows, LongRoPE."""
