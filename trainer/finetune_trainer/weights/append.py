"""Appends tensors to a file: copies the bytes that another file has, and computes the others ahead of the writing.

Called by the writers of weight files. Reading, computing, hashing and writing overlap, because all of them release the
interpreter's lock.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune_trainer.weights.lazy import LazyTensor, Region

COPY_BYTES = 1 << 20
"""Fits into the cache of a processor."""
_MAX_HASHED = 3
"""Blocks that can wait for their hash."""
_MAX_COMPUTED = 3
"""Blocks that are computed ahead of the writing."""
_NOT_IN_KERNEL = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EPERM})
"""Errors of systems and file systems that cannot copy from file to file themselves."""


class Output(Protocol):
    """A file that bytes are appended to."""

    def write(self, content: memoryview, /) -> object:
        """Append all bytes."""
        ...


class PlainOutput:
    """An unbuffered file."""

    def __init__(self, file: FileIO) -> None:
        self.descriptor = file.fileno()
        self._file = file

    def write(self, content: memoryview) -> None:
        """Append all bytes."""
        write_all(self._file, content)


class HashedOutput:
    """An unbuffered file with a running SHA-256 of what is written to it.

    A thread computes it: it takes longer than the writing. Its caller must not change the last `_MAX_HASHED` contents.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pending: deque[Future[None]] = deque()

    def write(self, content: memoryview) -> None:
        """Append all bytes to the file and to the hash."""
        self._pending.append(self._thread.submit(self._digest.update, content))
        write_all(self._file, content)
        while len(self._pending) > _MAX_HASHED:
            self._pending.popleft().result()

    def close(self) -> str:
        """Return the SHA-256 in hexadecimal."""
        self._thread.shutdown()
        return self._digest.hexdigest()


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write all bytes: one call of an unbuffered file may write less."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


class Appender:
    """Appends the bytes of tensors to files, in a given order.

    Args:
        tensors: all tensors that will be appended, in their order.
    """

    def __init__(self, tensors: Iterable[LazyTensor]) -> None:
        self._ahead = _Ahead(task for tensor in tensors if tensor.region is None for task in tensor.tasks())
        self._buffers = itertools.cycle([memoryview(bytearray(COPY_BYTES)) for _ in range(_MAX_HASHED + 1)])
        self._first = next(self._buffers)
        self._path: Path | None = None
        self._source: FileIO | None = None

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.close()
        if self._source is not None:
            self._source.close()

    def append(self, output: Output, tensor: LazyTensor) -> None:
        """Append the bytes of the next tensor.

        Raises:
            OSError: they cannot be read or written.
        """
        if tensor.region is not None:
            self._copy(output, tensor.region, tensor.num_bytes)
            return
        for _ in range(tensor.num_blocks):
            output.write(_bytes_of(self._ahead.take()))

    def _copy(self, output: Output, region: Region, size: int) -> None:
        source = self._open(region.path)
        if isinstance(output, PlainOutput):
            done = _copy_in_kernel(source.fileno(), output.descriptor, region.offset, size)
            region, size = Region(region.path, region.offset + done), size - done
        source.seek(region.offset)
        while size:
            # Only a hash needs a buffer after it is written. A single one stays in the cache.
            buffer = next(self._buffers) if isinstance(output, HashedOutput) else self._first
            count = source.readinto(buffer[: min(size, COPY_BYTES)])
            if not count:
                raise OSError(f"{region.path} is incomplete")
            output.write(buffer[:count])
            size -= count

    def _open(self, path: Path) -> FileIO:
        """Return the file, which stays open until another one is needed."""
        if self._source is None or path != self._path:
            if self._source is not None:
                self._source.close()
            self._source, self._path = path.open("rb", buffering=0), path
        return self._source


class _Ahead:
    """Computes blocks in another thread, a few ahead of their use."""

    def __init__(self, tasks: Iterable[Callable[[], Tensor]]) -> None:
        self._tasks: Iterator[Callable[[], Tensor]] = iter(tasks)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._pending: deque[Future[Tensor]] = deque()
        self._fill()

    def take(self) -> Tensor:
        """Return the next block."""
        block = self._pending.popleft().result()
        self._fill()
        return block

    def close(self) -> None:
        """Cancel what is not taken."""
        self._thread.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        for task in itertools.islice(self._tasks, _MAX_COMPUTED - len(self._pending)):
            self._pending.append(self._thread.submit(_compute, task))


@torch.no_grad()
def _compute(task: Callable[[], Tensor]) -> Tensor:
    return task().contiguous()


def _copy_in_kernel(source: int, target: int, offset: int, size: int) -> int:
    """Return how many bytes the system has copied itself; the caller copies the others."""
    done = 0
    try:
        while done < size and (count := os.sendfile(target, source, offset + done, size - done)):
            done += count
    except OSError as error:
        if done or error.errno not in _NOT_IN_KERNEL:
            raise
    return done


def _bytes_of(block: Tensor) -> memoryview:
    view: Any = block.reshape(-1).view(torch.uint8).numpy()
    return memoryview(view)
