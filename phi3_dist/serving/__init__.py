"""What servers do with an adapter: the rules with their sources, and each server asked (*_script.py).

Begin with rules.py; served.py is an adapter as the rules see it.
"""
