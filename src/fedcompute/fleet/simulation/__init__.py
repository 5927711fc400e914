"""A task's rounds in memory: the model, configuration, learning and privacy code of production, without devices."""
