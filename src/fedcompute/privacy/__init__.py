"""Clipping, lattice, noise, mechanisms, accounting and the ledger."""
