"""Image classifiers as a list of stages and a head; one family a file."""

from codistill.networks.network import NETWORKS, Network, PooledLinear, network

__all__ = ["NETWORKS", "Network", "PooledLinear", "network"]
