"""Delivers an output to a repository of the hub, as one commit.

The hub keeps large files that no commit names: they are uploaded first, and a file that it has is not sent again. The
commit then shows all files at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finetune_trainer import patience
from finetune_trainer.delivery.claims import (
    MANIFEST,
    Claim,
    conflict_message,
    describe_other,
    is_named_after_job,
    parse_author,
)
from finetune_trainer.delivery.staged import OutputFile, OutputRecord, StagedOutput
from finetune_trainer.delivery.target import ExportStage, OnExportStage, TransferProgress
from finetune_trainer.errors import ConfigError, NetworkError, StorageOutageError
from finetune_trainer.outages import http_status

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_WRITE_ROLES = frozenset({"write", "admin"})
_WRITE_PERMISSIONS = frozenset({"repo.write", "repo.content.write"})
_HOW_TO_WRITE = (
    "create a token with the permission to write on the hub's settings page, and store it as HF_TOKEN in the Secret of "
    "outputs[].secret or spec.secrets"
)

_UNAUTHORIZED = 401

T = TypeVar("T")


class HubTarget:
    """A model repository; see `Target`. It is created private, when the output is delivered.

    Args:
        field: field of the manifest, for messages.
        location: hub://owner/name.
        job: namespace and name of the job.
        credentials: variables of the Secret of this target; without a token, that of the environment is used.
    """

    def __init__(self, field: str, location: str, job: tuple[str, str], credentials: Mapping[str, str]) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415  only hub targets need it

        self.location = location.rstrip("/")
        self._field = field
        self._repo = self.location.removeprefix("hub://")
        self._job = job
        token = next((credentials[name] for name in TOKENS if credentials.get(name)), None)
        self._api = HfApi(token=token, endpoint=credentials.get("HF_ENDPOINT"))

    def check(self, names: Sequence[str]) -> None:
        """Read the token's permissions, and look for a model of another job in the repository."""
        about = self._ask("reading the token's permissions", self._api.whoami)
        if problem := find_missing_permission(about, self._repo):
            raise ConfigError(f"{self._field}: {problem}; {_HOW_TO_WRITE}")
        self._check_author(names)

    def holds(self, record: OutputRecord) -> bool:
        """Compare the hashes of all files in the repository."""
        return self._ask("reading the repository", lambda: self._contains(record))

    def _contains(self, record: OutputRecord) -> bool:
        known = {each.path: each for each in self._paths([file.name for file in record.files])}
        return all(file.name in known and _is_same(known[file.name], file) for file in record.files)

    def _check_author(self, names: Sequence[str]) -> None:
        """Refuse files that would replace those of another job.

        Args:
            names: files that are written; empty if they are not known yet.

        Raises:
            ConfigError: the repository contains the manifest of another job.
        """
        if is_named_after_job(self._job[1], names) and names:
            return
        author = self._ask("reading the repository", self._author)
        if author is not None and (author.namespace, author.job) != self._job:
            conflict = describe_other(author.namespace, author.job)
            raise ConfigError(conflict_message(self._field, self.location, conflict).replace("folder", "name"))

    def _author(self) -> Claim | None:
        """Return the job whose manifest is in the repository; None if there is none."""
        if not self._paths([MANIFEST]):
            return None
        with tempfile.TemporaryDirectory(prefix="hub-") as folder:
            return parse_author(Path(self._api.hf_hub_download(self._repo, MANIFEST, local_dir=folder)).read_bytes())

    def _paths(self, names: list[str]) -> list[Any]:
        """Return what the hub knows of files of the repository; those that are missing are left out."""
        from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415  only hub targets need it

        try:
            return list(self._api.get_paths_info(self._repo, names))
        except RepositoryNotFoundError as error:
            if http_status(error) == _UNAUTHORIZED:
                raise
            return []

    def deliver(self, output: StagedOutput, on_stage: OnExportStage, progress: TransferProgress) -> None:
        """Create the repository if it is missing, upload the large files, and commit all files."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        record = output.record
        self._check_author([file.name for file in record.files])
        self._ask("creating the repository", lambda: self._api.create_repo(self._repo, private=True, exist_ok=True))
        total, done, additions = record.size_bytes, 0, []
        for file in record.files:
            addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(output.path(file)))
            self._ask(
                f"uploading {file.name}",
                partial(self._api.preupload_lfs_files, self._repo, [addition], free_memory=False, num_threads=1),
            )
            additions.append(addition)
            done += file.size_bytes
            progress(done, total)
            on_stage(ExportStage.UPLOAD)
        on_stage(ExportStage.UPLOADED)
        message = f"{record.format} of {record.namespace}/{record.job} ({record.source.partition(' ')[0]})"

        def commit() -> None:
            # The answer to an earlier try may have been lost.
            if not self._contains(record):
                self._api.create_commit(self._repo, additions, commit_message=message)

        self._ask("committing", commit)
        on_stage(ExportStage.PUBLISH)

    def _ask(self, what: str, request: Callable[[], T]) -> T:
        """Wait out outages of the hub. What is left is refused for good.

        Raises:
            ConfigError: the hub refuses the request.
            NetworkError, StorageOutageError: see `patience`.
        """
        from huggingface_hub.errors import (  # noqa: PLC0415
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        try:
            return patience.wait_out(f"{self._field}: {what} ({self._repo})", request)
        except (NetworkError, StorageOutageError):
            raise
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise ConfigError(f"{self._field}: {_refusal(error, self._repo)}") from error


def find_missing_permission(about: Mapping[str, Any], repo: str) -> str:
    """Return why a token cannot write to a repository; empty if it can, or if the hub does not say. Pure.

    Args:
        about: the hub's answer to whoami.
        repo: owner/name.
    """
    owner = repo.partition("/")[0]
    token = (about.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        return f"the token {token.get('displayName', '')!r} can only read, so nothing can be written to hub://{repo}"
    if role == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or []
        wanted = {owner.lower(), repo.lower()}
        allowed = any(
            str((scope.get("entity") or {}).get("name", "")).lower() in wanted
            and _WRITE_PERMISSIONS & set(scope.get("permissions") or ())
            for scope in scopes
        )
        return "" if allowed else f"the token may not write to the repositories of {owner}"
    names = {str(each.get("name", "")).lower() for each in (about, *(about.get("orgs") or ()))}
    if role in _WRITE_ROLES and owner.lower() not in names:
        return f"the token belongs to {about.get('name')}, who is no member of {owner}"
    return ""


def _is_same(found: Any, file: OutputFile) -> bool:
    lfs = getattr(found, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == file.sha256)
    return file.git_sha1 is not None and bool(getattr(found, "blob_id", None) == file.git_sha1)


def _refusal(error: Exception, repo: str) -> str:
    status = http_status(error)
    if type(error).__name__ == "LocalTokenNotFoundError":
        return f"no token for hub://{repo}; {_HOW_TO_WRITE}"
    if status == _UNAUTHORIZED:
        return f"the hub does not accept the token for hub://{repo}: it is wrong, expired or revoked; {_HOW_TO_WRITE}"
    if status == 403:
        return (
            f"the token may not write to hub://{repo}: it belongs to others, or the token can only read; write a name "
            f"of your own, or {_HOW_TO_WRITE}"
        )
    summary = " ".join(str(error).split())[:200]
    return f"hub://{repo} cannot be used: {summary}; write an owner and a name that the hub accepts"
