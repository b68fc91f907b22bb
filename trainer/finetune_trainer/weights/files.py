"""Writers of weight files: the header first, then one block of a tensor after the other."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.weights.append import Appender, HashedOutput, Output, PlainOutput, write_all
from finetune_trainer.weights.lazy import DTYPES, LENGTH_BYTES, METADATA, LazyTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
VALUES_HASH = f"0x{'0' * 64}"
"""Stands for the hash of the values in the metadata of a file until they are written: each is read only once."""
_ALIGNMENT = 64
"""Bytes; the position of each tensor in a .ckpt file is a multiple, as in files of torch."""


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Its bytes depend on the contents only.

    Args:
        path: the file.
        tensors: the tensors by name. The order in the file is that of the library's own writer.
        metadata: written sorted. `VALUES_HASH` is replaced by the SHA-256 of the values in the order of the file.

    Raises:
        OSError: the file cannot be written, or a source cannot be read.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, _NAMES[item[1].dtype], item[0]))
    with path.open("wb", buffering=0) as file:
        write_all(file, _header(ordered, metadata))
        hashed = HashedOutput(file) if VALUES_HASH in metadata.values() else None
        try:
            _append(hashed or PlainOutput(file), [tensor for _, tensor in ordered])
        finally:
            # As ModelSpec writes it.
            digest = VALUES_HASH if hashed is None else f"0x{hashed.close()}"
        if hashed is not None:
            found = {key: digest if value == VALUES_HASH else value for key, value in metadata.items()}
            file.seek(0)
            write_all(file, _header(ordered, found))


def _append(output: Output, tensors: Sequence[LazyTensor]) -> None:
    with Appender(tensors) as appender:
        for tensor in tensors:
            appender.append(output, tensor)


def _header(tensors: Sequence[tuple[str, LazyTensor]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.num_bytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def write_ckpt(path: Path, tensors: Mapping[str, LazyTensor], more: Mapping[str, object] | None = None) -> None:
    """Write a .ckpt file as torch.save writes {"state_dict": tensors}. `torch.load(weights_only=True)` reads it.

    Args:
        path: the file.
        tensors: the tensors by name.
        more: further entries next to `state_dict`: numbers and texts.

    Raises:
        OSError: the file cannot be written, or a source cannot be read.
    """
    keys = {name: str(number) for number, name in enumerate(tensors)}
    state = OrderedDict((name, _Placeholder(tensor, keys[name])) for name, tensor in tensors.items())
    pickled = BytesIO()
    _Pickler(pickled, protocol=2).dump({**(more or {}), "state_dict": state})
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, f"{root}/data.pkl", lambda file: file.write(pickled.getvalue()))
        _add(archive, f"{root}/byteorder", lambda file: file.write(b"little"))
        with Appender(tensors.values()) as appender:
            for name, tensor in tensors.items():
                _add(archive, f"{root}/data/{keys[name]}", partial(appender.append, tensor=tensor))
        _add(archive, f"{root}/version", lambda file: file.write(b"3\n"))


class _Storage:
    """Stands for the storage of a tensor in the pickle of a .ckpt file."""

    def __init__(self, tensor: LazyTensor, key: str) -> None:
        self.tensor = tensor
        self.key = key


class _Placeholder:
    """Stands for a tensor in the pickle of a .ckpt file, which has the tensor's description, but not its values."""

    def __init__(self, tensor: LazyTensor, key: str) -> None:
        strides, step = [], 1
        for size in reversed(tensor.shape):
            strides.append(step)
            step *= max(size, 1)
        hooks: OrderedDict[str, object] = OrderedDict()
        self._arguments = (_Storage(tensor, key), 0, tensor.shape, tuple(reversed(strides)), False, hooks)

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Storage):
            return None
        numel = value.tensor.num_bytes // value.tensor.dtype.itemsize
        return ("storage", _storage_type(value.tensor.dtype), value.key, "cpu", numel)


def _storage_type(dtype: torch.dtype) -> type:
    kinds = {
        torch.float64: torch.DoubleStorage,
        torch.float32: torch.FloatStorage,
        torch.float16: torch.HalfStorage,
        torch.bfloat16: torch.BFloat16Storage,
        torch.int64: torch.LongStorage,
        torch.int32: torch.IntStorage,
        torch.uint8: torch.ByteStorage,
        torch.bool: torch.BoolStorage,
    }
    return kinds[dtype]


def _add(archive: zipfile.ZipFile, name: str, write: Callable[[Any], object]) -> None:
    """Add a member whose data are aligned. Its time is fixed: equal weights give equal bytes."""
    info = zipfile.ZipInfo(name)
    header = 30 + len(name.encode())
    padding = -(archive.fp.tell() + header + 4) % _ALIGNMENT  # type: ignore[union-attr]
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w") as file:
        write(file)
