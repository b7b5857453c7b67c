"""Everything to check on one GPU: `make card`."""
