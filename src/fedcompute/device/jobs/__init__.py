"""When a device works: flags, conditions, and the scheduler of its tasks and background jobs (spec/device.md 6)."""
