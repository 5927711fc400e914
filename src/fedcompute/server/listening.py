"""Sockets that a server listens on, bound before anything else starts."""

import socket

from fedcompute.errors import OperationFailed, Reason


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; raises OperationFailed(SETTINGS_INVALID) with the system's reason.

    Bound before anything else starts, so that a port in use costs nothing and leaves nothing behind.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OperationFailed(
            Reason.SETTINGS_INVALID,
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            remedy="stop the program that listens there, or choose another --host or --port",
        ) from error
    # Inherited by its connections. asyncio sets it only where the protocol is named, which it is not here; without it
    # the body of an answer waits up to 40 ms for the other side to acknowledge the head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
