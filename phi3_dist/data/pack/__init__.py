"""Which rows stand together in a pack."""
