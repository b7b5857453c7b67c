"""The strategies: what one backward and one update mean under DDP, ZeRO and FSDP2, and the optimizer.

Begin with engine.py.
"""
