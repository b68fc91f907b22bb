"""A supervisor with real processes, and its coordinator, for all tests of supervisors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrainingSpec
from tests.trainer.supervisor.fake_coordinator import FakeCoordinator, StartSupervisor


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    served = FakeCoordinator()
    thread = threading.Thread(target=served.server.serve_forever, daemon=True)
    thread.start()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def start(tmp_path: Path, coordinator: FakeCoordinator) -> Iterator[StartSupervisor]:
    """Return a function that starts a supervisor whose ranks run the given Python text."""
    spec = RunSpec(
        namespace="default",
        job="circles",
        uid="1f0c3a2b-0000",
        model=ModelSpec(base="base"),
        dataset=DatasetSpec(source="data"),
        training=TrainingSpec(),
        global_batch=2,
    )
    (tmp_path / "run.json").write_text(spec.to_json())
    (tmp_path / "token").write_text("sesame\n")
    started: list[subprocess.Popen[str]] = []

    def run(text: str, ranks: int = 2, **extra: str) -> subprocess.Popen[str]:
        prelude = """
            import os, sys, json, signal, time
            rank = int(os.environ["RANK"])
            def report(**what):
                line = json.dumps({"rank": rank, **what}) + "\\n"
                os.write(int(os.environ["FINETUNE_REPORT_FD"]), line.encode())
        """
        code = textwrap.dedent(prelude) + textwrap.dedent(text)
        env = {
            **os.environ,
            "FINETUNE_RUN_SPEC": str(tmp_path / "run.json"),
            "FINETUNE_ATTEMPT": "3",
            "FINETUNE_POD_NAME": "circles-a3-n0",
            "FINETUNE_POD_UID": "uid-1",
            "FINETUNE_NODE_RANK": "1",
            "FINETUNE_NUM_NODES": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            "FINETUNE_PROCESSES_PER_NODE": str(ranks),
            "FINETUNE_COORDINATOR_URL": coordinator.url,
            "FINETUNE_COORDINATOR_TOKEN": str(tmp_path / "token"),
            "FINETUNE_BEAT_SECONDS": "0.2",
            "FINETUNE_TERMINATION_LOG": str(tmp_path / "termination-log"),
            **extra,
        }
        command = [sys.executable, "-m", "finetune_trainer.supervisor", "--", sys.executable, "-c", code]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
