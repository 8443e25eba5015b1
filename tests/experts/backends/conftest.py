from servers import azure_server, behind_proxy, open_place, s3_server

__all__ = ["azure_server", "behind_proxy", "open_place", "s3_server"]
