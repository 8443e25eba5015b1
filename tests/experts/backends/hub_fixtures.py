"""The test Hub for the tests beside this file."""

from hub_server.fixtures import hub, hub_backend, hub_process, open_hub, repo_id, with_xet

__all__ = ["hub", "hub_backend", "hub_process", "open_hub", "repo_id", "with_xet"]
