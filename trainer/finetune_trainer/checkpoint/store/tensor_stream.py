"""Safetensors files written straight from the tensors' own memory, hashed on the way.

The library's writer takes all tensors as one copy in memory first; a state of 10 GB would need 20. Here each tensor's
bytes go to the hash and to the file as they lie there, and both let other Python threads run meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from finetune_contract.manifest import FileEntry

CHUNK_BYTES = 8 * 1024 * 1024
FLUSH_BYTES = 64 * 1024 * 1024
"""After so many bytes the disk is made to begin: the last flush then has little left to wait for."""
_BUFFER_BYTES = 1024 * 1024
_LENGTH_BYTES = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_stream(
    path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> FileEntry:
    """Write named tensors, durable; the same tensors give the same bytes.

    Args:
        path: a file that is made anew.
        tensors: of any shape, on any device; a tensor that is not contiguous on the CPU costs a copy of itself.
        offsets: where shards begin in the whole tensors; then all of `tensors` are shards.

    Returns:
        Name, size and SHA-256 of what was meant to be written.

    Raises:
        OSError: it could not be written.
    """
    digest = hashlib.sha256()
    size = 0
    flush: Future[None] | None = None
    # A thread starts with the first early flush: a small file has none.
    with path.open("wb", buffering=_BUFFER_BYTES) as file, ThreadPoolExecutor(1) as flusher:
        for chunk in chunks(tensors, offsets):
            digest.update(chunk)
            file.write(chunk)
            before, size = size, size + len(chunk)
            if before // FLUSH_BYTES != size // FLUSH_BYTES and (flush is None or flush.done()):
                if flush is not None:
                    # An error of the disk is told once.
                    flush.result()
                flush = flusher.submit(os.fdatasync, file.fileno())
        file.flush()
        if flush is not None:
            flush.result()
        os.fsync(file.fileno())
    return FileEntry(name=path.name, size_bytes=size, sha256=digest.hexdigest())


def chunks(
    tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> Iterator[memoryview]:
    """The bytes of a safetensors file, from its beginning to its end; see `write_stream`."""
    # Large elements first, so that every tensor is aligned to its own.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for data in (_header(ordered, offsets), *(_view(tensor) for _, tensor in ordered)):
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _header(ordered: list[tuple[str, Tensor]], offsets: Mapping[str, Sequence[int]]) -> memoryview:
    entries: dict[str, Any] = {}
    offset = 0
    if offsets:
        info = {name: {SAVED_OFFSETS_KEY: list(offsets[name])} for name, _ in ordered}
        entries["__metadata__"] = {CUSTOM_METADATA_KEY: json.dumps(info, separators=(",", ":"))}
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies contiguous in the host's memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
