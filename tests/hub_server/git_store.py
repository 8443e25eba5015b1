"""What the test Hub stores: a bare git repository for each library, and beside it large files by their sha256.

Every commit is a real one, made by `git fast-import`, so that a failed test can be examined with
`git --git-dir ROOT/models/user/name.git log --stat`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
_MAX_POINTER = 200
_ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
}


class GitError(RuntimeError):
    """A git command failed."""


@dataclass(frozen=True)
class Lfs:
    """What a pointer file says of the large file that it stands for."""

    sha256: str
    size: int
    pointer_size: int


@dataclass(frozen=True)
class Entry:
    """One path of a commit's tree; `size` is the content's, also where `lfs` is set."""

    path: str
    kind: Literal["blob", "tree"]
    oid: str
    size: int
    lfs: Lfs | None = None


@dataclass(frozen=True)
class Commit:
    """One commit of a branch's history."""

    oid: str
    author: str
    date: str
    title: str
    message: str


def check_path(path: str) -> None:
    """Refuse, with ValueError, what no checkout could hold safely."""
    parts = path.split("/")
    if {"", ".", ".."} & set(parts) or ".git" in map(str.lower, parts) or re.search(r"[\\\0-\x1f]", path):
        raise ValueError(f"invalid path {path!r}")


def pointer(sha256: str, size: int) -> bytes:
    """The pointer file (git-lfs, version 1) of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class GitRepo:
    """A bare repository at `path`; whoever commits holds `lock`. What never changes, a commit's tree, is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self._lfs_of: dict[str, Lfs | None] = {}
        self._trees: dict[str, dict[str, Entry]] = {}

    @classmethod
    def create(cls, path: Path, *, meta: Mapping[str, Any], files: Mapping[str, bytes]) -> GitRepo:
        """Create the repository with a first commit that holds `files`."""
        path.mkdir(parents=True)
        repo = cls(path)
        repo.git("init", "--quiet", "--bare", "--initial-branch=main")
        (path / "hub.json").write_text(json.dumps(dict(meta)))
        repo.commit("main", None, dict(files), "initial commit")
        return repo

    @property
    def meta(self) -> dict[str, Any]:
        """What the server remembers of the repository besides its content."""
        return dict(json.loads((self.path / "hub.json").read_text()))

    def git(self, *args: str, stdin: bytes = b"") -> bytes:
        """Run a git command on this repository and return what it printed."""
        command = ["git", "--git-dir", str(self.path), *args]
        run = subprocess.run(command, input=stdin, env=_ENVIRONMENT, capture_output=True, check=False)
        if run.returncode:
            raise GitError(f"git {args[0]}: {run.stderr.decode(errors='replace').strip()}")
        return run.stdout

    def refs(self) -> dict[str, str]:
        """Full name → commit id, of branches and tags."""
        out = self.git("for-each-ref", "--format=%(refname) %(objectname)").decode()
        return dict(line.split(" ") for line in out.splitlines())

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a full name or a (short) commit id names."""
        refs = self.refs()
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in refs:
                return refs[name]
        if re.fullmatch(r"[0-9a-f]{5,40}", revision):
            try:
                return self.git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
            except GitError:
                return None
        return None

    def set_ref(self, ref: str, new: str) -> None:
        """Make a branch or a tag."""
        self.git("update-ref", ref, new)

    def log(self, revision: str = "main") -> list[Commit]:
        """The history of a commit, newest first."""
        shape = ("--date=format:%Y-%m-%dT%H:%M:%S.000Z", "--format=%H%x01%an%x01%ad%x01%s%x01%b")
        out = self.git("log", "-z", *shape, revision).decode()
        return [Commit(*record.split("\x01")) for record in out.split("\0") if record]

    def tree(self, commit: str) -> dict[str, Entry]:
        """Every file and folder of a commit, by path."""
        if commit not in self._trees:
            out = self.git("ls-tree", "-r", "-t", "-l", "-z", "--full-tree", commit).decode()
            self._trees = {commit: self._entries(out), **dict(list(self._trees.items())[:3])}
        return self._trees[commit]

    def _entries(self, out: str) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for row in filter(None, out.split("\0")):
            head, path = row.split("\t", 1)
            _mode, kind, oid, size = head.split()
            if kind == "tree":
                entries[path] = Entry(path, "tree", oid, 0)
                continue
            may_be_pointer = int(size) <= _MAX_POINTER and path.endswith((".safetensors", ".bin"))
            lfs = self._pointer_of(oid) if may_be_pointer else None
            entries[path] = Entry(path, "blob", oid, lfs.size if lfs else int(size), lfs)
        return entries

    def read(self, oid: str) -> bytes:
        """The bytes that git stores for a file (of a large one the pointer)."""
        return self.git("cat-file", "blob", oid)

    def _pointer_of(self, oid: str) -> Lfs | None:
        if oid not in self._lfs_of:
            data = self.read(oid)
            found = POINTER.fullmatch(data)
            self._lfs_of[oid] = Lfs(found[1].decode(), int(found[2]), len(data)) if found else None
        return self._lfs_of[oid]

    def commit(
        self,
        branch: str,
        parent: str | None,
        changes: Mapping[str, bytes | None],
        title: str,
        description: str = "",
        author: str = "system",
    ) -> str:
        """Commit `changes` (None takes a path away) on `parent`, and move the branch there; the caller has the lock.

        Raises ValueError for a path that no checkout could hold.
        """
        message = f"{title}\n\n{description}".strip().encode()
        ref = f"refs/heads/{branch}".encode()
        who = f"{author} <{author}@localhost> {int(time.time())} +0000".encode()
        stream = [b"commit %s\ncommitter %s\n" % (ref, who), _data(message)]
        if parent:
            stream.append(b"from %s\n" % parent.encode())
        for path, data in changes.items():
            check_path(path)
            quoted = json.dumps(path, ensure_ascii=False).encode()
            stream.append(b"D %s\n" % quoted if data is None else b"M 100644 inline %s\n%s" % (quoted, _data(data)))
        self.git("fast-import", "--quiet", "--done", stdin=b"".join([*stream, b"done\n"]))
        return self.git("rev-parse", ref.decode()).decode().strip()

    def lfs_path(self, sha256: str) -> Path:
        """Where a large file lies, whether or not it is there."""
        return self.path / "lfs-objects" / sha256[:2] / sha256

    def store_lfs(self, sha256: str, source: IO[bytes]) -> bool:
        """Take a large file in, unless its content is not what its name says."""
        target = self.lfs_path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != sha256:
            os.unlink(out.name)
            return False
        os.replace(out.name, target)
        return True


def _data(data: bytes) -> bytes:
    return b"data %d\n%s\n" % (len(data), data)
