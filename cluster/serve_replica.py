"""What both deployments do as they start."""

from __future__ import annotations

from typing import Any


def listen_on_loopback() -> None:
    """Keep this replica's own port away from the network.

    Every replica of Serve listens for the others on all interfaces and unpickles what it is sent:
    whoever reaches that port runs code here. With a Ray of our own all others are on this machine.
    Called by a replica's constructor, which is before Serve opens the port; where Serve has no such
    function any more this fails, and no port is opened.
    """
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        port: int = listen(server, f"127.0.0.1:{address.rpartition(':')[2]}")
        return port

    replica.add_port_to_grpc_server = on_loopback
