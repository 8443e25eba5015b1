from hub_fixtures import hub, hub_backend, hub_process, open_hub, repo_id, with_xet
from servers import azure_server, behind_proxy, open_place, s3_server

__all__ = [
    "azure_server",
    "behind_proxy",
    "hub",
    "hub_backend",
    "hub_process",
    "open_hub",
    "open_place",
    "repo_id",
    "s3_server",
    "with_xet",
]
