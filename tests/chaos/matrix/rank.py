"""A rank that stops at one moment of its first attempt, tells where it is, and goes on when it is told to.

Run by the supervisor in place of `finetune_trainer.rank`, whose code it runs: the trainer itself knows nothing of it.
The moment comes by MATRIX_AIM (JSON); what is to happen there by a file beside the one that tells of it.
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
from finetune_trainer import rank
from finetune_trainer.report import Reporter

AIM = "MATRIX_AIM"
"""JSON: stage, ranks (that stop there), folder, step (of the stage `training`), save_step, mount (to have a view of its
own)."""
POLL_SECONDS = 0.002
SAVE_STAGE = "write manifest"
"""Everything but the manifest is written: a checkpoint that is all but whole."""
HEADROOM_BYTES = 64 * 1024**2
TOO_LARGE_BYTES = 4 * 1024**3
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_BIND, _MS_SLAVE = 0x4000, 0x1000, 0x80000
_libc = ctypes.CDLL(None, use_errno=True)


class Aim:
    """The moment at which this rank stops, once."""

    def __init__(self, env: dict[str, str]) -> None:
        aim = json.loads(env[AIM])
        self.rank = int(env["RANK"])
        self.attempt = int(env[environment.ATTEMPT])
        self.stage: str = aim["stage"]
        self.step: int = aim["step"]
        self.save_step: int = aim["save_step"]
        self._folder = Path(aim["folder"])
        self._open = self.attempt == 1 and self.rank in aim["ranks"]
        if self.attempt == 1 and aim.get("mount"):
            _own_view_of(aim["mount"])
        _write(self._folder / f"pid-{self.attempt}-{self.rank}", str(os.getpid()))

    def reach(self, stage: str) -> None:
        """Stop here, if this is the moment, until somebody says how to go on."""
        if not self._open or stage != self.stage:
            return
        self._open = False
        _write(self._folder / f"reached-{self.rank}", stage)
        order = self._folder / f"order-{self.rank}"
        while not order.exists():
            time.sleep(POLL_SECONDS)
        carry_out(order.read_text())

    def note_step(self) -> None:
        """Remember when the first step of an attempt was done, by the machine's clock."""
        path = self._folder / f"stepped-{self.attempt}-{self.rank}"
        if not path.exists():
            _write(path, str(time.monotonic()))


def carry_out(order: str) -> None:
    """Go on as told: simply, by exiting with 1, or by asking for more memory than there is."""
    if order == "exit":
        print("leaving with exit code 1, as told", file=sys.stderr, flush=True)
        os._exit(1)
    if order == "memory":
        import torch  # noqa: PLC0415

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.ones(TOO_LARGE_BYTES, dtype=torch.uint8)


class AimedReporter(Reporter):
    """Reports as ever; some of the moments are those of a report."""

    aim: Aim

    def state(self, state: RankState) -> None:
        """Report, then stop where this is the moment."""
        super().state(state)
        if state is RankState.LOADING:
            self.aim.reach("loading")
        if state is RankState.CACHING:
            self.aim.reach("caching")
        if state is RankState.VALIDATING and self._report.step:
            self.aim.reach("validating")
        if state is RankState.EXPORTING:
            self.aim.reach("exporting")


def aim_loop(aim: Aim) -> None:
    """Stop inside the training loop, before the collective of a step."""
    from finetune_trainer.train.loop import Loop  # noqa: PLC0415  slow to import

    train_step = Loop.train_step

    def aimed(self: Loop) -> Any:
        aim.reach("first step")
        if self.state.step >= aim.step:
            aim.reach("training")
        if aim.rank > 0 and self.state.step >= aim.save_step:
            # Rank 0 alone saves; meanwhile this one is about to begin its next step.
            aim.reach("saving")
        result = train_step(self)
        aim.note_step()
        return result

    Loop.train_step = aimed  # type: ignore[method-assign]


def _own_view_of(path: str) -> None:
    """Have a mount namespace in which this folder is a mount of its own, so that it can be made read-only there."""
    name = path.encode()
    ok = _libc.unshare(_CLONE_NEWNS) == 0 and _libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None) == 0
    if not ok or _libc.mount(name, name, None, _MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace of its own")


def _write(path: Path, text: str) -> None:
    """Whole or not there, and not on a disk that a fault fills."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def main() -> None:
    """Run the trainer's rank, aimed."""
    aim = Aim(dict(os.environ))
    AimedReporter.aim = aim
    rank.Reporter = AimedReporter  # type: ignore[attr-defined]
    if aim.stage in {"first step", "training", "saving"} or aim.attempt > 1:
        aim_loop(aim)
    code = rank.main(os.environ, lambda stage: aim.reach("saving") if stage == SAVE_STAGE else None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
