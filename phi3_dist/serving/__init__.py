"""What servers do with an adapter: the rules with their sources (rules.py), and each server asked (*_script.py)."""
