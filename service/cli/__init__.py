"""The `erpo` command."""
