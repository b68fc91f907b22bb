"""Exports in real processes that are killed at a named point; the next one runs in a new process.

    with killed_exports.start(job_dir, outputs, environment) as exports:
        assert exports.run("export-upload", nth=2) == -signal.SIGKILL      # killed after the second part
        assert exports.run() == 0                                          # completes what is missing

One process imports the trainer; each export is a fork of it, which has opened no client yet. With `start_pods`, each
fork is the process of an export pod:

    with killed_exports.start_pods(environment) as pods:
        assert pods.run_pod(job_dir) == 0
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_BYTES = 5 * 1024 * 1024
"""The smallest part that S3 allows."""
FILES = {"unet/weights.safetensors": 2 * PART_BYTES + 12_345, "model_index.json": 57, "empty.txt": 0}
WRITES = "writes.log"
"""File, next to the job's folder, with a line for each time that the output was written."""


def contents(name: str) -> bytes:
    """Return the bytes of a file of the output, the same in each process."""
    size = FILES[name]
    return hashlib.shake_128(name.encode()).digest(size)


def write_files(folder: Path) -> Iterable[Path]:
    """Write the files of the output into a folder."""
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents(name))
        yield path


@dataclass
class KilledExports:
    """The process that starts exports.

    Attributes:
        process: it.
        job_dir: folder of the job.
        on_start: receives the process id of each export when it starts.
    """

    process: subprocess.Popen[str]
    job_dir: Path
    on_start: Callable[[int], None] = lambda _: None

    def run_pod(self, job_dir: Path) -> int:
        """Run one export pod, and return its exit code.

        Args:
            job_dir: its folder of the job; a new pod of a job with a bucket has an empty one.
        """
        return self.run(str(job_dir))

    def run(self, stage: str = "", nth: int = 1) -> int:
        """Run one export, and return its exit code; negative: the signal that ended it.

        Args:
            stage: point at which it is killed; empty: never.
            nth: at which time that the point is reached.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([stage, nth]) + "\n")
        self.process.stdin.flush()
        self.on_start(int(self.process.stdout.readline()))
        return int(self.process.stdout.readline())

    @property
    def num_writes(self) -> int:
        """How often the files of the output have been written."""
        log = self.job_dir.with_name(WRITES)
        return len(log.read_text().splitlines()) if log.exists() else 0


@contextlib.contextmanager
def start(
    job_dir: Path, outputs: Sequence[Mapping[str, Any]], environment: Mapping[str, str]
) -> Iterator[KilledExports]:
    """Start the process within this block.

    Args:
        job_dir: folder of the job.
        outputs: as in a manifest.
        environment: variables of the clients.
    """
    with _serve([str(job_dir), json.dumps(list(outputs))], environment) as process:
        yield KilledExports(process, job_dir)


@contextlib.contextmanager
def start_pods(environment: Mapping[str, str]) -> Iterator[KilledExports]:
    """Start a process within this block whose forks are export pods.

    Args:
        environment: variables of the pods, without the folder of the job.
    """
    with _serve([], environment) as process:
        yield KilledExports(process, Path())


@contextlib.contextmanager
def _serve(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "testing.trainer.killed_exports", *arguments]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _export(job_dir: Path, outputs: Sequence[Mapping[str, Any]], stage: str, nth: int) -> None:
    from finetune_contract.outputs.spec import OutputSpec  # noqa: PLC0415  the parent has imported them
    from finetune_trainer.delivery.open import DeliveryPlace  # noqa: PLC0415
    from finetune_trainer.export.outputs import Export, deliver_outputs  # noqa: PLC0415

    left = nth

    def on_stage(reached: str) -> None:
        nonlocal left
        if reached == stage:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(output: OutputSpec, folder: Path) -> Iterable[Path]:
        with job_dir.with_name(WRITES).open("a") as log:
            log.write(f"{output.format.value}\n")
        return list(write_files(folder))

    # One part at a time, so that no part is on its way at a kill.
    place = DeliveryPlace(job_dir, min_part_bytes=PART_BYTES, num_uploads=1)
    export = Export(place, "1f0c3a2b", "step-00000006-a1", on_stage=on_stage)
    deliver_outputs(write, [OutputSpec.model_validate(each) for each in outputs], export)


_OF_POD = (
    "finetune_trainer.export_pod",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "peft",
)
"""Modules that a pod needs besides those of every export."""


def _run_pod(job_dir: str) -> int:
    from finetune_contract.environment import CHECKPOINT_DIR  # noqa: PLC0415  the parent has imported them
    from finetune_trainer import export_pod  # noqa: PLC0415

    os.environ[CHECKPOINT_DIR] = job_dir
    return export_pod.main()


def main() -> None:
    """Fork an export for each line of the standard input."""
    # Imported once, before the forks. None of them starts a thread.
    are_pods = len(sys.argv) == 1
    names = ["finetune_trainer.export.outputs", "s3fs", "botocore.httpsession", "huggingface_hub.hf_api"]
    for name in [*names, *(_OF_POD if are_pods else ())]:
        importlib.import_module(name)
    for line in sys.stdin:
        stage, nth = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if are_pods:
                    code = _run_pod(stage)
                else:
                    _export(Path(sys.argv[1]), json.loads(sys.argv[2]), stage, nth)
                    code = 0
            except Exception as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            finally:
                os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
