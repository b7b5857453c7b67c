"""What will run and why, without torch: the plan, its memory, what `auto` becomes, advice, rendered configs.

Begin with plan.py; support.py says what runs at all, memory.py has the bytes of a rank.
"""
