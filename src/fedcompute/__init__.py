"""Self-hosted federated compute: task builder, server, device runtime and monitoring."""

__version__ = "0.1.0"
