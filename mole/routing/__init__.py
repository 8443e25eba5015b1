"""What routers, mixtures and moe share: the routing as data, the context of a forward, the log of routings."""

from mole.routing.context import Frame, RoutingContext, RoutingInputs
from mole.routing.packing import Packing
from mole.routing.routing import EMPTY, Routing

__all__ = ["EMPTY", "Frame", "Packing", "Routing", "RoutingContext", "RoutingInputs"]
