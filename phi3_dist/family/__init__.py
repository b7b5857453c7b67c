"""The Phi-3 family as data: shapes, templates, windows, LongRoPE.

Begin with variants.py, the family itself; base_config.py reads and checks a base's config.json.
"""
