"""Libraries on S3 and Azure: how they are opened. Keys and tokens come from the environment alone."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from mole.experts.address import BlobAddress, blob_address
from mole.experts.backends.blob import BlobBackend
from mole.experts.errors import LibraryError
from mole.registry import LIBRARIES, config_dataclass


@config_dataclass
class S3Config:
    """A library in S3, or in a store that speaks its protocol. Null: as the environment says."""

    name: Literal["s3"] = "s3"
    url: str
    region: str | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        _check(self.url, self.endpoint)


@config_dataclass
class AzureConfig:
    """A library in Azure Blob Storage. Null: as the environment says."""

    name: Literal["azure"] = "azure"
    url: str
    endpoint: str | None = None

    def __post_init__(self) -> None:
        _check(self.url, self.endpoint)


@LIBRARIES.register("s3", S3Config)
def s3_library(config: S3Config) -> BlobBackend:
    """The backend of a library in S3."""
    address = _address(config.url, "s3")
    obstore_package()
    from obstore.store import S3Store

    given: dict[str, Any] = {"region": config.region, **_endpoint(config.endpoint)}
    store = S3Store(address.bucket, **{key: value for key, value in given.items() if value is not None})
    return BlobBackend(store, config.url, address.prefix)


@LIBRARIES.register("azure", AzureConfig)
def azure_library(config: AzureConfig) -> BlobBackend:
    """The backend of a library in Azure Blob Storage."""
    address = _address(config.url, "az")
    obstore_package()
    from obstore.store import AzureStore

    store = AzureStore(address.bucket, account_name=address.account, **_endpoint(config.endpoint))
    return BlobBackend(store, config.url, address.prefix)


def obstore_package() -> None:
    """Raise LibraryError, naming the extra, unless obstore is there."""
    if importlib.util.find_spec("obstore") is None:
        raise LibraryError("libraries in blob stores and in memory need obstore: pip install 'mole-experts[blob]'")


def _address(url: str, scheme: str) -> BlobAddress:
    if not url.startswith(f"{scheme}://"):
        raise LibraryError(f"{url!r} is no address of this kind of library: write {scheme}://…")
    return blob_address(url)


def _endpoint(endpoint: str | None) -> dict[str, Any]:
    """Without TLS only where the user writes http:// himself: a store on this machine, for instance."""
    if endpoint is None:
        return {}
    return {"endpoint": endpoint, "client_options": {"allow_http": endpoint.startswith("http://")}}


def _check(url: str, endpoint: str | None) -> None:
    blob_address(url)
    if endpoint is not None and (not endpoint.startswith(("http://", "https://")) or "@" in endpoint):
        raise LibraryError("endpoint: must be http://… or https://…, without user and password")
