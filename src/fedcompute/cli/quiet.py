"""Keeping the HTTP client's log off the terminal, where a command's own words belong."""

import logging


def quiet_http_client() -> None:
    """Keeps the HTTP client from logging whole URLs, which hold keys and signatures."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
