"""The position in the data of one loader that accelerate has prepared: recorded for checkpoints, and restored.

accelerate reads one batch ahead of the script, and every read may draw random numbers, for crops and flips. So the
position holds the state of the generators at the start of the epoch, which determines the order, and before the read
of the batch that the script gets next. A resumed epoch skips the indices of the batches before it, without reading
them, and reads that batch with the same draws as before.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from finetune_trainer.script.random_state import RandomState, bytes_to_tensor, capture, restore
from finetune_trainer.script.workers import NumberedBatches, WorkerStart


@dataclass(frozen=True)
class Generators:
    """State of the generators and samplers that decide the order of a loader's samples."""

    states: tuple[bytes, ...]
    seeds: tuple[tuple[str, int], ...]
    """Attributes of accelerate's own sampler."""


@dataclass(frozen=True)
class Position:
    """Where a loader was when a checkpoint was taken.

    Attributes:
        epoch: number of its iteration, or of the next one between two iterations.
        yielded: batches that the script had got in this iteration.
        is_open: whether the script was inside the iteration, with batches left.
        random: state at the start of the iteration.
        order: the same of the loader's own generators.
        order_now: their state at the checkpoint, between two iterations.
        before_next: state before the read of the next batch; None if this rank reads none.
    """

    epoch: int
    yielded: int
    is_open: bool
    random: RandomState | None
    order: Generators | None
    order_now: Generators | None
    before_next: RandomState | None


class LoopObserver(Protocol):
    """What a loader reports to the session."""

    def before_batch(self, loader: TrackedLoader) -> None:
        """The script requests the next batch: the work of the last one is complete."""

    def before_epoch(self, loader: TrackedLoader) -> bool:
        """The script starts to read a loader; return whether there is anything left to train."""

    def after_batch(self, batch: Any) -> None:
        """The script gets a batch."""

    def after_restore(self, loader: TrackedLoader) -> RandomState:
        """Return the state of the generators after the position of a loader was restored."""

    def skips_by_step(self) -> bool:
        """Return whether the script skips batches itself after a resume."""


class TrackedLoader:
    """One prepared loader."""

    def __init__(self, loader: Any, observer: LoopObserver) -> None:
        self.loader = loader
        self.is_active = False
        """Whether the script is inside an iteration."""
        self._observer = observer
        self._base: DataLoader[Any] = loader.base_dataloader
        self._epoch = 0
        self._yielded = 0
        self._start: tuple[RandomState, Generators] | None = None
        self._reads: Reads | None = None
        self._resumed: Position | None = None
        if self._base.num_workers and not isinstance(self._base.dataset, IterableDataset):
            self._base.worker_init_fn = WorkerStart(self._base.worker_init_fn)

    @property
    def fetches_per_batch(self) -> int:
        """Reads of this rank for one batch of the script: a dispatcher reads those of all ranks on rank 0."""
        dispatcher = type(self.loader).__name__ == "DataLoaderDispatcher"
        if not dispatcher or self.loader.split_batches:
            return 1
        return int(self.loader.state.num_processes)

    @property
    def reads_here(self) -> bool:
        """Return whether this rank reads data itself."""
        return type(self.loader).__name__ != "DataLoaderDispatcher" or self.loader.state.process_index == 0

    def position(self) -> Position:
        """Return the position at this moment. Call it while the script is between two batches."""
        is_open = self.is_active and not self.loader.end_of_dataloader
        start = self._start if is_open else None
        before = self._reads.before(self._yielded * self.fetches_per_batch) if is_open and self._reads else None
        # accelerate counts an epoch only after the script has left it.
        has_ended = self.is_active and not is_open
        return Position(
            self._epoch if is_open else self.loader.iteration + int(has_ended),
            self._yielded,
            is_open,
            start[0] if start else None,
            start[1] if start else None,
            # Inside an iteration its start determines the order, and the walk through the samplers takes time.
            None if start else read_order(self.loader),
            before,
        )

    def knows(self, random: RandomState | None) -> None:
        """Use this state of the generators for the next read: nothing has drawn since it was captured."""
        if self._reads is not None:
            self._reads.known = random

    def resume(self, position: Position) -> None:
        """Continue at a position when the script starts to read the loader."""
        self._resumed = position

    @property
    def is_resumed(self) -> bool:
        """Return whether a position waits to be restored."""
        return self._resumed is not None

    def iterate(self, original: Any) -> Iterator[Any]:
        """Yield the batches of one iteration, from the position to resume if there is one.

        Args:
            original: accelerate's own `__iter__` of the loader's class.
        """
        if not self._observer.before_epoch(self):
            return
        resumed, self._resumed = self._resumed, None
        self._prepare(resumed)
        source = original(self.loader)
        placeholders = 0
        if resumed is not None and resumed.is_open:
            self._yielded = resumed.yielded
            placeholders = resumed.yielded if self._observer.skips_by_step() else 0
        self.is_active = True
        try:
            while True:
                self._observer.before_batch(self)
                try:
                    batch = next(source)
                except StopIteration:
                    return
                for _ in range(placeholders):
                    # The script counts and skips them. They are not read from the data set.
                    yield batch
                placeholders = 0
                self._yielded += 1
                self._observer.after_batch(batch)
                yield batch
        finally:
            self.is_active = False

    def _prepare(self, resumed: Position | None) -> None:
        """Restore the generators as they were at the start of the iteration, or record them."""
        skip = 0
        after = before = None
        if resumed is not None:
            after = self._observer.after_restore(self)
            if resumed.is_open:
                assert resumed.random is not None
                assert resumed.order is not None
                self.loader.iteration = resumed.epoch
                restore(resumed.random)
                write_order(self.loader, resumed.order)
                skip, before = resumed.yielded * self.fetches_per_batch, resumed.before_next
            else:
                self.loader.iteration = resumed.epoch
                restore(after)
                assert resumed.order_now is not None
                write_order(self.loader, resumed.order_now)
                after = None
        self._epoch, self._yielded = self.loader.iteration, 0
        self._start = (capture(), read_order(self.loader))
        self._reads = Reads(skip, before, after, self.fetches_per_batch)

    def read(self, original: Any) -> Iterator[Any]:
        """Return the iterator over the loader's base, which accelerate reads from.

        Args:
            original: torch's own `DataLoader.__iter__`.
        """
        reads = self._reads
        assert reads is not None
        base = self._base
        if isinstance(base.dataset, IterableDataset):
            source = original(base)
            for _ in range(reads.skip if self.reads_here else 0):
                next(source, None)
        elif base.num_workers:
            source = _with_sampler(base, original, NumberedBatches(base.batch_sampler, reads.skip, _digest()))
        else:
            source = original(base)
            if self.reads_here:
                for _ in range(reads.skip):
                    next(source._sampler_iter, None)
        if not self.reads_here:
            reads.finish_restore()
        reads.source = source
        return reads


class Reads:
    """Iterator over the base of a loader. It records the state of the generators before each read.

    Args:
        skip: reads that are skipped at the start.
        before: state of the generators to set before the first read; None: as it is.
        after: state to set after the reads of the first batch; None: as it is.
        group: reads of one batch.
    """

    def __init__(self, skip: int, before: RandomState | None, after: RandomState | None, group: int) -> None:
        self.skip = skip
        self.source: Iterator[Any] = iter(())
        self._before, self._after, self._group = before, after, group
        self.known: RandomState | None = None
        """State before the next read, if somebody has captured it already."""
        self._number = skip
        self._recent: deque[tuple[int, RandomState]] = deque(maxlen=2 * group + 2)

    def __iter__(self) -> Reads:
        return self

    def __next__(self) -> Any:
        if self._before is not None:
            restore(self._before)
            self._before = self.known = None
        self._recent.append((self._number, self.known or capture()))
        self.known = None
        try:
            batch = next(self.source)
        except StopIteration:
            self.finish_restore()
            raise
        self._number += 1
        if self._number == self.skip + self._group:
            self.finish_restore()
        return batch

    def finish_restore(self) -> None:
        """Set the state of the generators at the checkpoint: the batch that had been read ahead is read again."""
        if self._after is not None:
            restore(self._after)
            self._after = None

    def before(self, number: int) -> RandomState | None:
        """Return the state before a recent read."""
        return next((state for index, state in self._recent if index == number), None)


def _with_sampler(base: DataLoader[Any], original: Any, sampler: NumberedBatches) -> Iterator[Any]:
    """Start the workers of a loader with other indices: they prefetch as soon as they start."""
    old = base.batch_sampler
    # torch refuses this assignment, because it would ignore it in a running iteration. None runs here.
    object.__setattr__(base, "batch_sampler", sampler)
    try:
        running = getattr(base, "_iterator", None)
        if running is not None:
            running._index_sampler = sampler
        source: Iterator[Any] = original(base)
        return source
    finally:
        object.__setattr__(base, "batch_sampler", old)


def _digest() -> int:
    """Return a number that the state of torch's generator determines, without a draw."""
    return int.from_bytes(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()[:6], "big")


def _samplers(loader: Any) -> list[Any]:
    """Return the objects that may hold a generator or a seed."""
    base = loader.base_dataloader
    found = [base, base.sampler, getattr(base.sampler, "sampler", None), base.dataset]
    batch_sampler = base.batch_sampler
    while batch_sampler is not None and batch_sampler not in found:
        found += [batch_sampler, getattr(batch_sampler, "sampler", None)]
        batch_sampler = getattr(batch_sampler, "batch_sampler", None)
    return [loader, *(each for each in found if each is not None)]


def _generators(loader: Any) -> list[torch.Generator]:
    found: dict[int, torch.Generator] = {}
    for owner in _samplers(loader):
        for name in ("generator", "synchronized_generator"):
            generator = owner.__dict__.get(name) if hasattr(owner, "__dict__") else None
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


_SEEDS = ("initial_seed", "epoch")


def read_order(loader: Any) -> Generators:
    """Return the state of the loader's own generators and samplers."""
    seeds = [
        (f"{index}.{name}", owner.__dict__[name])
        for index, owner in enumerate(_samplers(loader))
        for name in _SEEDS
        if type(owner).__name__ == "SeedableRandomSampler" and isinstance(owner.__dict__.get(name), int)
    ]
    states = tuple(generator.get_state().numpy().tobytes() for generator in _generators(loader))
    return Generators(states, tuple(seeds))


def write_order(loader: Any, order: Generators) -> None:
    """Set the state of the loader's own generators and samplers."""
    for generator, state in zip(_generators(loader), order.states, strict=False):
        generator.set_state(bytes_to_tensor(state))
    owners = _samplers(loader)
    for path, value in order.seeds:
        index, _, name = path.partition(".")
        if int(index) < len(owners) and type(owners[int(index)]).__name__ == "SeedableRandomSampler":
            setattr(owners[int(index)], name, value)
