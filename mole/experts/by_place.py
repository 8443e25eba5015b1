"""Libraries under the names that people know: nothing but constructors that pick the backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole.experts.backends import LocalBackend
from mole.experts.library import ExpertLibrary


class LocalExpertLibrary(ExpertLibrary):
    """A library in a folder; with `create`, adding the first expert makes the folder.

    `options` are those of ExpertLibrary.
    """

    def __init__(self, path: str | Path, *, create: bool = True, **options: Any):
        super().__init__(LocalBackend(path), **options)
        if not create:
            self.names()


class HFExpertLibrary(ExpertLibrary):
    """A library in a model repository of the Hugging Face Hub; `revision` is a branch, a tag or a commit.

    With `create`, adding the first expert makes the repository, private unless `private=False`; nothing is emptied. The
    token comes from the environment or the client's login. `options` are those of ExpertLibrary.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        create: bool = False,
        private: bool = True,
        **options: Any,
    ):
        from mole.experts.backends.hub import HubBackend  # its client is large, and not needed elsewhere

        super().__init__(HubBackend(repo_id, revision=revision, create=create, private=private), **options)
