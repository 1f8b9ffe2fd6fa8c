"""Where the Ray cluster is that a run joins. Imports no Ray."""

import os
import socket

from mpruner_dist.config import ClusterConfig


def cluster_address(config: ClusterConfig) -> str | None:
    """The address that the configuration or RAY_ADDRESS names; None if Ray is to be started on this machine."""
    return config.address or os.environ.get("RAY_ADDRESS")


def require_listener(address: str) -> None:
    """Fail within seconds where nothing listens; Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
