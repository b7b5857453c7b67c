"""loralib's layers, state dicts and files, to PEFT's form and back. Begin with state_dicts.py."""
