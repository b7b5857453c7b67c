"""The strategies: what one backward and one update mean under DDP, ZeRO and FSDP2, and the optimizer.

Begin with backward_and_update.py.
"""
