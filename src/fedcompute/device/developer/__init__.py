"""What a developer writes against: services, workers, and what they may use (spec/device.md 7)."""
