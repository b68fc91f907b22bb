"""OpenVINO as users reach it: the process of an export pod, and `finetune generate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.outputs.request import ExportResult
from tests.export.conftest import TrainedJob
from tests.export.test_openvino import draw_with_openvino, draw_with_torch

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.openvino,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def pod(trained: TrainedJob, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Run the process of an export pod that writes openvino and merged; return its environment."""
    folder = tmp_path_factory.mktemp("pod")
    outputs = [{"format": each, "to": each} for each in ("openvino", "merged")]
    env = {
        environment.RUN_SPEC: str(trained.run),
        environment.EXPORT: json.dumps({"id": "r1", "outputs": outputs}),
        environment.CHECKPOINT_DIR: str(trained.job_dir),
        environment.CACHE_DIR: str(trained.cache),
        environment.TERMINATION_LOG: str(folder / "termination"),
    }
    command = [sys.executable, "-m", "finetune_trainer.export_pod"]
    subprocess.run(command, env={**os.environ, **env}, check=True)
    return env


def read_result(env: Mapping[str, str]) -> ExportResult:
    """Return the termination message of a pod."""
    return ExportResult.model_validate_json(Path(env[environment.TERMINATION_LOG]).read_text(encoding="utf-8"))


def test_the_export_pod_writes_pictures_of_torch(
    bases: dict[str, Path], trained: TrainedJob, pod: Mapping[str, str]
) -> None:
    from finetune_trainer.export.formats.openvino import psnr, read_comparison  # noqa: PLC0415  slow to import

    result = read_result(pod)
    assert (result.step, result.message, [each.index for each in result.outputs]) == (2, None, [0, 1])
    folder = trained.job_dir / "outputs" / "openvino"
    assert result.outputs[0].size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert read_comparison(folder).psnr > 60
    expected = draw_with_torch(trained.job_dir / "outputs" / "merged")
    assert psnr(draw_with_openvino(folder), expected) > 60
    assert psnr(draw_with_torch(bases["sd1"]), expected) < 40


def test_the_next_pod_repeats_nothing(trained: TrainedJob, pod: Mapping[str, str]) -> None:
    from finetune_trainer import export_pod  # noqa: PLC0415  slow to import

    def times() -> dict[Path, int]:
        found = (trained.job_dir / "outputs").rglob("*")
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    before = times()
    code, result = export_pod.run(pod)
    assert (code, result) == (ExitCode.DONE, read_result(pod))
    assert times() == before


def test_generate_draws_with_openvino_by_path_and_by_job(
    bases: dict[str, Path],
    trained: TrainedJob,
    pod: Mapping[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command, with its process: the output of a job beside its base, then the same picture by its path."""
    from PIL import Image  # noqa: PLC0415  slow to import

    from finetune_operator.api.job import FineTuneJob  # noqa: PLC0415
    from finetune_operator.cli.commands.generate import generate  # noqa: PLC0415
    from finetune_operator.cli.errors import Exit  # noqa: PLC0415
    from finetune_operator.cli.main import parser  # noqa: PLC0415
    from finetune_operator.cluster.local.home import Home  # noqa: PLC0415
    from finetune_operator.cluster.local.jobs import key_of, store_job  # noqa: PLC0415
    from testing.trainer import tiny  # noqa: PLC0415

    written = trained.job_dir / "outputs" / "openvino"
    manifest = tmp_path / "job.yaml"
    tiny.write_manifest(manifest, tiny.make_spec(bases["sd1"], tmp_path))
    document = json.loads(manifest.read_text(encoding="utf-8"))
    outputs = [
        {"format": name, "state": "Written", "to": str(written.with_name(name)), "bytes": 1}
        for name in ("merged", "openvino")
    ]
    job = FineTuneJob.model_validate({**document, "status": {"outputs": outputs}})
    home = Home(tmp_path / "home")
    store_job(home.job(key_of(job)), job)
    common = ["--prompt", "sks", "--steps", "2", "--size", "16"]
    by_job = ["generate", "--home", str(home.path), "--job", "tiny", "--format", "openvino", "--compare", "base"]
    words = [*by_job, *common, "--grid", str(tmp_path / "job.png")]
    assert generate(parser().parse_args(words)) is Exit.SUCCEEDED
    printed = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:3]] == ["base", "OpenVINO"]
    assert all(float(line.split()[-1]) > 0 for line in printed[1:3])
    assert printed[-1] == f"2 pictures of 16 x 16 on OpenVINO CPU: {tmp_path / 'job.png'}"
    by_path = ["generate", "--home", str(home.path), "--model"]
    for name in ("openvino", "merged"):
        words = [*by_path, str(written.with_name(name)), *common, "--grid", str(tmp_path / f"{name}.png")]
        assert generate(parser().parse_args(words)) is Exit.SUCCEEDED
    capfd.readouterr()

    def cell(name: str, column: int) -> numpy.ndarray:
        with Image.open(tmp_path / f"{name}.png") as grid:
            left = 220 + 140 * column
            return numpy.asarray(grid.convert("RGB").crop((left, 32, left + 128, 160))).astype(int)

    assert numpy.array_equal(cell("job", 1), cell("openvino", 0))
    # In fp32, as the base.
    assert numpy.abs(cell("openvino", 0) - cell("merged", 0)).max() <= 2
    assert numpy.abs(cell("job", 0) - cell("merged", 0)).mean() > 8
