"""A rank that stops at one point of its first attempt, reports it, and waits for an order.

The supervisor runs it in place of `finetune_trainer.rank`, whose code it runs: the trainer has no code for it. The
stop point comes from MATRIX_STOP_POINT (JSON); the order comes from a file next to the one that reports the stop.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_contract.heartbeat import RankState
from finetune_trainer import entry, rank
from finetune_trainer.report import Reporter

STOP_POINT = "MATRIX_STOP_POINT"
"""JSON: stage, ranks (that stop there), folder, step (of the stage `training`), save_step, mount (folder to mount
separately for this rank)."""
POLL_SECONDS = 0.002
SAVE_STAGE = "write manifest"
"""Everything except the manifest is written: the checkpoint is not committed yet."""
HEADROOM_BYTES = 64 * 1024**2
TOO_LARGE_BYTES = 4 * 1024**3
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_BIND, _MS_SLAVE = 0x4000, 0x1000, 0x80000
_libc = ctypes.CDLL(None, use_errno=True)


class StopPoint:
    """The point at which this rank stops once."""

    def __init__(self, env: dict[str, str]) -> None:
        settings = json.loads(env[STOP_POINT])
        self.rank = int(env["RANK"])
        self.attempt = int(env[environment.ATTEMPT])
        self.stage: str = settings["stage"]
        self.step: int = settings["step"]
        self.save_step: int = settings["save_step"]
        self._folder = Path(settings["folder"])
        self._is_ahead = self.attempt == 1 and self.rank in settings["ranks"]
        if self.attempt == 1 and settings.get("mount"):
            _mount_separately(settings["mount"])
        _write(self._folder / f"pid-{self.attempt}-{self.rank}", str(os.getpid()))

    def reach(self, stage: str) -> None:
        """Stop here if this is the stage, until an order arrives."""
        if not self._is_ahead or stage != self.stage:
            return
        self._is_ahead = False
        _write(self._folder / f"reached-{self.rank}", stage)
        order = self._folder / f"order-{self.rank}"
        while not order.exists():
            time.sleep(POLL_SECONDS)
        carry_out(order.read_text())

    def note_step(self) -> None:
        """Store the time of the first finished step of an attempt, by the machine's monotonic clock."""
        path = self._folder / f"stepped-{self.attempt}-{self.rank}"
        if not path.exists():
            _write(path, str(time.monotonic()))


def carry_out(order: str) -> None:
    """Continue, exit with code 1, or allocate more memory than available."""
    if order == "exit":
        print("exit with code 1, as ordered", file=sys.stderr, flush=True)
        os._exit(1)
    if order == "memory":
        import torch  # noqa: PLC0415

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.ones(TOO_LARGE_BYTES, dtype=torch.uint8)


class StoppingReporter(Reporter):
    """Reports as usual, and stops at stages that begin with a report."""

    stop_point: StopPoint

    def state(self, state: RankState) -> None:
        """Report, then stop if this is the stage."""
        super().state(state)
        if state is RankState.LOADING:
            self.stop_point.reach("loading")
        if state is RankState.CACHING:
            self.stop_point.reach("caching")
        if state is RankState.VALIDATING and self._report.step:
            self.stop_point.reach("validating")
        if state is RankState.EXPORTING:
            self.stop_point.reach("exporting")


def stop_in_loop(stop_point: StopPoint) -> None:
    """Stop inside the training loop, before the collective of a step."""
    from finetune_trainer.train.loop import Loop  # noqa: PLC0415  slow to import

    train_step = Loop.train_step

    def stopping_train_step(self: Loop) -> Any:
        stop_point.reach("first step")
        if self.state.step >= stop_point.step:
            stop_point.reach("training")
        if stop_point.rank > 0 and self.state.step >= stop_point.save_step:
            # Only rank 0 saves. This rank stops before its next step.
            stop_point.reach("saving")
        result = train_step(self)
        stop_point.note_step()
        return result

    Loop.train_step = stopping_train_step  # type: ignore[method-assign]


def _mount_separately(path: str) -> None:
    """Enter a new mount namespace in which this folder is a separate mount, so that it can be made read-only there."""
    name = path.encode()
    ok = _libc.unshare(_CLONE_NEWNS) == 0 and _libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None) == 0
    if not ok or _libc.mount(name, name, None, _MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), "cannot create a mount namespace")


def _write(path: Path, text: str) -> None:
    """Write a file atomically. The folder is not on a disk that a fault fills."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    """Run the trainer's rank with its stop point."""
    stop_point = StopPoint(dict(os.environ))
    StoppingReporter.stop_point = stop_point
    entry.Reporter = StoppingReporter  # type: ignore[attr-defined]
    if stop_point.stage in {"first step", "training", "saving"} or stop_point.attempt > 1:
        stop_in_loop(stop_point)
    code = rank.main(os.environ, lambda stage: stop_point.reach("saving") if stage == SAVE_STAGE else None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
