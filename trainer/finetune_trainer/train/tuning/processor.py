"""Chooses number format and library of a run on CPUs by a measurement. Called once by `inputs`.

The measurement is stored in the cache for all jobs, by processor, versions and shapes, and the choice in the job's
folder: later attempts compute in the same way. An image without IPEX, or an attempt on another processor, can continue
every job, because checkpoints hold plain fp32 weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_contract.methods import precision_of
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Precision, SwitchMode
from finetune_trainer.checkpoint.store.select import JobFolders
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.files import write_atomically
from finetune_trainer.intel.extension import FIELD, ipex_version, unavailable_reason
from finetune_trainer.intel.paths import ComputePath, PathFacts, candidates, describe, fastest, ipex_conflict
from finetune_trainer.intel.processor import this_processor
from finetune_trainer.libraries import PATH_FILE
from finetune_trainer.methods.registry import method_class
from finetune_trainer.models.family import Family
from finetune_trainer.report import Reporter
from finetune_trainer.tensor_file import count_numbers
from finetune_trainer.train.tuning.record import KeptChoice

MEASUREMENTS = "processors"
"""Folder in the cache with the measurements."""
PROBE = "finetune_trainer.train.tuning.layer_probe"
TIMEOUT_SECONDS = 300.0
"""Time for the process that measures: nearly all of it is spent on imports."""
_LOG = logging.getLogger(__name__)

Probe = Callable[[str], str]
"""Runs the process that measures: takes its input and returns its output."""


@dataclass(frozen=True)
class ProcessorTuner:
    """Chooses the path of one run on CPUs.

    Attributes:
        spec: the run.
        family: the base model.
        world: the ranks; rank 0 chooses for all.
        folders: the job's folders.
        cache_dir: folder shared by all jobs.
        reporter: receives the choice.
        resumes: whether the job has checkpoints.
    """

    spec: RunSpec
    family: Family
    world: World
    folders: JobFolders
    cache_dir: Path
    reporter: Reporter
    resumes: bool

    def choose(self, probe: Probe | None = None) -> ComputePath:
        """Return the path of the run, the same on all ranks. All ranks call it.

        Args:
            probe: runs the measurement; default: in a process of its own.

        Raises:
            ConfigError: the manifest requires IPEX, and a rank cannot use it.
            StorageError: the choice cannot be stored.
        """
        if self.world.device.type != "cpu":
            return ComputePath(precision_of(self.spec.training))
        facts = self._facts()
        kept = KeptChoice(self.folders, PATH_FILE, self.world)
        if self.spec.cpu.ipex is SwitchMode.ON:
            self._check_required(facts)
        paths = self._without_other_formats(candidates(self.spec.training, self.spec.cpu.ipex, facts), kept)
        if self.world.is_first:
            _LOG.info("processor: %s, %s", facts.processor.name or "unknown", facts.processor.instructions)
            if facts.ipex_missing and self.spec.cpu.ipex is SwitchMode.AUTO:
                _LOG.info("ipex: auto: native torch, because %s", facts.ipex_missing)
        if len(paths) == 1:
            return paths[0]
        chosen = kept.get(lambda: self._measured(paths, facts, probe or run_probe))
        # An earlier attempt may have used an image with IPEX.
        return next((path for path in paths if path.name == chosen), paths[0])

    def _facts(self) -> PathFacts:
        missing = unavailable_reason()
        processor = this_processor()
        return PathFacts(
            processor=self.world.share(processor),
            all_have_bf16=all(self.world.gather_numbers(processor.has_bf16)),
            ipex_missing=self._first_reason(missing),
            num_weights=self.world.share(count_numbers(self.family.denoiser_files()) if self.world.is_first else 0),
            keeps_format=self.resumes,
        )

    def _first_reason(self, missing: str) -> str:
        lacks = self.world.gather_numbers(bool(missing))
        return self.world.share(missing, next(rank for rank, lack in enumerate(lacks) if lack)) if any(lacks) else ""

    def _check_required(self, facts: PathFacts) -> None:
        """Refuse a run that requires IPEX and cannot use it.

        Raises:
            ConfigError: with the reason.
        """
        if facts.ipex_missing:
            raise ConfigError(f"{FIELD}: {facts.ipex_missing}; use the image trainer-cpu-intel, or write ipex: auto")
        if reason := ipex_conflict(self.spec.training, precision_of(self.spec.training), facts):
            raise ConfigError(f"{FIELD}: {reason}, or write ipex: auto")

    def _without_other_formats(self, paths: list[ComputePath], kept: KeptChoice) -> list[ComputePath]:
        """Return the paths in the number format of the first attempt, if the manifest names none."""
        if self.spec.training.precision is not None or not self.resumes:
            return paths
        chosen = str(self.world.share(kept.read() if self.world.is_first else None))
        is_bf16 = chosen.startswith(Precision.BF16.value)
        format_ = Precision.BF16 if is_bf16 else Precision.FP32
        return list(dict.fromkeys(ComputePath(format_, path.uses_ipex) for path in paths))

    def _measured(self, paths: Sequence[ComputePath], facts: PathFacts, probe: Probe) -> str:
        """Return the name of the fastest path by the measurement in the cache, or by a new one."""
        from finetune_trainer.train.tuning import layer_probe  # noqa: PLC0415  the process that measures runs it as main

        self.reporter.detail("measuring the processor")
        is_trained = method_class(self.spec.training.method).trains_denoiser()
        counts = layer_probe.count_layers(self.family, self.spec.training)
        request = layer_probe.make_request(counts, paths, is_trained)
        file = self.cache_dir / MEASUREMENTS / f"{self._key(request, facts)}.json"
        seconds = _read(file)
        if seconds is None and (seconds := parse_measurement(probe(request))):
            # Without the file the next job measures again.
            with contextlib.suppress(OSError):
                write_atomically(file, json.dumps(seconds).encode())
        if not seconds:
            self.reporter.note(f"{paths[0].name}: the processor could not be measured")
            return paths[0].name
        chosen = fastest([path for path in paths if path.name in seconds] or paths, seconds)
        self.reporter.note(describe(chosen, seconds, facts.processor))
        return chosen.name

    @staticmethod
    def _key(request: str, facts: PathFacts) -> str:
        """Return a hash of all that decides the speed: processor, threads, versions and shapes."""
        processor = facts.processor
        machine = (processor.name, processor.instructions, torch.get_num_threads())
        versions = (torch.__version__, ipex_version())
        return hashlib.sha256(repr((machine, versions, request)).encode()).hexdigest()[:32]


def run_probe(request: str) -> str:
    """Run the process that measures, with the cores and threads of this rank. Return nothing if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", PROBE]
    try:
        result = subprocess.run(
            command, input=request, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        _LOG.warning("the processor could not be measured: %s %s", error, str(output)[-500:])
        return ""
    return result.stdout


def _read(file: Path) -> Mapping[str, float] | None:
    try:
        return parse_measurement(file.read_text(encoding="utf-8"))
    except OSError:
        return None


def parse_measurement(output: str) -> Mapping[str, float] | None:
    """Return the measurement in the last line of an output; None if there is none."""
    try:
        values = json.loads(output.strip().splitlines()[-1])
        return {str(name): float(seconds) for name, seconds in values.items()}
    except (ValueError, IndexError, AttributeError, TypeError):
        return None
