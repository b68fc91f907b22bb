"""`finetune checkpoints list|verify|diff`: a job's checkpoints, for people. Reads files only; torch-free.

A checkpoint is a folder with a manifest that names every file with its size and SHA-256, so looking after one needs no
more than that. The tensors' names and shapes stand at the head of the safetensors files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_contract import paths
from finetune_contract.bucket import is_bucket_url
from finetune_contract.manifest import BadCheckpointError, Manifest, read_manifest, verify
from finetune_operator.cli.clock import utc_now
from finetune_operator.cli.commands.bucket_checkpoints import BucketCopy
from finetune_operator.cli.commands.get import find
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output import figures
from finetune_operator.cli.output.table import columns
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.jobs import storage_folder
from finetune_operator.cluster.protocol import JobKey

_NAME = re.compile(r"step-(\d{8,})-a(\d+)")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 1024 * 1024
TENSORS = ".safetensors"


@dataclass(frozen=True)
class Found:
    """A folder that has the name of a checkpoint.

    Attributes:
        step: optimizer steps that it holds.
        attempt: attempt that wrote it.
        manifest: what it consists of; None where that cannot be read.
        reason: why it was set aside, or None.
    """

    folder: Path
    step: int
    attempt: int
    manifest: Manifest | None
    reason: str | None

    @property
    def size_bytes(self) -> int | None:
        """Size of its files by the manifest."""
        return None if self.manifest is None else sum(entry.size_bytes for entry in self.manifest.files)


def checkpoints(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune checkpoints`."""
    if arguments.folder is None or not is_bucket_url(arguments.folder):
        folder = _folder(arguments)
        return _act(arguments, folder, str(folder), lambda _: None)
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        copy = BucketCopy(arguments.folder, Path(name))
        return _act(arguments, Path(name), arguments.folder, lambda one: copy.bring(one.folder.name))


def _act(arguments: argparse.Namespace, folder: Path, where: str, bring: Callable[[Found], None]) -> Exit:
    """Carry out the action on a folder.

    Args:
        where: the folder's name for people.
        bring: called before more than the manifest of a checkpoint is read.
    """
    found = look(folder)
    if arguments.action == "list":
        sys.stdout.write(listing(found, utc_now()) if found else f"No checkpoints in {where}.\n")
        return Exit.SUCCEEDED
    picked = [_pick(found, name) for name in arguments.names] or [one for one in found if not one.reason]
    for one in picked:
        bring(one)
    if arguments.action == "verify":
        return _verify(picked)
    sys.stdout.write(difference(*picked))
    return Exit.SUCCEEDED


def look(folder: Path) -> list[Found]:
    """All checkpoints of a folder, the newest first, those behind that were set aside.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.match(entry.name.removeprefix(paths.CORRUPT))
        is_aside = entry.name.startswith(paths.CORRUPT)
        if match and (is_aside or _NAME.fullmatch(entry.name)):
            reason = _reason(entry) if is_aside else None
            found.append(Found(entry, int(match[1]), int(match[2]), _manifest(entry), reason))
    return sorted(found, key=lambda one: (one.reason is None, one.step, one.attempt), reverse=True)


def listing(found: list[Found], now: datetime) -> str:
    """Checkpoints as a table."""
    rows = []
    for one in found:
        written = None if one.manifest is None else datetime.fromtimestamp(one.manifest.time, UTC)
        size = one.size_bytes
        rows.append(
            (
                one.folder.name,
                str(one.step),
                str(one.attempt),
                "" if size is None else figures.size(size),
                "" if written is None else figures.age(written, now),
                _state(one),
            )
        )
    return columns(["NAME", "STEP", "ATTEMPT", "SIZE", "AGE", "STATE"], rows)


def find_fault(one: Found) -> str | None:
    """What is wrong with a checkpoint; None: every file is as its manifest says. Reads all of it."""
    try:
        verify(one.folder, read_manifest(one.folder).job_uid)
    except BadCheckpointError as error:
        return str(error)
    return None


def difference(old: Found, new: Found) -> str:
    """In sentences, how one checkpoint differs from another: values, tensors that came or went, and files."""
    lines = [f"{old.folder.name} -> {new.folder.name}: {new.step - old.step:+d} steps"]
    before, after = _tensors(old), _tensors(new)
    lines += [f"only in {old.folder.name}: {name} {before[name]}" for name in sorted(before.keys() - after.keys())]
    lines += [f"only in {new.folder.name}: {name} {after[name]}" for name in sorted(after.keys() - before.keys())]
    both = sorted(before.keys() & after.keys())
    lines += [f"{name}: {before[name]} -> {after[name]}" for name in both if before[name] != after[name]]
    if before == after:
        lines.append(f"the same {len(before)} tensors in both")
    values, others = _values(old), _values(new)
    for key in sorted(values.keys() | others.keys()):
        if values.get(key) != others.get(key):
            lines.append(f"{key}: {_short(values.get(key))} -> {_short(others.get(key))}")
    hashes, newer = _hashes(old), _hashes(new)
    same = sorted(name for name in hashes.keys() & newer.keys() if hashes[name] == newer[name])
    if same:
        lines.append(f"the same bytes in both: {', '.join(same)}")
    return "\n".join(lines) + "\n"


def _verify(found: list[Found]) -> Exit:
    if not found:
        sys.stdout.write("No checkpoints.\n")
        return Exit.SUCCEEDED
    faults = 0
    for one in found:
        fault = find_fault(one)
        faults += fault is not None
        sys.stdout.write(f"{one.folder.name}: {'whole' if fault is None else f'DAMAGED: {fault}'}\n")
        sys.stdout.flush()
    return Exit.FAILED if faults else Exit.SUCCEEDED


def _folder(arguments: argparse.Namespace) -> Path:
    """The folder of a job's checkpoints: given, or that of a job of this machine."""
    if arguments.folder is not None:
        folder = Path(arguments.folder)
        return folder if _holds_any(folder) else paths.checkpoints(folder)
    if arguments.name is None:
        raise UsageError("checkpoints: name a job, or give a folder with --folder")
    home = Home(arguments.home)
    job = find(home, JobKey(arguments.namespace, arguments.name))
    return paths.checkpoints(storage_folder(home, job))


def _holds_any(folder: Path) -> bool:
    return folder.is_dir() and any(_NAME.match(entry.name) for entry in folder.iterdir())


def _pick(found: list[Found], name: str) -> Found:
    """A checkpoint by its name, or by its step.

    Raises:
        UsageError: there is none.
    """
    for one in found:
        if name in (one.folder.name, str(one.step)):
            return one
    there = ", ".join(one.folder.name for one in found) or "none"
    raise UsageError(f"no checkpoint {name}; there are {there}")


def _state(one: Found) -> str:
    if one.reason is not None:
        return f"set aside: {one.reason}"
    return "committed" if one.manifest is not None else f"{paths.MANIFEST} is missing or damaged"


def _reason(folder: Path) -> str:
    try:
        return (folder / paths.CORRUPT_REASON).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return "damaged"


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except BadCheckpointError:
        return None


def _tensors(one: Found) -> dict[str, str]:
    """Type and shape of every tensor, by group and name, from the heads of the files."""
    found: dict[str, str] = {}
    for path in sorted(one.folder.rglob(f"*{TENSORS}")):
        group = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        for name, entry in _header(path).items():
            shape = "x".join(str(size) for size in entry["shape"]) or "scalar"
            found[f"{group}/{name}"] = f"{entry['dtype']} {shape}"
    return found


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise UsageError(f"{path} is no safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise UsageError(f"{path} is no safetensors file") from error
    header.pop("__metadata__", None)
    return header


def _values(one: Found) -> dict[str, Any]:
    try:
        (state,) = one.folder.rglob("state.json")
        values: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def _hashes(one: Found) -> dict[str, str]:
    return {} if one.manifest is None else {entry.name.rpartition("/")[2]: entry.sha256 for entry in one.manifest.files}


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, float) for each in value):
        return f"mean {sum(value) / len(value):.5g} of {len(value)}"
    return json.dumps(value)
