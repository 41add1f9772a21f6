"""Who can reach an address, whether a port is free, and where Ray's token is."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path


def is_loopback(host: str) -> bool:
    """True where only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def token_source() -> str | None:
    """Where Ray will take the cluster's token from; None where there is none."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    default = Path.home() / ".ray" / "auth_token"
    return str(default) if default.is_file() else None
