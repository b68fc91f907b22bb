"""Writes safetensors files directly from the tensors' memory, and hashes them in the same pass.

The library's writer first copies all tensors in memory: a state of 10 GB would need 20 GB. Here each tensor's bytes go
to the hash and to the file without a copy, and both operations release the interpreter lock.
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
"""Number of bytes after which an early flush starts, so that the last flush has little left to write."""
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
    """Write named tensors durably; the same tensors give the same bytes.

    Args:
        path: the file to create; an existing file is replaced.
        tensors: tensors of any shape, on any device. A tensor that is not contiguous in CPU memory is copied.
        offsets: start of each shard in its complete tensor; if given, all of `tensors` are shards.

    Returns:
        Name, size and SHA-256 of the intended contents.

    Raises:
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    size = 0
    flush: Future[None] | None = None
    # The thread starts with the first early flush: a small file has none.
    with path.open("wb", buffering=_BUFFER_BYTES) as file, ThreadPoolExecutor(1) as flusher:
        for chunk in chunks(tensors, offsets):
            digest.update(chunk)
            file.write(chunk)
            before, size = size, size + len(chunk)
            if before // FLUSH_BYTES != size // FLUSH_BYTES and (flush is None or flush.done()):
                if flush is not None:
                    # The kernel reports a disk error only once, so the result must be read.
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
    """Yield the bytes of a safetensors file, from beginning to end; see `write_stream`."""
    # Large elements first, so that every tensor is aligned to its element size.
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
    """Return the bytes of a tensor, without a copy if it is contiguous in host memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
