"""Writers of weight files: the header first, then one block of a tensor after the other."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finetune_trainer.weights.lazy import DTYPES, LENGTH_BYTES, METADATA, LazyTensor, Region

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
VALUES_HASH = f"0x{'0' * 64}"
"""Stands for the hash of the values in the metadata of a file until they are written: each is read only once."""
_COPY_BYTES = 1 << 20
_MAX_PENDING = 4
"""Blocks that can wait for their hash."""
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
    with path.open("wb") as file:
        file.write(_header(ordered, metadata))
        hashed = _Hashed(file) if VALUES_HASH in metadata.values() else None
        try:
            with _Copier() as copier:
                for _, tensor in ordered:
                    copier.write(hashed or file, tensor)
        finally:
            digest = VALUES_HASH if hashed is None else hashed.close()
        if hashed is not None:
            found = {key: digest if value == VALUES_HASH else value for key, value in metadata.items()}
            file.seek(0)
            file.write(_header(ordered, found))


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


class _Hashed:
    """A file with a running hash of what is written to it. A thread computes it: it takes longer than the writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pending: deque[Future[None]] = deque()

    def write(self, content: bytes | memoryview) -> None:
        """Write, and add to the hash."""
        self._pending.append(self._thread.submit(self._digest.update, bytes(content)))
        self._file.write(content)
        while len(self._pending) > _MAX_PENDING:
            self._pending.popleft().result()

    def close(self) -> str:
        """Return the SHA-256 as ModelSpec writes it."""
        self._thread.shutdown()
        return f"0x{self._digest.hexdigest()}"


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
        with _Copier() as copier:
            for name, tensor in tensors.items():
                _add(archive, f"{root}/data/{keys[name]}", partial(copier.write, tensor=tensor))
        _add(archive, f"{root}/version", lambda file: file.write(b"3\n"))


class _Copier:
    """Appends the bytes of tensors to a file. Bytes that another file has are copied without a conversion.

    Its buffer fits into the cache of a processor, and is the same for all tensors: new memory costs more than the copy.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_COPY_BYTES))
        self._path: Path | None = None
        self._source: Any = None

    def __enter__(self) -> _Copier:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None:
            self._source.close()

    def write(self, file: Any, tensor: LazyTensor) -> None:
        """Append the bytes of one tensor."""
        if tensor.region is not None:
            self._copy(file, tensor.region, tensor.num_bytes)
            return
        for block in tensor.blocks():
            file.write(_bytes_of(block))

    def _copy(self, file: Any, region: Region, size: int) -> None:
        source = self._open(region.path)
        source.seek(region.offset)
        while size:
            count = source.readinto(self._buffer[: min(size, _COPY_BYTES)])
            if not count:
                raise OSError(f"{region.path} is incomplete")
            file.write(self._buffer[:count])
            size -= count

    def _open(self, path: Path) -> Any:
        """Return the file, which stays open until another one is needed."""
        if path != self._path:
            if self._source is not None:
                self._source.close()
            self._source, self._path = path.open("rb", buffering=0), path
        return self._source


def _bytes_of(block: Tensor) -> memoryview:
    flat = block.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


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
