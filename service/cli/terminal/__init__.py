"""What the command line draws: token heat maps, curves, tables and progress."""
