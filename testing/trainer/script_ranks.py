"""Real rank processes that run a script, with the hook or without it, for tests of scripts."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_contract import environment
from testing.trainer.ranks import _CONTEXT, Ranks, free_port

WAITS = "SCRIPT_RANKS_WAIT"
FAULTY_DEVICE = "SCRIPT_RANKS_FAULTY_DEVICE"
"""Variable of a rank whose device computes wrong results: a stand-in, as no test has a faulty GPU."""


@dataclass(frozen=True)
class At:
    """A signal that a rank sends to itself.

    Attributes:
        moment: 'step' (after an optimizer step), 'backward' (before a backward pass), 'saved' (when accelerate has
            written its files), or 'save' (in the middle of accelerate's save).
        number: how often the moment passes before it counts, from 1.
        rank: the rank.
        signal: the signal.
    """

    moment: str
    number: int
    rank: int = 0
    signal: signal.Signals = signal.SIGKILL


@dataclass
class ScriptRanks(Ranks):
    """The ranks of one attempt at a job with a script.

    Attributes:
        hooked: whether the hook is used; otherwise the script runs as under `accelerate launch`.
        waits: whether the ranks wait for each other after each step, as those of long steps do.
        at: signals of the ranks to themselves.
        argv: command line without the hook.
    """

    hooked: bool = True
    waits: bool = False
    at: tuple[At, ...] = ()
    argv: tuple[str, ...] = ()
    script: Path = field(default_factory=Path)

    def start(self) -> ScriptRanks:
        """Start all ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(self.spec.to_json(), encoding="utf-8")
        port = free_port()
        self.processes = [
            _CONTEXT.Process(
                target=_hooked if self.hooked else _plain,
                args=(
                    self._environment(rank, port) | {WAITS: str(int(self.waits))},
                    self._log(rank),
                    tuple(each for each in self.at if each.rank == rank),
                    (str(self.script), *self.argv),
                ),
            )
            for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()
        return self

    def output(self, name: str = "model.pt") -> bytes:
        """Return a file of the script's output folder."""
        return (self.job_dir / "script" / name).read_bytes()

    @property
    def checkpoints(self) -> list[str]:
        """Return the names in the script's output folder that begin like a checkpoint, in order of their steps."""
        names = [each.name for each in (self.job_dir / "script").iterdir() if each.name.startswith("checkpoint-")]
        return sorted(names, key=lambda name: int(name.partition("-")[2]))


def _prepare(env: Mapping[str, str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    reports = os.open(log.with_suffix(".reports"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.environ.update({**env, environment.REPORT_FD: str(reports)})


def _hooked(env: dict[str, str], log: Path, at: tuple[At, ...], _: tuple[str, ...]) -> None:
    """Run the script in this process, as the supervisor does."""
    from finetune_trainer.script import launch  # noqa: PLC0415  the tests themselves need no torch
    from finetune_trainer.script.__main__ import main  # noqa: PLC0415
    from finetune_trainer.script.agreement import votes  # noqa: PLC0415

    _prepare(env, log)
    if env[WAITS] == "1":
        votes.LONG_STEP_SECONDS = 0.0
    if env.get(FAULTY_DEVICE):
        launch.multiply = lambda _: None  # type: ignore[attr-defined, assignment]
    _install(at)
    code = main(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _plain(env: dict[str, str], log: Path, at: tuple[At, ...], argv: tuple[str, ...]) -> None:
    """Run the script in this process without the hook."""
    _prepare(env, log)
    _install(at)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if env["WORLD_SIZE"] == "1":
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


def _install(at: tuple[At, ...]) -> None:
    """Send this process its signals."""
    if not at:
        return
    import accelerate.accelerator  # noqa: PLC0415
    from accelerate import Accelerator  # noqa: PLC0415
    from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: PLC0415  the tests need no torch

    passed: dict[str, int] = {}

    def reach(moment: str) -> None:
        passed[moment] = passed.get(moment, 0) + 1
        for each in at:
            if (each.moment, each.number) == (moment, passed[moment]):
                os.kill(os.getpid(), each.signal)

    def wrapped(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if before:
                reach(before)
            result = function(*args, **kwargs)
            if after:
                reach(after)
            return result

        return run

    register_optimizer_step_post_hook(lambda *_: reach("step"))
    Accelerator.backward = wrapped(Accelerator.backward, "backward", "")
    Accelerator.save_state = wrapped(Accelerator.save_state, "", "saved")
    module: Any = accelerate.accelerator
    module.save_accelerator_state = wrapped(module.save_accelerator_state, "save", "")
