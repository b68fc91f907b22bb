"""Compares two checkpoints by the headers of their safetensors files, their state and their manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune_operator.cli.checkpoints.catalog import FoundCheckpoint
from finetune_operator.cli.errors import UsageError

TENSORS = ".safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 1024 * 1024


def format_difference(old: FoundCheckpoint, new: FoundCheckpoint) -> str:
    """Return lines with the differences of two checkpoints: tensors, values of the state, and equal files."""
    lines = [f"{old.folder.name} -> {new.folder.name}: {new.step - old.step:+d} steps"]
    before, after = _read_tensors(old), _read_tensors(new)
    lines += [f"only in {old.folder.name}: {name} {before[name]}" for name in sorted(before.keys() - after.keys())]
    lines += [f"only in {new.folder.name}: {name} {after[name]}" for name in sorted(after.keys() - before.keys())]
    both = sorted(before.keys() & after.keys())
    lines += [f"{name}: {before[name]} -> {after[name]}" for name in both if before[name] != after[name]]
    if before == after:
        lines.append(f"tensors with the same names and shapes in both: {len(before)}")
    values, others = _read_state(old), _read_state(new)
    for key in sorted(values.keys() | others.keys()):
        if values.get(key) != others.get(key):
            lines.append(f"{key}: {_shorten(values.get(key))} -> {_shorten(others.get(key))}")
    hashes, newer = _hashes(old), _hashes(new)
    same = sorted(name for name in hashes.keys() & newer.keys() if hashes[name] == newer[name])
    if same:
        lines.append(f"identical files: {', '.join(same)}")
    return "\n".join(lines) + "\n"


def _read_tensors(one: FoundCheckpoint) -> dict[str, str]:
    """Return type and shape of every tensor by group and name, from the headers of the files."""
    found: dict[str, str] = {}
    for path in sorted(one.folder.rglob(f"*{TENSORS}")):
        group = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        for name, entry in _read_header(path).items():
            shape = "x".join(str(size) for size in entry["shape"]) or "scalar"
            found[f"{group}/{name}"] = f"{entry['dtype']} {shape}"
    return found


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise UsageError(f"{path} is not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise UsageError(f"{path} is not a safetensors file") from error
    header.pop("__metadata__", None)
    return header


def _read_state(one: FoundCheckpoint) -> dict[str, Any]:
    try:
        (state,) = one.folder.rglob("state.json")
        values: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def _hashes(one: FoundCheckpoint) -> dict[str, str]:
    return {} if one.manifest is None else {entry.name.rpartition("/")[2]: entry.sha256 for entry in one.manifest.files}


def _shorten(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, float) for each in value):
        return f"mean {sum(value) / len(value):.5g} of {len(value)}"
    return json.dumps(value)
