"""Many simulated devices that talk real HTTP to a server."""
