"""HPKE, the upload envelope and key formats."""
