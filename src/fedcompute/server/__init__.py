"""The server: HTTP routes for devices and operators, the round engine, and the processes that do its heavy work."""
