"""A stand-in for the model hub on the loopback interface, with faults.

It answers the part of the hub's API that huggingface_hub and datasets use:

    with hub.serve(folder) as server:
        commit = server.publish("models", "me/base", base_folder)      # main of the repository is now this commit
        server.fail_next(TOO_MANY_REQUESTS, times=2, only="/resolve/")
        run(env={**os.environ, **server.environment})
        assert server.count("/resolve/") == 3

Uploads are in `hub_uploads`. Not implemented: reading with tokens, gated repositories, Xet, pagination.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import random
import shutil
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testing.hub_uploads import HubUploads

LOOPBACK = "127.0.0.1"
_NO_LINGER = struct.pack("ii", 1, 0)
"""Socket option that makes a close send a reset."""


@dataclass(frozen=True)
class HubRequest:
    """A request that the hub has received."""

    method: str
    path: str
    """Decoded, without the query."""
    nth: int
    """How many requests with this method and path have arrived, this one included."""


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of its answer.

    Attributes:
        status: HTTP status of the answer; 0: no answer.
        headers: headers of the answer.
        cut: answer with the real status and headers, but reset the connection after half of the body.
        stall: accept the request and stay silent until the client gives up. Otherwise the connection is reset.
    """

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    stall: bool = False


def too_many_requests(retry_after_seconds: int) -> Fault:
    """Return a 429 with its delay, in both forms that the hub uses."""
    delay = str(retry_after_seconds)
    return Fault(429, (("Retry-After", delay), ("RateLimit", f'"api";r=0;t={delay}')))


TOO_MANY_REQUESTS = too_many_requests(1)
UNAVAILABLE = Fault(503)
RESET = Fault()
CUT = Fault(cut=True)
STALL = Fault(stall=True)

FaultSchedule = Callable[[HubRequest], Fault | None]
"""Chooses the fault of a request; None for the real answer. It is called under the server's lock."""


def random_faults(seed: int, rate: float, faults: Sequence[Fault]) -> FaultSchedule:
    """Return a schedule that fails a share `rate` of the requests.

    The fault of a request depends only on the seed, its path and its number, not on the order of arrival.
    """

    def choose(request: HubRequest) -> Fault | None:
        draws = random.Random(f"{seed} {request.method} {request.path} {request.nth}")
        return draws.choice(faults) if draws.random() < rate else None

    return choose


@dataclass
class HubServer:
    """A running hub. Its methods can be called from any thread.

    Attributes:
        folder: keeps the files of all commits.
        schedule: chooses the faults; may be replaced at any time.
        requests: all requests, in order of arrival.
        uploads: tokens, and what was uploaded with them.
        lock: held while the state of the hub is read or changed.
    """

    folder: Path
    schedule: FaultSchedule = lambda _: None
    requests: list[HubRequest] = field(default_factory=list)
    uploads: HubUploads = field(default_factory=HubUploads)
    _branches: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _http: _Http | None = None
    _port: int = 0

    @property
    def url(self) -> str:
        """The address that clients use."""
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that a client process needs."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._http is not None

    def publish(self, kind: str, name: str, source: Path, branch: str = "main") -> str:
        """Copy a folder as a new commit of a repository, and move the branch to it.

        Args:
            kind: "models" or "datasets".
            name: owner/name.
            source: the files of the commit.
            branch: branch or tag.

        Returns:
            The id of the commit. The same files have the same id.
        """
        files = sorted(path for path in source.rglob("*") if path.is_file())
        digest = hashlib.sha1(f"{kind}/{name}".encode())
        for path in files:
            digest.update(f"{path.relative_to(source).as_posix()} {_blob_id(path)}\n".encode())
        commit = digest.hexdigest()
        with self.lock:
            shutil.copytree(source, self.folder / kind / name / commit, dirs_exist_ok=True)
            self._branches[kind, name, branch] = commit
        return commit

    def move(self, kind: str, name: str, commit: str, branch: str = "main") -> None:
        """Move a branch to a commit that was published before."""
        with self.lock:
            self._branches[kind, name, branch] = commit

    def remove(self, kind: str, name: str) -> None:
        """Remove a repository with all its branches: requests for it are answered with 404."""
        with self.lock:
            self._branches = {key: commit for key, commit in self._branches.items() if key[:2] != (kind, name)}

    def fail_next(self, fault: Fault, times: int = 1, only: str = "") -> None:
        """Fail the next `times` requests whose path contains `only`; later ones follow the schedule so far."""
        before, left = self.schedule, times

        def choose(request: HubRequest) -> Fault | None:
            nonlocal left
            if left > 0 and only in request.path:
                left -= 1
                return fault
            return before(request)

        self.schedule = choose

    def fail_always(self, fault: Fault, only: str = "") -> None:
        """Fail all further requests whose path contains `only`."""
        before = self.schedule
        self.schedule = lambda request: fault if only in request.path else before(request)

    def recover(self) -> None:
        """Answer all further requests."""
        self.schedule = lambda _: None

    def count(self, part: str = "", method: str = "") -> int:
        """Return the number of requests so far whose path contains `part`."""
        with self.lock:
            return sum(part in each.path and method in ("", each.method) for each in self.requests)

    def commit_of(self, kind: str, name: str, revision: str) -> str | None:
        """Return the commit of a branch, or of a commit id; None if there is none."""
        with self.lock:
            if (self.folder / kind / name / revision).is_dir() and (kind, name) in {key[:2] for key in self._branches}:
                return revision
            return self._branches.get((kind, name, revision))

    def register(self, method: str, path: str) -> Fault | None:
        """Record a request, and return its fault."""
        with self.lock:
            self._counts[method, path] += 1
            request = HubRequest(method, path, self._counts[method, path])
            self.requests.append(request)
            return self.schedule(request)

    def start(self) -> None:
        """Listen, at the same port as before if it has listened already."""
        self._http = _Http(self, self._port)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """End all connections; new ones are refused."""
        if self._http is not None:
            self._http.close()
            self._http = None


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[HubServer]:
    """Run a hub within this block.

    Args:
        folder: a new folder for the files of its repositories.
    """
    server = HubServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.hub = hub
        self.reset: set[socket.socket] = set()
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        if request in self.reset:
            self.reset.discard(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have gone."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `HubServer.requests` is the log."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        fault = self.server.hub.register(self.command, path)
        if fault is not None and fault.status:
            self._send(fault.status, b'{"error":"the stand-in fails this request"}', fault.headers)
            return
        if fault is not None and not fault.cut:
            if fault.stall:
                with contextlib.suppress(OSError):
                    self.connection.recv(1)
            self._reset()
            return
        hub, authorization = self.server.hub, self.headers.get("Authorization") or ""
        with hub.lock:
            answer = hub.uploads.answer(hub, self.command, path, authorization, body)
        if answer is not None:
            self._send(answer[0], json.dumps(answer[1]).encode(), cut=fault is not None)
            return
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._answer_api(parts[1:], url.query, body)
        elif "resolve" in parts:
            self._answer_file(parts, cut=fault is not None)
        else:
            self._send(404, b"{}")

    def _reset(self) -> None:
        self.close_connection = True
        self.server.reset.add(self.connection)

    def _answer_api(self, parts: list[str], query: str, body: bytes) -> None:
        kind, name, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        commit = self.server.hub.commit_of(kind, name, "main")
        if commit is None:
            self._send(404, b'{"error":"Repository not found"}', [("X-Error-Code", "RepoNotFound")])
            return
        if len(rest) > 1:
            commit = self.server.hub.commit_of(kind, name, rest[1])
        if commit is None:
            self._send(404, b'{"error":"Invalid rev id"}', [("X-Error-Code", "RevisionNotFound")])
            return
        root = self.server.hub.folder / kind / name / commit
        if rest[:1] == ["tree"]:
            under = root / "/".join(rest[2:])
            if not under.is_dir():
                self._send(404, b'{"error":"no such folder"}', [("X-Error-Code", "EntryNotFound")])
                return
            recursive = urllib.parse.parse_qs(query).get("recursive", [""])[0].lower() in ("true", "1")
            entries = sorted(under.rglob("*") if recursive else under.iterdir())
            self._send_json([self._entry(path, root) for path in entries])
        elif rest[:1] == ["paths-info"]:
            names = (
                json.loads(body)["paths"] if body.startswith(b"{") else urllib.parse.parse_qs(body.decode())["paths"]
            )
            self._send_json([self._entry(root / each, root) for each in names if (root / each).exists()])
        else:
            self._send_json(_about(name, commit, root))

    def _answer_file(self, parts: list[str], *, cut: bool) -> None:
        kind = "models"
        if parts[0] == "datasets":
            kind, parts = "datasets", parts[1:]
        at = parts.index("resolve")
        name, revision, file = "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :])
        commit = self.server.hub.commit_of(kind, name, revision)
        if commit is None:
            known = self.server.hub.commit_of(kind, name, "main") is not None
            self._send(404, b"", [("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")])
            return
        path = self.server.hub.folder / kind / name / commit / file
        if not path.is_file():
            self._send(404, b"", [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", commit)])
            return
        data, headers, status = path.read_bytes(), [], 200
        wanted = self.headers.get("Range")
        if wanted is not None and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last), len(data) - 1) if last else len(data) - 1
            headers, status = [("Content-Range", f"bytes {start}-{end}/{len(data)}")], 206
            data = data[start : end + 1]
        headers += [("ETag", f'"{_blob_id(path)}"'), ("X-Repo-Commit", commit), ("Accept-Ranges", "bytes")]
        self._send(status, data, headers, "application/octet-stream", cut=cut)

    def _entry(self, path: Path, root: Path) -> dict[str, object]:
        entry = _entry(path, root)
        if path.is_file() and self.server.hub.uploads.is_large(data := path.read_bytes()):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Sequence[tuple[str, str]] = (),
        content_type: str = "application/json",
        *,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self._reset()


def _blob_id(path: Path) -> str:
    """Return the id that git gives to the contents of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: Path, root: Path) -> dict[str, object]:
    if path.is_dir():
        return {"type": "directory", "path": path.relative_to(root).as_posix(), "size": 0, "oid": "0" * 40}
    size = path.stat().st_size
    return {"type": "file", "path": path.relative_to(root).as_posix(), "size": size, "oid": _blob_id(path)}


def _about(name: str, commit: str, root: Path) -> dict[str, object]:
    date = "2026-01-01T00:00:00.000Z"
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {
        "_id": "1",
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": date,
        "createdAt": date,
        "siblings": [{"rfilename": file} for file in files],
    }
