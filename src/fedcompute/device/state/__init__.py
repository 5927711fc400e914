"""Everything that a device remembers, in one SQLite file."""
