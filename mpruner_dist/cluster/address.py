"""Where the Ray cluster is that a run joins. Imports no Ray."""

import os
import socket

from mpruner_dist.config import ClusterConfig
from mpruner_dist.errors import UserError


def cluster_address(config: ClusterConfig) -> str | None:
    """The address that the configuration or RAY_ADDRESS names; None if Ray is to be started on this machine.

    Raises:
        UserError: it is one of Ray Client's, whose driver is on no node of the cluster.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith("ray://"):
        raise UserError(
            f"{address} is an address of Ray Client: give the command on a node of the cluster, with HEAD:6379 as the "
            "address, or from elsewhere mpruner submit ray"
        )
    return address


def require_listener(address: str) -> None:
    """Fail within seconds where nothing listens; Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
