"""Token ids and packs on disk: written once, mapped by every run."""
