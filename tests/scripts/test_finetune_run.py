"""A job with a script through the `finetune` command: real supervisor, real ranks, a preemption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.protocol import JobKey
from testing.trainer.scripts import PROGRAMS

FINETUNE = str(Path(sys.executable).parent / "finetune")
PATIENCE_SECONDS = 280.0


def _manifest(folder: Path, **spec: Any) -> Path:
    document = {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "script"},
        "spec": {
            "model": {"base": "owner/base"},
            "dataset": {"source": "owner/data"},
            "training": {
                "script": {
                    "path": str(PROGRAMS / "train_style.py"),
                    "args": {"max_train_steps": 40, "seed": 1, "num_samples": 24, "output_dir": "style"},
                }
            },
            "topology": {"accelerator": "cpu", "nodes": 1, "processesPerNode": 2},
            "checkpoint": {"interval": {"steps": 10}},
            "outputs": [{"format": "asWritten", "to": "out"}],
            **spec,
        },
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _run(manifest: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FINETUNE, "run", str(manifest), *arguments, "--home", str(home)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        cwd=manifest.parent,
    )


@pytest.mark.trainer
def test_a_job_with_a_script_survives_a_preemption(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    result = _run(manifest, tmp_path / "state", "--preempt", "rank=1,at-step=15")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "40/40 steps, 1 restart (1 preemption, 0 failures), 0 steps lost" in result.stdout
    folder = Home(tmp_path / "state").job(JobKey("default", "script"))
    status = json.loads(folder.job.read_text(encoding="utf-8"))["status"]
    assert (status["step"], status["totalSteps"]) == (40, 40)
    assert status["attempts"][1]["fromStep"] == status["attempts"][0]["toStep"]
    assert status["lastCheckpoint"]["step"] == 40
    assert status["outputs"][0]["format"] == "asWritten"
    assert (tmp_path / "out" / "model.pt").is_file()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"path": "/no/such/train.py"}, "spec.training.script.path: /no/such/train.py does not exist"),
        ({"path": "train_no_such_example.py"}, "FINETUNE_DIFFUSERS_EXAMPLES names no folder with an example"),
        ({"configMap": {"name": "mine"}}, "spec.training.script.configMap: a local run has no ConfigMaps"),
    ],
)
def test_a_script_that_cannot_run_is_refused(script: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = _run(_manifest(tmp_path, training={"script": script}), tmp_path / "state")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
