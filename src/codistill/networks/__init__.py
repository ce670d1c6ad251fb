"""Image classifiers as a list of stages and a head; one family a file."""

from codistill.networks.cut import network_from
from codistill.networks.layers import PooledLinear
from codistill.networks.network import NETWORKS, Network, network

__all__ = ["NETWORKS", "Network", "PooledLinear", "network", "network_from"]
