"""The part of the stand-in for the model hub that receives uploads: tokens, new repositories, large files, commits.

It answers the requests of `HfApi.create_repo`, `preupload_lfs_files` and `create_commit` with Xet disabled. Every
commit contains all files of its predecessor, as with git. Files from `LFS_BYTES` on are large.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_BYTES = 1000
Answer = tuple[int, dict[str, Any]]


@dataclass
class HubToken:
    """A token and its owner.

    Attributes:
        user: owner of the token.
        role: "read" or "write".
        orgs: organizations of the owner.
        is_revoked: whether the hub refuses it.
    """

    user: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    is_revoked: bool = False

    def may_write(self, repo: str) -> bool:
        """Return whether it may write to a repository."""
        return self.role == "write" and repo.partition("/")[0] in {self.user, *self.orgs}


@dataclass
class HubUploads:
    """What the hub has received.

    Attributes:
        tokens: the known tokens, by their text.
        private: names of the repositories that were created private.
        commits: message of each commit that was made through the API, by repository.
        num_uploads: number of large files that were sent.
    """

    tokens: dict[str, HubToken] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: dict[str, list[str]] = field(default_factory=dict)
    num_uploads: int = 0
    _objects: dict[str, bytes] = field(default_factory=dict)

    def is_large(self, data: bytes) -> bool:
        """Return whether a file is among the large ones that were sent."""
        return hashlib.sha256(data).hexdigest() in self._objects

    def answer(self, hub: Any, method: str, path: str, authorization: str, body: bytes) -> Answer | None:
        """Answer a request of an upload; None if it is none.

        Args:
            hub: the `HubServer`.
            method: of the request.
            path: decoded, without the query.
            authorization: the header.
            body: of the request.
        """
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "lfs":
            return self._store(parts[1], body)
        is_account = parts[:2] == ["api", "whoami-v2"] or parts[:3] == ["api", "repos", "create"]
        if not is_account and (method != "POST" or "paths-info" in parts):
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None or token.is_revoked:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if is_account:
            return (200, _about(token)) if parts[1] == "whoami-v2" else self._create(hub, token, json.loads(body))
        return self._change(hub, token, parts, body)

    def _change(self, hub: Any, token: HubToken, parts: list[str], body: bytes) -> Answer | None:
        """Answer a request that changes a repository."""
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        if not token.may_write(repo):
            return 403, {"error": f"You don't have the rights to write to {repo}"}
        if parts[4:5] == ["commit"]:
            return self._commit(hub, repo, body)
        if parts[4:5] == ["preupload"]:
            return 200, {"files": [_mode(each) for each in json.loads(body)["files"]]}
        if parts[-3:] != ["lfs", "objects", "batch"]:
            return None
        return 200, {"transfer": "basic", "objects": [self._batch(hub, each) for each in json.loads(body)["objects"]]}

    def _create(self, hub: Any, token: HubToken, request: Mapping[str, Any]) -> Answer:
        owner = request.get("organization") or token.user
        repo = f"{owner}/{request['name']}"
        if not token.may_write(repo):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        if hub.commit_of("models", repo, "main") is not None:
            return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}
        if request.get("private") or request.get("visibility") == "private":
            self.private.add(repo)
        with tempfile.TemporaryDirectory() as empty:
            (Path(empty) / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            hub.publish("models", repo, Path(empty))
        return 200, {"url": f"{hub.url}/{repo}", "name": repo}

    def _batch(self, hub: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
        about = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self._objects:
            return about
        return {**about, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}

    def _store(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the contents do not match their hash"}
        self._objects[oid] = body
        self.num_uploads += 1
        return 200, {}

    def _commit(self, hub: Any, repo: str, body: bytes) -> Answer:
        entries = [json.loads(line) for line in body.splitlines()]
        commit = hub.commit_of("models", repo, "main")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "commit"
            shutil.copytree(hub.folder / "models" / repo / commit, folder)
            for entry in entries:
                value = entry["value"]
                if entry["key"] == "header":
                    self.commits.setdefault(repo, []).append(value["summary"])
                    continue
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                large = entry["key"] == "lfsFile"
                path.write_bytes(self._objects[value["oid"]] if large else base64.b64decode(value["content"]))
            oid = hub.publish("models", repo, folder)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}", "hookOutput": ""}


def _about(token: HubToken) -> dict[str, Any]:
    return {
        "type": "user",
        "name": token.user,
        "orgs": [{"name": name, "type": "org"} for name in token.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": token.role}},
    }


def _mode(file: Mapping[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["size"] >= LFS_BYTES else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
