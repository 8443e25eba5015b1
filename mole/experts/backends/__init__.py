"""Where libraries live: one file per kind of place, all with the methods of `Backend`."""

from mole.experts.backends.backend import Backend, Change, Garbage, Version
from mole.experts.backends.blob import BlobBackend
from mole.experts.backends.blob_config import AzureConfig, S3Config
from mole.experts.backends.hub import HubBackend, HubConfig
from mole.experts.backends.local import LocalBackend, LocalConfig

__all__ = [
    "AzureConfig",
    "Backend",
    "BlobBackend",
    "Change",
    "Garbage",
    "HubBackend",
    "HubConfig",
    "LocalBackend",
    "LocalConfig",
    "S3Config",
    "Version",
]
