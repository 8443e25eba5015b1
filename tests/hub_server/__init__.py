"""A loopback Hugging Face Hub for tests: real HTTP, real git, LFS and Xet; nothing beyond 127.0.0.1."""

from hub_server.server import Fault, HubServer, Seen

__all__ = ["Fault", "HubServer", "Seen"]
