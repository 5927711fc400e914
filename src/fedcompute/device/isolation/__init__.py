"""Isolated processes of a device, and the sandbox that they put on themselves (spec/device.md 5.5, 7.1)."""
