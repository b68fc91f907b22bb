"""What every rank posts after a step: a few flags for all ranks, and its own state for the survivors of its loss.

All ranks read what they need without waiting, as a rule: the others have posted before they could take part in the
next update. The ranks of one pod use memory that they share. Others use a group of their own, whose calls run while
the script continues.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from finetune_trainer.errors import FabricError, StorageError
from finetune_trainer.script.agreement.peers import WAIT, Peers

STATE_BYTES = 1 << 18
"""Room for the state of a rank: the generators take 13 KB each time, at the start of an epoch and for each loader."""
SHARED_FOLDER = Path("/dev/shm")  # noqa: S108  the file is created by mkstemp, and unlinked at once
MAX_MICROSECONDS = (1 << 32) - 1
_COPY_SECONDS = timedelta(seconds=5)
_CHECK_SECONDS = 0.25
_LONGEST_PAUSE = 0.005
_ROUND = 4096
_HEADER = struct.Struct("=QQ")
_LINE = 64
_SEQUENCES = (1 << 24) - 1


@dataclass(frozen=True)
class Vote:
    """Flags of one rank after a step, or those of all ranks.

    Attributes:
        notice: a preemption notice has arrived.
        due: an ordinary save is due.
        pending: the script has saved.
        microseconds: duration of the step; of rank 0 only.
    """

    notice: bool = False
    due: bool = False
    pending: bool = False
    microseconds: int = 0


class Board(Protocol):
    """The votes and states of all ranks. Each vote is posted after the last one is collected."""

    def post(self, vote: Vote, state: Callable[[], bytes]) -> None:
        """Post the vote and the state of this rank after a step."""

    def collect(self) -> Vote:
        """Return the vote of all ranks once all have posted theirs.

        Raises:
            FabricError: a peer was lost.
        """

    def copies(self) -> dict[int, bytes]:
        """Return the states of other ranks after the step of the last vote, as far as this rank holds them."""


def open_board(peers: Peers, local_size: int) -> Board:
    """Return the board of the ranks. All ranks call it at the same time."""
    if peers.size == 1:
        return SingleBoard()
    # Every rank must come to the same conclusion.
    if peers.sum([int(local_size == peers.size)])[0] == peers.size:
        return SharedBoard(peers)
    return RemoteBoard(peers)


class SingleBoard:
    """The board of a rank without others."""

    def __init__(self) -> None:
        self._vote = Vote()

    def post(self, vote: Vote, state: Callable[[], bytes]) -> None:
        """Keep the vote."""
        self._vote = vote

    def collect(self) -> Vote:
        """Return this rank's vote. There is nobody to wait for, so it counts at once."""
        return replace(self._vote, microseconds=MAX_MICROSECONDS)

    def copies(self) -> dict[int, bytes]:
        """Return nothing: there are no other ranks."""
        return {}


class SharedBoard:
    """Memory that the ranks of one pod share.

    Each rank has two words and two states, used in turn: nobody posts the next but one vote before all have collected
    the last. A word contains a whole vote, so that it is never seen in parts. Each rank holds a lock on a byte of the
    file, which the system releases when the rank ends, however that happens.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        size = peers.size * (_LINE + 2 * STATE_BYTES)
        self._file, path = _shared_file(peers, size)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, peers.rank)
        peers.barrier()
        if peers.rank == 0:
            path.unlink()
        self._memory = mmap.mmap(self._file, size)
        self._words = memoryview(self._memory)[: peers.size * _LINE].cast("Q")
        self._number = 0

    def post(self, vote: Vote, state: Callable[[], bytes]) -> None:
        """Write the state, then the vote."""
        packed = state()
        self._number += 1
        start = self._state_at(self._peers.rank)
        _HEADER.pack_into(self._memory, start, 0, 0)
        if len(packed) <= STATE_BYTES - _HEADER.size:
            self._memory[start + _HEADER.size : start + _HEADER.size + len(packed)] = packed
            # Last, so that nobody takes a part of a state for the whole.
            _HEADER.pack_into(self._memory, start, self._number, len(packed))
        flags = int(vote.notice) | int(vote.due) << 1 | int(vote.pending) << 2
        microseconds = min(vote.microseconds, MAX_MICROSECONDS)
        self._words[self._word_at(self._peers.rank)] = self._sequence << 40 | microseconds << 8 | flags

    def collect(self) -> Vote:
        """Return the vote of all ranks."""
        words = [self._wait(rank) for rank in range(self._peers.size)]
        flags = 0
        for word in words:
            flags |= word & 0xFF
        return Vote(bool(flags & 1), bool(flags & 2), bool(flags & 4), words[0] >> 8 & MAX_MICROSECONDS)

    def copies(self) -> dict[int, bytes]:
        """Return the states of all ranks that have posted this step's, including those that have ended since."""
        found = {}
        for rank in range(self._peers.size):
            start = self._state_at(rank)
            number, size = _HEADER.unpack_from(self._memory, start)
            if rank != self._peers.rank and number == self._number:
                found[rank] = self._memory[start + _HEADER.size : start + _HEADER.size + size]
        return found

    @property
    def _sequence(self) -> int:
        return (self._number - 1) % _SEQUENCES + 1

    def _word_at(self, rank: int) -> int:
        return rank * _LINE // 8 + self._number % 2

    def _state_at(self, rank: int) -> int:
        return self._peers.size * _LINE + (2 * rank + self._number % 2) * STATE_BYTES

    def _wait(self, rank: int) -> int:
        """Return the word of a rank once it has posted this vote."""
        index, sequence = self._word_at(rank), self._sequence
        pauses = _pauses()
        checked = time.monotonic()
        while (word := self._words[index]) >> 40 != sequence:
            time.sleep(next(pauses))
            if (now := time.monotonic()) - checked >= _CHECK_SECONDS:
                checked = now
                if self._has_ended(rank) and self._words[index] >> 40 != sequence:
                    raise FabricError(f"rank {self._peers.rank} lost a peer between two steps: rank {rank} has ended")
        return word

    def _has_ended(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def _pauses() -> Iterator[float]:
    pause = 0.00005
    while True:
        yield pause
        pause = min(1.5 * pause, _LONGEST_PAUSE)


def _shared_file(peers: Peers, size: int) -> tuple[int, Path]:
    """Return a new file that all ranks have opened."""
    descriptor, path = _create(size) if peers.rank == 0 else (-1, Path())
    path = peers.share(path)
    return (descriptor if peers.rank == 0 else os.open(path, os.O_RDWR | os.O_CLOEXEC)), path


def _create(size: int) -> tuple[int, Path]:
    """Create a file in memory, or in the temporary folder if the memory for files is full."""
    for folder in (SHARED_FOLDER, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="finetune-board-", dir=folder)
            try:
                # Without room for a page, a write to the memory would end the process.
                os.posix_fallocate(descriptor, 0, size)
            except OSError:
                os.close(descriptor)
                Path(name).unlink()
                raise
            return descriptor, Path(name)
    raise StorageError(f"no room for {size >> 20} MiB in {SHARED_FOLDER} and {tempfile.gettempdir()}")


class RemoteBoard:
    """A sum over all ranks and a ring of copies, which run over the network while the script continues."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._lock = threading.Lock()
        """Only one thread waits for the copy."""
        self._sizes: list[int] = []
        self._sums = torch.empty(0)
        self._sum: Any = None
        self._exchange: Sequence[Any] = ()
        self._sent = self._received = torch.empty(0, dtype=torch.uint8)

    def post(self, vote: Vote, state: Callable[[], bytes]) -> None:
        """Start the sum and the exchange."""
        packed = state()
        if not self._sizes:
            sizes = [0] * self._peers.size
            sizes[self._peers.rank] = (_HEADER.size + len(packed) + _ROUND) // _ROUND * _ROUND
            self._sizes = self._peers.sum(sizes)
            self._sent = torch.zeros(self._sizes[self._peers.rank], dtype=torch.uint8)
            self._received = torch.zeros(self._sizes[self._peers.kept_for], dtype=torch.uint8)
        is_too_large = _HEADER.size + len(packed) > len(self._sent)
        buffer = memoryview(self._sent.numpy().data)
        _HEADER.pack_into(buffer, 0, 1, 0 if is_too_large else len(packed))
        if not is_too_large:
            buffer[_HEADER.size : _HEADER.size + len(packed)] = packed
        flags = [vote.notice, vote.due, vote.pending, vote.microseconds, is_too_large]
        self._sums = torch.tensor([int(each) for each in flags])
        self._sum = self._peers.start_sum(self._sums)
        self._exchange = self._peers.start_exchange(self._sent, self._received)

    def collect(self) -> Vote:
        """Return the vote of all ranks."""
        self._peers.finish([self._sum], WAIT)
        with self._lock:
            self._finish_exchange(WAIT)
        notice, due, pending, microseconds, are_too_large = self._sums.tolist()
        if are_too_large:
            self._sizes = []
        return Vote(bool(notice), bool(due), bool(pending), int(microseconds))

    def copies(self) -> dict[int, bytes]:
        """Return the state of the rank before this one in the ring."""
        if not self._lock.acquire(timeout=_COPY_SECONDS.total_seconds()):
            return {}
        try:
            with contextlib.suppress(FabricError):
                self._finish_exchange(_COPY_SECONDS)
                buffer = memoryview(self._received.numpy().data)
                _, size = _HEADER.unpack_from(buffer)
                return {self._peers.kept_for: bytes(buffer[_HEADER.size : _HEADER.size + size])} if size else {}
        finally:
            self._lock.release()
        return {}

    def _finish_exchange(self, timeout: timedelta) -> None:
        works, self._exchange = self._exchange, ()
        self._peers.finish(works, timeout)
