"""Offline means offline: while it holds, a connection to anywhere but this machine is an error with a name."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from statespan.errors import UserError

HUB_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@contextmanager
def no_network() -> Iterator[None]:
    """Refuse every connection and name look-up in this process that leaves this machine. Ray's own stay possible."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise UserError(f"offline: something tried to reach {address[0]}:{address[1]}")
        connect(self, address)

    def refuse_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_local(host.decode() if isinstance(host, bytes) else str(host)):
            raise UserError(f"offline: something tried to look up {host!r}")
        return look_up(host, *args, **kwargs)

    with (
        mock.patch.dict(os.environ, dict.fromkeys(HUB_SWITCHES, "1")),
        mock.patch.object(socket.socket, "connect", refuse_connect),
        mock.patch.object(socket, "getaddrinfo", refuse_look_up),
    ):
        yield


def _is_local(host: str) -> bool:
    if host in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
