"""HTTP routes; each file is one noun of the wire contract."""
