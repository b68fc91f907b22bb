"""Writes the state of a script through accelerate: by all ranks together, or by the survivors of a lost peer."""

from __future__ import annotations

import contextlib
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_contract.manifest import BadCheckpointError
from finetune_trainer.errors import SupersededError
from finetune_trainer.files import sync_file, write_atomically
from finetune_trainer.report import Reporter
from finetune_trainer.script.agreement.peers import Peers
from finetune_trainer.script.checkpoints import SURVIVORS, Found, ScriptCheckpoints, is_committed
from finetune_trainer.script.position import Position
from finetune_trainer.script.random_state import RandomState, in_accelerate_format
from finetune_trainer.script.source import ScriptFacts

_LOG = logging.getLogger(__name__)
PEER_STATES_SECONDS = 10.0
"""Longest wait of an emergency save for the states of the other survivors."""
CLAIM_SECONDS = 50.0
"""Longest wait for the survivor that saves; the supervisor ends an emergency save after a minute."""
POLL_SECONDS = 0.05
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of distribution in which every rank holds a part of the state."""


@dataclass(frozen=True)
class RankRecord:
    """What one rank adds to a checkpoint: the state of its generators, and its position in the data."""

    step: int
    batches: int
    """accelerate's own counter."""
    world_size: int
    random: RandomState
    positions: Mapping[int, Position]

    def pack(self) -> bytes:
        """Return the record as bytes."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)


def rank_file(rank: int) -> str:
    """Return the name of a rank's record in a checkpoint."""
    return f"finetune_rank_{rank}.pkl"


def read_record(folder: Path, rank: int) -> RankRecord | None:
    """Return the record of a rank from a verified checkpoint; None if it has none."""
    path = folder / rank_file(rank)
    if not path.is_file():
        return None
    record = pickle.loads(path.read_bytes())  # noqa: S301  verified against the job's manifest
    return record if isinstance(record, RankRecord) else None


class Saver:
    """Saves the state of one accelerator.

    Args:
        checkpoints: of the script.
        peers: the other ranks.
        reporter: of this rank.
        save_state: accelerate's own `Accelerator.save_state`.
        facts: what the text of the script shows.
    """

    def __init__(
        self,
        checkpoints: ScriptCheckpoints,
        peers: Peers,
        reporter: Reporter,
        save_state: Callable[..., Any],
        facts: ScriptFacts,
    ) -> None:
        self.checkpoints = checkpoints
        self._peers = peers
        self._reporter = reporter
        self._save_state = save_state
        self._facts = facts

    def saves_on_all_ranks(self, accelerator: Any) -> bool:
        """Return whether accelerate's save is a call of all ranks."""
        return self._facts.saves_on_all_ranks or accelerator.distributed_type.name in SHARDED

    def calls_on_rank_0_only(self, accelerator: Any) -> bool:
        """Return whether the script calls a save on rank 0 that all ranks would have to call."""
        kind = accelerator.distributed_type.name
        return kind in SHARDED and not self._facts.saves_on_all_ranks and kind not in self._facts.save_guard

    def write(self, accelerator: Any, folder: Path) -> None:
        """Write accelerate's files of this rank.

        Raises:
            OSError: the storage cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._peers.rank == 0 or self.saves_on_all_ranks(accelerator):
            with _named_by_caller(accelerator):
                self._save_state(accelerator, str(folder))

    def save(
        self, accelerator: Any, final: Path, written: Path | None, record: RankRecord, by: str
    ) -> tuple[Found | None, str]:
        """Save on all ranks, and commit on rank 0.

        Args:
            accelerator: of the script.
            final: folder of the checkpoint.
            written: folder that contains accelerate's files already; None: write them.
            record: of this rank.
            by: why it is saved.

        Returns:
            The checkpoint (on rank 0 only) and an error; the error is empty if it is committed.

        Raises:
            FabricError: a peer was lost.
            SupersededError: a newer attempt has begun.
        """
        folder = written or self.checkpoints.aside(final)
        error = ""
        try:
            # Before the large files: the survivors of a peer that is lost during the save read it.
            write_atomically(folder / rank_file(self._peers.rank), record.pack())
            if written is None:
                self.write(accelerator, folder)
            _write_random_states(folder, self._peers.rank, record)
        except OSError as problem:
            error = f"rank {self._peers.rank}: {problem.strerror or problem}"
        if self._peers.sum([int(bool(error))])[0]:
            return None, self._first(error)
        found: Found | None = None
        superseded = False
        if self._peers.rank == 0:
            try:
                found = self._commit(folder, final, record, by)
            except (OSError, BadCheckpointError) as problem:
                error = str(problem)
            except SupersededError as problem:
                error, superseded = str(problem), True
        error, superseded = self._peers.share((error, superseded))
        if superseded:
            raise SupersededError(error)
        return found, error

    def save_alone(self, accelerator: Any, final: Path, records: dict[int, RankRecord]) -> Found | None:
        """Save without the lost peer: the first survivor writes, the others wait for it.

        Args:
            accelerator: of the script.
            final: folder of the checkpoint.
            records: those that this rank holds: its own, and the copy of another rank's.

        Returns:
            The checkpoint if this rank has written it.
        """
        if accelerator.distributed_type.name in SHARDED:
            _LOG.warning("emergency save skipped: the state is divided over the ranks")
            return None
        folder = self.checkpoints.aside(final).with_suffix(SURVIVORS)
        states = folder.with_suffix(".states")
        states.mkdir(parents=True, exist_ok=True)
        for rank, record in records.items():
            temporary = states / f".{rank}-{self._peers.rank}"
            temporary.write_bytes(record.pack())
            temporary.replace(states / rank_file(rank))
        self._take_records(self.checkpoints.aside(final), states)
        if not self.checkpoints.claim(final):
            _wait(lambda: is_committed(final), CLAIM_SECONDS)
            return None
        expected = [states / rank_file(rank) for rank in range(self._peers.size)]
        if not _wait(lambda: all(path.exists() for path in expected), PEER_STATES_SECONDS):
            _LOG.warning("emergency save skipped: no surviving rank has the random state of a lost rank")
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with _as_main_process(), _named_by_caller(accelerator):
            self._save_state(accelerator, str(folder))
        for rank, path in enumerate(expected):
            data = path.read_bytes()
            write_atomically(folder / rank_file(rank), data)
            _write_random_states(folder, rank, pickle.loads(data))  # noqa: S301  written by ranks of this job
        return self._commit(folder, final, records[self._peers.rank], "peer-lost")

    def _take_records(self, unfinished: Path, states: Path) -> None:
        """Take the records that lost ranks wrote into the checkpoint of this step before its save was interrupted."""
        for rank in range(self._peers.size):
            written, target = unfinished / rank_file(rank), states / rank_file(rank)
            if written.exists() and not target.exists():
                temporary = states / f".{rank}-{self._peers.rank}"
                shutil.copyfile(written, temporary)
                temporary.replace(target)

    def report(self, found: Found, stall: float, interval: float | None) -> None:
        """Report a committed checkpoint."""
        manifest = found.manifest
        self._reporter.checkpoint(
            CommittedCheckpoint(
                step=manifest.step,
                time=manifest.time,
                size_bytes=sum(each.size_bytes for each in manifest.files),
                attempt=manifest.attempt,
                stall_seconds=stall,
                durable_seconds=stall,
                interval_seconds=interval,
            )
        )

    def _commit(self, folder: Path, final: Path, record: RankRecord, by: str) -> Found:
        about = {"by": by, "step": record.step, "worldSize": record.world_size}
        return self.checkpoints.commit(folder, final, record.step, time.time(), about)

    def _first(self, error: str) -> str:
        """Return the error of the first rank that has one: this rank's, or that another rank failed."""
        return self._peers.share(error) or error or "another rank could not write its part"


def _write_random_states(folder: Path, rank: int, record: RankRecord) -> None:
    """Replace the file of accelerate, so that the script alone can resume the checkpoint."""
    states = folder / f"random_states_{rank}.pkl"
    torch.save(in_accelerate_format(record.random, record.batches), states)
    sync_file(states)


def _wait(is_done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


@contextlib.contextmanager
def _named_by_caller(accelerator: Any) -> Iterator[None]:
    """Let `save_state` use the folder that it is given, also if accelerate chooses the names of the script."""
    project = accelerator.project_configuration
    automatic, iteration = project.automatic_checkpoint_naming, project.iteration
    project.automatic_checkpoint_naming = False
    try:
        yield
    finally:
        project.automatic_checkpoint_naming, project.iteration = automatic, iteration


@contextlib.contextmanager
def _as_main_process() -> Iterator[None]:
    """Let accelerate, and the script's own functions, save on this rank. Its other threads no longer train."""
    from accelerate.state import AcceleratorState, PartialState  # noqa: PLC0415  the script chooses its version

    states = [PartialState._shared_state, AcceleratorState._shared_state]
    names = ("process_index", "local_process_index")
    old = [{name: state[name] for name in names if name in state} for state in states]
    for state in states:
        state.update({name: 0 for name in names if name in state})
    try:
        yield
    finally:
        for state, values in zip(states, old, strict=True):
            state.update(values)
