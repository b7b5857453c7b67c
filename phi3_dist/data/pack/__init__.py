"""Which rows lie together in a pack. Begin with packs.py; bin_packing.py is the algorithm."""
