from servers import azure_server, open_place, s3_server

__all__ = ["azure_server", "open_place", "s3_server"]
