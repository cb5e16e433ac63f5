"""A local HTTP server that speaks the Hub's API over directories, for tests. It can misbehave on purpose.

    with Hub() as hub:
        commit = hub.add("org/name", directory)                 # or repo_type="dataset"
        hub.fail(Fault(r"/resolve/.*model.safetensors", "cut", after=1000))
        ...HF_ENDPOINT=hub.endpoint...
        hub.requests                                            # every request that arrived

Large files (LFS) are redirected to a second address, as the Hub redirects to its CDN: a client that sends its token
there leaks it. No Xet headers, so clients use plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".parquet", ".bin")
# The address that stands for the CDN: another host name than the endpoint's, on the same machine.
CDN_ADDRESS = "127.0.0.2"
LINE_BYTES = 1 << 18  # sent at a time where the rate is limited
API = r"/api/(model|dataset)s/([^/]+(?:/[^/]+)??)(?:/(revision|tree|refs|paths-info)(/.*)?)?"
Kind = Literal["cut", "reset", "status", "wrong-bytes", "short", "hang", "headers", "body", "entry", "pages", "drip"]


@dataclass
class Fault:
    """What goes wrong on paths that `pattern` matches, the next `times` times; with `headers_too` also where only the
    header of a safetensors file is read.

    "headers" replaces headers of the right answer (None removes one), "body" all of it, "entry" fields of a listing's
    files; "pages" links each page of a listing to another one, "drip" sends a byte now and then.
    """

    pattern: str
    kind: Kind
    times: int = 1
    method: str = "GET"
    after: int = 0  # bytes sent before a cut, a reset or a hang
    status: int = 500
    headers: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""
    entry: dict[str, Any] = field(default_factory=dict)
    headers_too: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    host: str

    @property
    def header(self) -> bool:
        """Whether this requests only a header: a range with an end, which downloads don't use."""
        return bool(re.fullmatch(r"bytes=\d+-\d+", self.range or ""))


@dataclass(frozen=True)
class File:
    path: Path
    size: int
    sha256: str
    git_sha1: str

    @property
    def lfs(self) -> bool:
        return self.path.suffix in LFS

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass
class Repo:
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    gated: bool = False
    private: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # what the listing claims instead of the truth


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores connections that clients have closed."""


class Hub:
    """The server, with its repositories, its faults and the requests that it received.

    rate: bytes per second of all files together; None for as fast as the machine can.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.rate = rate
        self._free = 0.0  # when the line has sent what was asked of it
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens: set[str] = set()  # tokens that open gated and private repositories
        self._lock = threading.Lock()
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self._servers = [Server((host, 0), BoundHandler) for host in ("127.0.0.1", CDN_ADDRESS)]

    def __enter__(self) -> Hub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://{CDN_ADDRESS}:{self._servers[1].server_port}"

    def add(self, name: str, directory: Path, *, repo_type: str = "model", ref: str = "main") -> str:
        """Commits the files of `directory` to a branch. Returns the commit, which depends only on the content."""
        files = {p.relative_to(directory).as_posix(): _file(p) for p in sorted(directory.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(json.dumps([(n, f.sha256) for n, f in files.items()]).encode()).hexdigest()
        repo = self.repos.setdefault((repo_type, name), Repo())
        repo.commits[commit] = files
        repo.refs[ref] = commit
        return commit

    def fail(self, fault: Fault) -> None:
        self.faults.append(fault)

    def fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if request.header and not fault.headers_too:
                    continue
                if fault.times > 0 and fault.method in (request.method, "*") and re.search(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None

    def wait_for_line(self, nbytes: int) -> None:
        """Waits until so many bytes have gone over a line of this rate, which all connections share."""
        assert self.rate is not None
        with self._lock:
            self._free = max(self._free, time.monotonic()) + nbytes / self.rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def downloads(self, name: str) -> list[Request]:
        """GET requests for the content of `name` (at the CDN for large files), without those for its header only."""
        wanted = {f"/cdn/{f.sha256}" for r in self.repos.values() for c in r.commits.values() if (f := c.get(name))}
        return [
            r
            for r in self.requests
            if r.method == "GET"
            and not r.header
            and (r.path in wanted or re.search(rf"/resolve/[^/]+/{re.escape(name)}$", r.path))
        ]


def _file(path: Path) -> File:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as opened:
        while chunk := opened.read(1 << 20):
            sha256.update(chunk)
            git.update(chunk)
    return File(path, size, sha256.hexdigest(), git.hexdigest())


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    _fault: Fault | None = None
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        headers = self.headers
        request = Request(
            self.command, path, url.query, headers.get("Range"), headers.get("Authorization"), headers["Host"]
        )
        self.hub.record(request)
        length = int(headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        fault = self.hub.fault_for(request)
        self._fault = fault
        if fault and fault.kind == "status":
            self._error(fault.status, "", "a fault on purpose", **fault.headers)
            return
        if fault and fault.kind == "body":
            self._send(fault.status, fault.body, {})
            return
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._cdn(found[1], fault)
        elif found := re.fullmatch(r"/api/(model|dataset)s", path):
            self._search(found[1], parse_qs(url.query))
        elif found := re.fullmatch(API, path):
            self._api(found[1], found[2], found[3], (found[4] or "").strip("/"), body.decode())
        elif found := re.fullmatch(r"/(datasets/)?([^/]+(?:/[^/]+)??)/resolve/([^/]+)/(.+)", path):
            self._resolve("dataset" if found[1] else "model", found[2], found[3], found[4], fault)
        else:
            self._error(404, "", "no such route")

    def _api(self, repo_type: str, name: str, what: str | None, rest: str, body: str) -> None:
        repo = self._repo(repo_type, name)
        if repo is None:
            return
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            self._json({"branches": branches, "tags": [], "converts": []})
            return
        revision, _, below = rest.partition("/") if what else ("main", "", "")
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = repo.commits[commit]
        if what == "tree":
            inside = {n: f for n, f in files.items() if n.startswith(f"{below}/" if below else "")}
            if below and not inside:
                self._error(404, "EntryNotFound", f"{below} does not exist on {revision}")
                return
            changes = self._fault.entry if self._fault else {}
            self._json(
                [{**entry, **changes} if entry["type"] == "file" else entry for entry in _tree(repo, inside, below)]
            )
            return
        if what == "paths-info":
            self._json(_paths(repo, files, body))
            return
        self._json(
            {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": [{"rfilename": n} for n in files],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    def _search(self, repo_type: str, query: dict[str, list[str]]) -> None:
        text, author = query.get("search", [""])[0].lower(), query.get("author", [""])[0]
        names = [n for (kind, n), r in self.hub.repos.items() if kind == repo_type and not r.private]
        self._json([{"id": n} for n in names if text in n.lower() and n.startswith(author)])

    def _resolve(self, repo_type: str, name: str, revision: str, filename: str, fault: Fault | None) -> None:
        repo = self._repo(repo_type, name)
        if repo is None:
            return
        if repo.gated and not self._authorized():
            status = 403 if self.headers.get("Authorization") else 401
            self._error(status, "GatedRepo", f"Access to model {name} is restricted.")
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        file = repo.commits[commit].get(filename)
        if file is None:
            self._error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            return
        head = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            head |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
            head["Location"] = f"{self.hub.cdn}/cdn/{file.sha256}"
            self._send(302, b"", head)
            return
        self._content(file, head, fault)

    def _cdn(self, sha256: str, fault: Fault | None) -> None:
        repos = self.hub.repos.values()
        files = (f for repo in repos for commit in repo.commits.values() for f in commit.values())
        file = next((f for f in files if f.sha256 == sha256), None)
        if file is None:
            self._error(404, "", "no such object")
            return
        self._content(file, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, fault)

    def _content(self, file: File, head: dict[str, str], fault: Fault | None) -> None:
        if self.hub.rate is not None and fault is None and self.command == "GET":
            self._stream(file, head)
            return
        content = file.path.read_bytes()
        if fault and fault.kind == "wrong-bytes":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault and fault.kind == "short":
            content = content[:-7]
        status, begin, end = 200, 0, len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin = int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            if begin >= len(content):
                self._error(416, "", "out of range", **{"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            head = {**head, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        self._send(status, content[begin:end], head, fault)

    def _stream(self, file: File, head: dict[str, str]) -> None:
        """Sends a file, or the range of it that was asked for, at the server's rate."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        begin = int(wanted[1]) if wanted else 0
        end = min(file.size, int(wanted[2]) + 1) if wanted and wanted[2] else file.size
        self.send_response(206 if wanted else 200)
        if wanted:
            head = {**head, "Content-Range": f"bytes {begin}-{end - 1}/{file.size}"}
        for key, value in {"Content-Length": str(end - begin), **head}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.flush()
        with open(file.path, "rb") as opened, suppress(OSError):
            while begin < end:
                chunk = min(LINE_BYTES, end - begin)
                self.hub.wait_for_line(chunk)
                until = begin + chunk
                while begin < until:
                    begin += os.sendfile(self.connection.fileno(), opened.fileno(), begin, until - begin)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        fault = fault or self._fault
        sent: dict[str, Any] = {"Content-Length": str(len(body)), **headers}
        if fault:
            sent |= fault.headers
            if fault.kind == "pages":
                sent["Link"] = (
                    f'<{self.hub.endpoint}{self.path.partition("?")[0]}?cursor={time.monotonic_ns()}>; rel="next"'
                )
        self.send_response(status)
        for key, value in sent.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "drip":
            with suppress(OSError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.1)
            return
        if fault and fault.kind in ("cut", "reset", "hang"):
            self.wfile.write(body[: fault.after])
            self._break(fault.kind)
            return
        self.wfile.write(body)

    def _break(self, kind: str) -> None:
        self.wfile.flush()
        self.close_connection = True
        if kind == "hang":
            time.sleep(30)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close() if kind == "reset" else self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        """Answers with an error like the Hub's, with the reason in X-Error-Code and X-Error-Message."""
        coded = {"X-Error-Code": code} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**coded, "X-Error-Message": message, **headers})

    def _authorized(self) -> bool:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") in self.hub.tokens

    def _repo(self, repo_type: str, name: str) -> Repo | None:
        if self.headers.get("Authorization") and not self._authorized() and "invalid" in self.headers["Authorization"]:
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get((repo_type, name))
        if repo is None or (repo.private and not self._authorized()):
            # The Hub does not tell strangers whether a private repository exists: 401 for both.
            status = 404 if self.headers.get("Authorization") else 401
            self._error(status, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


def _entry(repo: Repo, name: str, file: File) -> dict[str, Any]:
    size = repo.sizes.get(name, file.size)
    lfs = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": 135}} if file.lfs else {}
    return {"type": "file", "oid": file.git_sha1, "size": size, "path": name, **lfs}


def _paths(repo: Repo, files: dict[str, File], body: str) -> list[dict[str, Any]]:
    """The paths in a POST to paths-info, which is a form or JSON."""
    asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    folders = [p for p in asked if any(n.startswith(f"{p}/") for n in files)]
    return [_entry(repo, n, files[n]) for n in asked if n in files] + [_folder(p) for p in folders]


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def _tree(repo: Repo, files: dict[str, File], below: str) -> list[dict[str, Any]]:
    """Everything below a folder, including folders. (Also without `recursive`: clients ignore the rest.)"""
    parents = {str(parent) for name in files for parent in Path(name).parents}
    folders = [_folder(path) for path in sorted(parents - {".", below})]
    return folders + [_entry(repo, name, file) for name, file in files.items()]
