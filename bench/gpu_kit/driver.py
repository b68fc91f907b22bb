"""Runs the measurements one after the other within the total time, and prints the result in every case."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from testing.gpu_kit.children import Child, Children
from testing.gpu_kit.records import Outcome, read_records
from testing.gpu_kit.schedule import (
    FLOPS,
    IMPORT_SECONDS,
    LEAST_SECONDS,
    MACHINE,
    TOTAL_SECONDS,
    Measurement,
    measurements,
    select,
    time_limit,
)
from testing.gpu_kit.summary import HEADER, rows, summarize
from testing.measure.report import finish

SETUP = "setup"
"""Name of the outcome of what precedes the measurements."""
RESULT = "results.json"
NO_TIME = "no time was left"
STOPPED = "the kit was stopped"


class _Stopped(BaseException):
    """SIGTERM or SIGINT: print what is known."""


class KitDriver:
    """One run of the kit."""

    def __init__(self, options: argparse.Namespace, folder: Path, started: float) -> None:
        """Prepare the run.

        Args:
            options: the command line.
            folder: temporary folder of the measurements.
            started: time of the start of the kit, by the monotonic clock.
        """
        self._options = options
        self._folder = folder
        self._started = started
        self._out = Path(options.out)
        self.outcomes: dict[str, Outcome] = {}
        self._children = Children(folder, options.tiny, _environment(folder, options.device))
        self._background: Child | None = None

    def run(self) -> None:
        """Run all measurements that were selected."""
        try:
            self._set_up()
            planned = select(measurements(self._has_gpu), self._options.only)
            if not self._options.only or self._options.flops:
                self._background = self._children.start(FLOPS)
            for index, measurement in enumerate(planned):
                limit = time_limit(planned, index, self._elapsed, self._options.seconds, self._options.stretch)
                self._measure(measurement, limit)
            self._end_background(min(FLOPS.most, self._options.seconds) * self._options.stretch - self._elapsed)
        except _Stopped:
            self._end_background(0.0)
        self._children.stop_zygote()
        self._children.kill_orphans()

    @property
    def result(self) -> dict[str, Any]:
        """Return the result so far."""
        return summarize(self.outcomes, self._elapsed, self._options.tiny)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def _has_gpu(self) -> bool:
        return bool(self._options.device != "cpu")

    def _set_up(self) -> None:
        """Import the libraries and make sure that a process that was forked after it can use the device."""
        began = self._elapsed
        problem = self._children.start_zygote(IMPORT_SECONDS * self._options.stretch)
        if problem is not None:
            self.outcomes[SETUP] = Outcome(error=problem, seconds=self._elapsed - began)
        self._measure(MACHINE, MACHINE.most * self._options.stretch)
        if self.outcomes[MACHINE.name].error is not None and self._children.has_zygote:
            self.outcomes[SETUP] = Outcome(
                error=f"a forked process cannot use the device: {self.outcomes[MACHINE.name].error}; each measurement "
                "imports the libraries itself"
            )
            self._children.stop_zygote()
            self._measure(MACHINE, MACHINE.most * self._options.stretch)

    def _measure(self, measurement: Measurement, limit: float) -> None:
        """Run one measurement, and write the result so far."""
        if limit < LEAST_SECONDS:
            self.outcomes[measurement.name] = Outcome(error=NO_TIME)
            return
        # Replaced by what was recorded, unless the kit is stopped before that.
        self.outcomes[measurement.name] = Outcome(error=STOPPED)
        self._say(f"{measurement.name} (at most {limit:.0f} s)")
        child = None
        try:
            child = self._children.start(measurement)
            self.outcomes[measurement.name] = self._children.wait(child, limit)
        except OSError as error:
            self.outcomes[measurement.name] = Outcome(error=f"no process could be started: {error}")
        except _Stopped:
            self.outcomes[measurement.name] = _interrupted(child)
            raise
        self._children.kill_orphans([self._background] if self._background else [])
        self._read_background()
        self._write()
        outcome = self.outcomes[measurement.name]
        self._say(f"{measurement.name}: {outcome.error or 'done'} after {outcome.seconds:.1f} s")

    def _read_background(self) -> None:
        if self._background is not None:
            self.outcomes[FLOPS.name] = read_records(self._background.records)

    def _end_background(self, seconds: float) -> None:
        """Wait for the count of the arithmetic, and end it."""
        if self._background is not None:
            child, self._background = self._background, None
            self.outcomes[FLOPS.name] = self._children.wait(child, seconds)

    def _write(self) -> None:
        """Write the result so far, and copy the profiles."""
        self._out.mkdir(parents=True, exist_ok=True)
        part = self._out / f".{RESULT}"
        part.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
        part.replace(self._out / RESULT)
        for name in ("profiles", "logs"):
            if (self._folder / name).is_dir():
                shutil.copytree(self._folder / name, self._out / name, dirs_exist_ok=True)

    def _say(self, text: str) -> None:
        print(f"[{self._elapsed:5.1f} s] {text}", flush=True)

    def report(self) -> None:
        """Print the table and the line of JSON."""
        with suppress(OSError):
            self._write()
        result = self.result
        finish(HEADER, rows(result, self.outcomes), result)


def _interrupted(child: Child | None) -> Outcome:
    outcome = Outcome() if child is None else read_records(child.records)
    outcome.error = STOPPED
    return outcome


def _environment(folder: Path, device: str) -> Mapping[str, str]:
    """Return the environment of all processes: caches in the temporary folder, no network."""
    env = {
        **os.environ,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        # Asking the driver for devices would initialize CUDA, and the zygote could not fork any more.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(folder / "tmp"),
    }
    (folder / "tmp").mkdir(exist_ok=True)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # In a container the driver's list of devices may be missing, from which `finetune run` chooses.
        env.setdefault("CUDA_VISIBLE_DEVICES", "0")
    return env


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python measure.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="device to measure (default: gpu)")
    parser.add_argument("--tiny", action="store_true", help="use tiny models: a trial of the kit itself")
    parser.add_argument("--out", default="gpu-kit-results", help="folder for results, profiles and logs")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time for all measurements")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor of all times, for a machine that is busy")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="run only these measurements")
    parser.add_argument("--flops", action="store_true", help="count the arithmetic also with --only")
    parser.add_argument("--list", action="store_true", help="print the names of the measurements, and exit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> int:
    """Run the kit. Return 0 if the device could be used.

    Args:
        arguments: the command line; default: that of this process.
        started: time of the start by the monotonic clock; default: now.
    """
    began = time.monotonic() if started is None else started
    options = _parse(arguments)
    if options.list:
        for each in measurements(has_gpu=options.device != "cpu"):
            print(f"{each.name:45} at least {each.share:3.0f} s, at most {each.most:4.0f} s")
        return 0
    try:
        select(measurements(has_gpu=options.device != "cpu"), options.only)
    except ValueError as error:
        sys.exit(str(error))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    folder = Path(tempfile.mkdtemp(prefix="gpu-kit-"))
    driver = KitDriver(options, folder, began)
    try:
        driver.run()
    finally:
        driver.report()
        shutil.rmtree(folder, ignore_errors=True)
    machine = driver.outcomes.get(MACHINE.name, Outcome(error="not run"))
    return 0 if machine.error is None else 1


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise _Stopped


if __name__ == "__main__":
    sys.exit(main())
