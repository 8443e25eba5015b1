"""A library in the memory of this process, for notebooks and tests: a blob store that ends with the process."""

from __future__ import annotations

import threading
from typing import Any

from mole.experts.backends.blob import BlobBackend
from mole.experts.backends.blob_config import obstore_package
from mole.experts.errors import LibraryError
from mole.experts.names import is_name
from mole.untrusted import shown

_stores: dict[str, Any] = {}  # what `memory://<name>` means in this process
_creating = threading.Lock()


def memory_library(address: str) -> BlobBackend:
    """The library at `memory://name`, the same one for the same name. Raises LibraryError."""
    name = address.partition("://")[2]
    if not is_name(name):
        raise LibraryError(f"{shown(address)}: write memory://name, small letters and digits")
    obstore_package()
    from obstore.store import MemoryStore

    with _creating:
        store = _stores.setdefault(name, MemoryStore())
    return BlobBackend(store, address)
