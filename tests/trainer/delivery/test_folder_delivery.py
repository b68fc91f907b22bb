"""Outputs in folders: nobody's files are replaced, and the same job continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import Method
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.delivery.target import ExportStage
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.names import expected_names
from finetune_trainer.export.outputs import Export, check_targets, deliver_outputs

pytestmark = pytest.mark.trainer
LORA = {"README.md": b"card", "finetune-job.json": b"{}", "pytorch_lora_weights.safetensors": b"weights"}
OF_OTHER = "holds an output of another job, default/other, whose files would be replaced; write another folder, or"


class Job:
    """A job that writes an output to a folder next to its own folder."""

    def __init__(self, folder: Path, name: str = "job", namespace: str = "default", **output: Any) -> None:
        self.output = OutputSpec.model_validate({"format": "diffusers", "to": str(folder / "out"), **output})
        self.place = DeliveryPlace(folder / namespace / name, namespace, name)

    def check(self, method: Method | None = Method.LORA) -> None:
        check_targets([self.output], self.place, method)

    def deliver(self, files: Mapping[str, bytes], source: str = "step-1-a1", **export: Any) -> None:
        def write(_: OutputSpec, folder: Path) -> Iterable[Path]:
            for name, content in files.items():
                (folder / name).write_bytes(content)
                yield folder / name

        deliver_outputs(write, [self.output], Export(self.place, "u", source, **export))


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if not path.name.startswith(".")}


def test_files_of_another_job_are_not_replaced(tmp_path: Path) -> None:
    Job(tmp_path, "other").deliver(LORA)
    job = Job(tmp_path)
    with pytest.raises(ConfigError, match=rf"^outputs\[0\]\.to: {tmp_path}/out {OF_OTHER} delete that output$"):
        job.check()
    with pytest.raises(ConfigError, match=OF_OTHER):
        job.deliver(LORA | {"README.md": b"another card"})
    with pytest.raises(ConfigError, match=OF_OTHER):
        # A script: its files are not known yet.
        Job(tmp_path, format="asWritten").check(None)
    assert visible(tmp_path) == LORA
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    job.check()


def test_the_same_job_replaces_its_output_also_when_it_is_created_again(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for source, weights in (("step-1-a1", b"first"), ("step-2-a1", b"second")):
        job.check()
        job.deliver(LORA | {"pytorch_lora_weights.safetensors": weights}, source)
        assert visible(tmp_path)["pytorch_lora_weights.safetensors"] == weights
    again = Job(tmp_path)
    again.check()
    again.deliver(LORA | {"pytorch_lora_weights.safetensors": b"third"}, "step-1-a1")
    assert visible(tmp_path)["pytorch_lora_weights.safetensors"] == b"third"


def test_files_named_after_their_jobs_share_a_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        job = Job(tmp_path, name, format="kohya")
        job.check()
        job.deliver({f"{name}.safetensors": name.encode()})
    assert visible(tmp_path) == {"one.safetensors": b"one", "two.safetensors": b"two"}
    Job(tmp_path, "three").check()
    # In another namespace, a job can have the same name, and then its file has the same name.
    with pytest.raises(ConfigError, match="holds an output of another job, default/two, whose"):
        Job(tmp_path, "two", "team-b", format="kohya").check()


def test_a_damaged_claim_keeps_no_job_from_the_folder(tmp_path: Path) -> None:
    Job(tmp_path, "one", format="kohya").deliver({"one.safetensors": b"one"})
    (tmp_path / "out" / ".default.one.outputs.json").write_text("{")
    (tmp_path / "out" / ".default.gone.outputs.json").symlink_to("nothing")
    job = Job(tmp_path, "two", format="kohya")
    job.check()
    job.deliver({"two.safetensors": b"two"})
    Job(tmp_path, "one", format="kohya").check()


def test_files_of_the_user_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model_index.json").write_text("{}")
    Job(tmp_path).check(Method.LORA)
    with pytest.raises(ConfigError, match=r"outputs\[0\]\.to: .* holds model_index\.json, which this job has not"):
        Job(tmp_path).check(Method.FULL)
    with pytest.raises(ConfigError, match="which this job has not written and which would be replaced; write another"):
        Job(tmp_path).deliver(LORA | {"model_index.json": b"{ }"})
    # Equal files are not replaced.
    Job(tmp_path).deliver(LORA | {"model_index.json": b"{}"}, "step-2-a1")


@pytest.mark.parametrize("author", ["job", "other"])
def test_an_output_of_an_older_release_is_known_by_its_manifest(tmp_path: Path, author: str) -> None:
    (tmp_path / "out").mkdir()
    manifest = {"namespace": "default", "job": author}
    (tmp_path / "out" / "finetune-job.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / "README.md").write_text("card")
    job = Job(tmp_path)
    if author == "other":
        with pytest.raises(ConfigError, match=OF_OTHER):
            job.check()
        return
    job.check()
    job.deliver(LORA)
    assert visible(tmp_path) == LORA


def test_a_job_that_was_killed_between_two_files_continues_with_a_newer_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("of the user")

    def stop(stage: ExportStage) -> None:
        if stage is ExportStage.PUBLISH:
            raise KeyboardInterrupt

    job = Job(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        job.deliver(dict.fromkeys(LORA, b"old"), on_stage=stop)
    assert len(visible(tmp_path)) == 2
    job.check()
    job.deliver(LORA, "step-2-a1")
    assert visible(tmp_path) == LORA | {"notes.txt": b"of the user"}


def test_the_folder_of_the_job_contains_its_files_only(tmp_path: Path) -> None:
    for number, to in enumerate(("lora", "../outputs/other")):
        job = Job(tmp_path, to=to)
        job.deliver(LORA, f"step-{number}-a1")
        job.deliver(LORA | {"README.md": b"changed"}, f"step-{number}-a2")
        job.check()
    folder = tmp_path / "default" / "job" / "outputs"
    assert {path.name for path in (folder / "lora").iterdir()} == set(LORA)
    assert {path.name for path in (folder / "other").iterdir()} == {*LORA, ".default.job.outputs.json"}


def test_names_that_are_known_before_training() -> None:
    def names(method: Method | None = Method.LORA, **output: Any) -> tuple[str, ...]:
        return expected_names(OutputSpec.model_validate({"to": ".", **output}), "job", method)

    card = ("README.md", "finetune-job.json")
    assert names(format="kohya") == ("job.safetensors",)
    assert names(Method.FULL, format="single-file", container="ckpt") == ("job.ckpt",)
    assert names(format="merged", layout="single-file") == ("job.safetensors",)
    assert names(format="merged") == names(format="diffusers", full=True) == (*card, "model_index.json")
    assert names(format="diffusers") == (*card, "pytorch_lora_weights.safetensors")
    assert names(Method.TEXTUAL_INVERSION, format="diffusers") == (*card, "learned_embeds.safetensors")
    assert names(Method.CONTROLNET, format="diffusers") == (*card, "config.json")
    assert names(None, format="asWritten") == names(None, format="diffusers") == ()


@pytest.mark.parametrize("second", ["lora/.", "other/../lora", "{}/outputs/lora", "link"])
def test_two_outputs_in_one_folder_are_refused(tmp_path: Path, second: str) -> None:
    place = DeliveryPlace(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/link").symlink_to(tmp_path / "outputs/lora")
    outputs = [
        OutputSpec.model_validate({"format": name, "to": to.format(tmp_path)})
        for name, to in (("diffusers", "lora"), ("kohya", "kohya"), ("merged", second))
    ]
    check_targets(outputs[:2], place, Method.LORA)
    with pytest.raises(ConfigError, match=r"^outputs\[2\]\.to: .* is the target of outputs\[0\], too, .* different to"):
        check_targets(outputs, place, Method.LORA)
