"""The server half of a learning process as pure functions over plain arrays."""
