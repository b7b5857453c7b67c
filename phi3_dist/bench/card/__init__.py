"""Everything to check on one GPU: `make card`. Begin with __main__.py, which starts the checks in their order."""
