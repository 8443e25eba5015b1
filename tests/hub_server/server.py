"""A loopback Hugging Face Hub for tests: the part of its protocol that a library of experts needs.

Two origins are served, as on the real Hub: the *hub* (API and `/resolve`), and a *storage* with signed links for large
files, which refuses a request that carries an `Authorization` header. All of it is a reading of the protocol from the
client's side; it was never compared with the real Hub.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import hmac
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml  # a dependency of huggingface_hub, so always at hand

from hub_server import xet as xet_store
from hub_server.git_store import Entry, GitError, GitRepo, pointer
from hub_server.wire import MB, Fault, HubError, Reply, Request, Seen, json_reply, listen

LFS_RULES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in ("bin", "safetensors", "zip"))
MOVED = "A commit has happened since. Please refresh and try again."
BUSY = "Another commit operation is in progress for this repository. Please try again later."


class HubServer:
    """The server; a context manager.

    `tokens` maps a token to the namespaces that it may write, its own user name first. Content lies under `root`.
    `requests` records the traffic and `faults` makes the server misbehave; both may be read and changed at any time.
    With `xet`, a client that has Xet enabled uploads and downloads through it (both processes have to see `root`).
    """

    def __init__(self, root: Path, *, tokens: Mapping[str, Collection[str]], xet: bool = False) -> None:
        self.root = Path(root).resolve()
        self.xet = self.root / "xet" if xet else None
        self.tokens = {token: list(spaces) for token, spaces in tokens.items()}
        self.lfs_threshold, self.part_size, self.page_size = 10 * MB, 16 * MB, 1000
        self.requests: list[Seen] = []
        self.faults: list[Fault] = []
        self._secret = secrets.token_bytes(16)
        self._repos: dict[Path, GitRepo] = {}
        self._guard = threading.Lock()
        self._servers = [listen(self, origin) for origin in ("hub", "storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, token: str | None = None) -> dict[str, str]:
        """What a client's process needs, before it imports `huggingface_hub`."""
        env = dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
        env |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.root / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if self.xet is None:
            env["HF_HUB_DISABLE_XET"] = "1"
        return env if token is None else {**env, "HF_TOKEN": token}

    def repo(self, repo_id: str) -> GitRepo | None:
        """The repository, for a test that wants to look behind the protocol."""
        path = self.root / "models" / f"{repo_id}.git"
        with self._guard:
            if not (path / "hub.json").exists():
                self._repos.pop(path, None)
                return None
            return self._repos.setdefault(path, GitRepo(path))

    def create(self, repo_id: str, *, private: bool = False) -> GitRepo:
        """Make a repository with the first commit that the Hub makes."""
        path = self.root / "models" / f"{repo_id}.git"
        with self._guard:
            meta = {"private": private, "created": time.time()}
            self._repos[path] = GitRepo.create(path, meta=meta, files={".gitattributes": LFS_RULES.encode()})
            return self._repos[path]

    def seen(self, pattern: str = "/api/models|/resolve/") -> list[Seen]:
        """The requests so far whose "METHOD /path?query" has `pattern` in it."""
        return [seen for seen in self.requests if re.search(pattern, f"{seen.method} {seen.target}")]

    def _open(self, req: Request, repo_id: str, *, write: bool = False) -> GitRepo:
        repo = self.repo(repo_id)
        mine = repo_id.partition("/")[0] in self._spaces(req)
        if repo is None or (repo.meta["private"] and not mine):
            if req.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(req, repo_id)
        return repo

    def _spaces(self, req: Request) -> Collection[str]:
        return next((spaces for spaces in self.tokens.values() if spaces[0] == req.user), ())

    def _check_write(self, req: Request, repo_id: str) -> None:
        if req.user is None:
            raise HubError(401, "Invalid username or password.")
        if repo_id.partition("/")[0] not in self._spaces(req):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    @staticmethod
    def _resolve(repo: GitRepo, revision: str) -> str:
        commit = repo.resolve(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def agent_harnesses(self, _req: Request) -> Reply:
        """GET /api/agent-harnesses: asked for by clients to build their user agent."""
        return json_reply({"standardEnvVars": [], "harnesses": {}})

    def validate_yaml(self, req: Request) -> Reply:
        """POST /api/validate-yaml: called before a commit that touches README.md."""
        try:
            _front_matter(req.json()["content"])
        except yaml.YAMLError as error:
            return json_reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return json_reply({"errors": [], "warnings": []})

    def create_repo(self, req: Request) -> Reply:
        """POST /api/repos/create."""
        body = req.json()
        if (body.get("type") or "model") != "model" or not re.fullmatch(r"[\w.-]+", body.get("name") or ""):
            raise HubError(400, f"cannot handle {body}")
        repo_id = f"{body.get('organization') or req.user}/{body['name']}"
        self._check_write(req, repo_id)
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if self.repo(repo_id) is not None:
            text = "You already created this model repo"
            return json_reply({**answer, "error": text}, 409, {"X-Error-Message": text})
        self.create(repo_id, private=body.get("visibility") == "private" or bool(body.get("private")))
        return json_reply(answer)

    def delete_repo(self, req: Request) -> Reply:
        """DELETE /api/repos/delete."""
        body = req.json()
        repo_id = f"{body.get('organization') or req.user}/{body['name']}"
        shutil.rmtree(self._open(req, repo_id, write=True).path)
        return json_reply({})

    def repo_info(self, req: Request) -> Reply:
        """GET /api/models/user/name[/revision/REV][?expand=sha]."""
        repo_id, revision = req.args
        repo = self._open(req, repo_id)
        sha = self._resolve(repo, revision or "main")
        if "expand" in req.query:
            return json_reply({"id": repo_id, "sha": sha})
        tree = repo.tree(sha)
        text = repo.read(tree["README.md"].oid).decode(errors="replace") if "README.md" in tree else ""
        files = [{"rfilename": entry.path} for entry in tree.values() if entry.kind == "blob"]
        shown = {"id": repo_id, "sha": sha, "private": repo.meta["private"], "siblings": files}
        return json_reply({**shown, "cardData": _front_matter(text), "tags": [], "downloads": 0, "likes": 0})

    def tree(self, req: Request) -> Reply:
        """GET /api/models/user/name/tree/REV[/PATH]."""
        repo_id, revision, folder = req.args
        repo = self._open(req, repo_id)
        entries = repo.tree(self._resolve(repo, revision))
        if folder and (folder not in entries or entries[folder].kind != "tree"):
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        deep = req.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        paths = [p for p in sorted(entries) if p.startswith(prefix) and (deep or "/" not in p[len(prefix) :])]
        return self._page(req, [self._row(entries[path]) for path in paths])

    def _page(self, req: Request, rows: list[Any]) -> Reply:
        """One page of rows, with the address of the next in a Link header."""
        start = int(req.query.get("cursor", ["0"])[0])
        stop = start + min(self.page_size, int(req.query.get("limit", ["1000"])[0]))
        headers = {}
        if stop < len(rows):
            query = {key: values[0] for key, values in req.query.items()} | {"cursor": str(stop)}
            headers["Link"] = f'<{self.endpoint}{req.path}?{urlencode(query)}>; rel="next"'
        return json_reply(rows[start:stop], headers=headers)

    def paths_info(self, req: Request) -> Reply:
        """POST /api/models/user/name/paths-info/REV, with a form or JSON."""
        repo_id, revision = req.args
        repo = self._open(req, repo_id)
        entries = repo.tree(self._resolve(repo, revision))
        raw = req.body.read()
        is_json = "json" in req.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if is_json else parse_qs(raw.decode()).get("paths", [])
        return json_reply([self._row(entries[p.strip("/")]) for p in paths if p.strip("/") in entries])

    def _row(self, entry: Entry) -> dict[str, Any]:
        kind = "directory" if entry.kind == "tree" else "file"
        row: dict[str, Any] = {"type": kind, "oid": entry.oid, "size": entry.size, "path": entry.path}
        if entry.lfs:
            row["lfs"] = {"oid": entry.lfs.sha256, "size": entry.lfs.size, "pointerSize": entry.lfs.pointer_size}
            if file := self._in_xet(entry.lfs.sha256):
                row["xetHash"] = file.xet_hash
        return row

    def refs(self, req: Request) -> Reply:
        """GET /api/models/user/name/refs."""
        rows: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in self._open(req, *req.args).refs().items():
            group = "tags" if ref.startswith("refs/tags/") else "branches"
            rows[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
        return json_reply(rows)

    def history(self, req: Request) -> Reply:
        """GET /api/models/user/name/commits/REV."""
        repo_id, revision = req.args
        repo = self._open(req, repo_id)
        log = repo.log(self._resolve(repo, revision))
        rows = [{"id": c.oid, "title": c.title, "message": c.message, "date": c.date} for c in log]
        return self._page(req, [{**row, "authors": [{"user": "somebody"}]} for row in rows])

    def preupload(self, req: Request) -> Reply:
        """POST /api/models/user/name/preupload/REV: which files are large ones."""
        repo_id, revision = req.args
        repo = self._open(req, repo_id, write=True)
        entries = repo.tree(self._resolve(repo, revision))
        rules = repo.read(entries[".gitattributes"].oid).decode() if ".gitattributes" in entries else ""
        globs = [line.split()[0] for line in rules.splitlines() if "filter=lfs" in line]
        answer = []
        for file in req.json()["files"]:
            path, name = file["path"], file["path"].rsplit("/", 1)[-1]
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            large = file["size"] >= self.lfs_threshold or binary or any(fnmatch.fnmatchcase(name, g) for g in globs)
            old = entries.get(path)
            oid = None if old is None or old.kind == "tree" else old.lfs.sha256 if old.lfs else old.oid
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_reply({"files": answer})

    def commit(self, req: Request) -> Reply:
        """POST /api/models/user/name/commit/BRANCH: newline-delimited JSON operations.

        Like the Hub, one commit at a time is taken per repository (409), and a `parentCommit` that is no longer the
        head is refused (412).
        """
        repo_id, branch = req.args
        repo = self._open(req, repo_id, write=True)
        operations = [json.loads(line) for line in req.body.read().splitlines() if line.strip()]
        header = operations[0]["value"]
        if not header.get("summary"):
            raise HubError(400, "a commit needs a summary")
        if not repo.lock.acquire(blocking=False):
            raise HubError(409, BUSY)
        try:
            head = repo.refs().get(f"refs/heads/{branch}")
            if head is None:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if not head.startswith(header.get("parentCommit") or head):
                raise HubError(412, MOVED)
            tree = repo.tree(head)
            changes: dict[str, bytes | None] = {}
            for operation in operations[1:]:
                changes.update(self._change(repo, tree, operation["key"], operation["value"]))
            oid = repo.commit(branch, head, changes, header["summary"], header.get("description", ""), req.user or "")
        except (GitError, KeyError, ValueError) as error:
            raise HubError(400, f"invalid commit: {error}") from error
        finally:
            repo.lock.release()
        return json_reply({"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"})

    def _change(
        self, repo: GitRepo, tree: Mapping[str, Entry], key: str, value: Mapping[str, Any]
    ) -> Iterator[tuple[str, bytes | None]]:
        path = value["path"].rstrip("/")
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            if len(data) >= self.lfs_threshold:
                raise HubError(413, f"{path} is too large for a regular file: use LFS")
            yield path, data
        elif key == "lfsFile":
            stored = repo.lfs_path(value["oid"])
            if not stored.exists() and (file := self._in_xet(value["oid"])):
                self._take_from_xet(repo, value["oid"], file)
            if not re.fullmatch(r"[0-9a-f]{64}", value["oid"]) or not stored.exists():
                raise HubError(400, f"LFS pointer of {path} points to a file that does not exist: {value['oid']}")
            yield path, pointer(value["oid"], stored.stat().st_size)
        elif key == "deletedFile" and path in tree and tree[path].kind == "blob":
            yield path, None
        elif key == "deletedFolder" and path in tree and tree[path].kind == "tree":
            yield from ((p, None) for p, e in tree.items() if p.startswith(f"{path}/") and e.kind == "blob")
        elif key in ("deletedFile", "deletedFolder"):
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise HubError(400, f"unknown operation {key!r}")

    def resolve(self, req: Request) -> Reply:
        """HEAD and GET /user/name/resolve/REV/PATH."""
        repo_id, revision, path = req.args
        repo = self._open(req, repo_id)
        commit = self._resolve(repo, revision)
        entry = repo.tree(commit).get(path)
        if entry is None or entry.kind == "tree":
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{entry.oid}"'}
        headers["Content-Disposition"] = f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}"
        if entry.lfs is None:
            return Reply(200, {**headers, "Content-Type": "text/plain"}, repo.read(entry.oid))
        headers["Location"] = self._signed("GET", repo_id, entry.lfs.sha256)
        headers |= {"X-Linked-Size": str(entry.lfs.size), "X-Linked-ETag": f'"{entry.lfs.sha256}"'}
        if file := self._in_xet(entry.lfs.sha256):
            route = f"{self.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
        return Reply(302, headers)

    def xet_token(self, req: Request) -> Reply:
        """GET /api/models/user/name/xet-(read|write)-token/REV: where and how to reach the store."""
        repo_id, right, _revision = req.args
        self._open(req, repo_id, write=right == "write")
        if self.xet is None:
            raise HubError(501, "this test server runs without Xet: set HF_HUB_DISABLE_XET=1 in the client")
        store, expires = f"local://{self.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "unused", "X-Xet-Token-Expiration": str(expires)}
        return json_reply({"casUrl": store, "exp": expires, "accessToken": "unused"}, headers=headers)

    def _in_xet(self, sha256: str) -> xet_store.XetFile | None:
        return xet_store.find(self.xet, sha256) if self.xet is not None else None

    def _take_from_xet(self, repo: GitRepo, sha256: str, file: xet_store.XetFile) -> None:
        with tempfile.TemporaryDirectory(dir=repo.path) as scratch:
            xet_store.materialise(self.root / "xet", file, Path(scratch) / sha256)
            with (Path(scratch) / sha256).open("rb") as content:
                repo.store_lfs(sha256, content)

    def lfs_batch(self, req: Request) -> Reply:
        """POST /user/name.git/info/lfs/objects/batch (git-lfs batch API, upload only)."""
        (repo_id,) = req.args
        repo = self._open(req, repo_id, write=True)
        body = req.json()
        if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
            raise HubError(422, "only sha256 uploads are implemented")
        objects = []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if not repo.lfs_path(oid).exists():
                upload: dict[str, Any] = {"href": self._signed("PUT", repo_id, oid)}
                if size > self.part_size and "multipart" in body.get("transfers", ()):
                    parts = [str(n) for n in range(1, -(-size // self.part_size) + 1)]
                    links = {n: self._signed("PUT", repo_id, oid, part=n) for n in parts}
                    upload = {"href": self._signed("POST", repo_id, oid)}
                    upload["header"] = {"chunk_size": str(self.part_size), **links}
                verify = {"href": f"{self.endpoint}{req.path.removesuffix('batch')}verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return json_reply({"transfer": "basic", "objects": objects})

    def lfs_verify(self, req: Request) -> Reply:
        """POST /user/name.git/info/lfs/objects/verify."""
        repo = self._open(req, *req.args, write=True)
        body = req.json()
        stored = repo.lfs_path(body["oid"])
        if not stored.exists() or stored.stat().st_size != body["size"]:
            raise HubError(404, "object was not uploaded, or not whole")
        return json_reply({"message": "verified"})

    def _signed(self, method: str, repo_id: str, oid: str, **query: str) -> str:
        """A link to the storage that needs no token, good for one method and an hour."""
        fields = {**query, "expires": str(int(time.time()) + 3600)}
        fields["sig"] = self._signature(method, f"/models/{repo_id}/{oid}", fields)
        return f"{self.storage}/models/{repo_id}/{oid}?{urlencode(fields)}"

    def _signature(self, method: str, path: str, fields: Mapping[str, str]) -> str:
        return hmac.new(self._secret, f"{method} {path}?{urlencode(fields)}".encode(), hashlib.sha256).hexdigest()

    def storage_object(self, req: Request) -> Reply:
        """GET, PUT and POST (end of an upload in parts) of a large file by its signed link."""
        repo_id, oid = req.args
        fields = {key: values[0] for key, values in req.query.items()}
        given = fields.pop("sig", "")
        wanted = self._signature("GET" if req.method == "HEAD" else req.method, req.path, fields)
        if not hmac.compare_digest(given, wanted) or int(fields["expires"]) < time.time():
            raise HubError(403, "SignatureDoesNotMatch")
        if "Authorization" in req.headers:
            raise HubError(400, "Only one auth mechanism allowed")
        repo = self.repo(repo_id)
        if repo is None or (req.method in ("GET", "HEAD") and not repo.lfs_path(oid).exists()):
            raise HubError(404, "NoSuchKey")
        if req.method in ("GET", "HEAD"):
            headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            return Reply(200, headers, repo.lfs_path(oid))
        parts = repo.path / "lfs-parts" / oid
        if req.method == "PUT" and "part" in fields:
            parts.mkdir(parents=True, exist_ok=True)
            data = req.body.read()
            (parts / f"{int(fields['part']):06d}").write_bytes(data)
            return Reply(200, {"ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'})
        with tempfile.TemporaryFile() as whole:
            for name in sorted(parts.iterdir()) if req.method == "POST" else []:
                whole.write(name.read_bytes())
            whole.seek(0)
            if not repo.store_lfs(oid, whole if req.method == "POST" else req.body):
                raise HubError(400, f"the content's sha256 is not {oid}")
        shutil.rmtree(parts, ignore_errors=True)
        return Reply(200, {"ETag": f'"{oid}"'})

    def answer(self, origin: str, req: Request) -> Reply:
        """Find the route of a request; errors become replies that the client understands."""
        try:
            bearer = req.headers.get("Authorization", "")
            if origin == "hub" and bearer:
                token = bearer.removeprefix("Bearer ")
                if token not in self.tokens:
                    raise HubError(401, "Invalid credentials in Authorization header")
                req.user = self.tokens[token][0]
            for methods, pattern, route in ROUTES[origin]:
                found = pattern.fullmatch(req.path)
                if found and req.method in methods.split():
                    req.args = tuple(unquote(group or "") for group in found.groups())
                    return route(self, req)
            raise HubError(501, f"{req.method} {req.path} is not implemented by this test server")
        except HubError as error:
            headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            return json_reply({"error": error.message}, error.status, headers)

    def fault_for(self, line: str) -> Fault | None:
        """Take one use of the first fault that matches."""
        with self._guard:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    value = yaml.safe_load(found[1]) if found else None
    if found and not isinstance(value, dict):
        raise yaml.YAMLError("the metadata block must be a mapping")
    return dict(value or {})


Route = Callable[[HubServer, Request], Reply]
_API = r"/api/models/((?!\.)[\w.-]+/(?!\.)[\w.-]+)"
_FILE = r"/((?!\.)[\w.-]+/(?!\.)[\w.-]+?)"
ROUTES: dict[str, list[tuple[str, re.Pattern[str], Route]]] = {
    "hub": [
        (methods, re.compile(pattern), route)
        for methods, pattern, route in (
            ("GET", "/api/agent-harnesses", HubServer.agent_harnesses),
            ("POST", "/api/validate-yaml", HubServer.validate_yaml),
            ("POST", "/api/repos/create", HubServer.create_repo),
            ("DELETE", "/api/repos/delete", HubServer.delete_repo),
            ("GET", _API + r"(?:/revision/([^/]+))?", HubServer.repo_info),
            ("GET", _API + r"/tree/([^/]+)(?:/(.+))?", HubServer.tree),
            ("POST", _API + r"/paths-info/([^/]+)", HubServer.paths_info),
            ("GET", _API + r"/refs", HubServer.refs),
            ("GET", _API + r"/commits/([^/]+)", HubServer.history),
            ("POST", _API + r"/preupload/([^/]+)", HubServer.preupload),
            ("POST", _API + r"/commit/([^/]+)", HubServer.commit),
            ("GET", _API + r"/xet-(read|write)-token/([^/]+)", HubServer.xet_token),
            ("HEAD GET", _FILE + r"/resolve/([^/]+)/(.+)", HubServer.resolve),
            ("POST", _FILE + r"\.git/info/lfs/objects/batch", HubServer.lfs_batch),
            ("POST", _FILE + r"\.git/info/lfs/objects/verify", HubServer.lfs_verify),
        )
    ],
    "storage": [("HEAD GET PUT POST", re.compile(r"/models/([^/]+/[^/]+)/([0-9a-f]{64})"), HubServer.storage_object)],
}
