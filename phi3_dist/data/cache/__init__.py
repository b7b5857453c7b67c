"""Token ids and packs on disk: written once, mapped by every run. Begin with array_folders.py."""
