"""`finetune convert`: manifests for command lines, and what became of each flag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.validate import parse_job
from finetune_operator.cli.commands.convert import parse_line, to_script
from finetune_operator.cli.commands.convert_recipe import SCRIPTS, to_recipe
from finetune_operator.cli.errors import UsageError

FINETUNE = str(Path(sys.executable).parent / "finetune")
LINE = (
    "HF_HUB_OFFLINE=1 accelerate launch --num_processes 8 --num_machines=2 --multi_gpu --main_process_port 1 "
    "train_controlnet_sdxl.py --pretrained_model_name_or_path=owner/base --dataset_name owner/data "
    "--output_dir=/big/model --learning_rate=1e-5 --max_train_steps 100 --gradient_checkpointing "
    "--validation_prompt 'a dog' 'a cat' --resume_from_checkpoint latest --hub_token secret"
)


def _script(text: str) -> tuple[dict[str, Any], str]:
    document, report = to_script(parse_line(text))
    document["metadata"] = {"name": "x"}
    parse_job(document)
    return document["spec"], "\n".join(report)


def test_the_config_of_the_launcher_becomes_a_field(tmp_path: Path) -> None:
    config = tmp_path / "fsdp.yaml"
    config.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nnum_processes: 8\n", encoding="utf-8")
    spec, report = _script(f"accelerate launch --config_file {config} train.py")
    assert spec["training"]["script"]["accelerateConfig"] == {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
    }
    assert "--config_file: spec.training.script.accelerateConfig" in report
    spec, _ = _script("accelerate launch --use_fsdp --fsdp_version 2 train.py")
    assert spec["training"]["script"]["accelerateConfig"] == {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
    }
    with pytest.raises(UsageError, match="write the path of the file"):
        _script("accelerate launch --config_file /no/such.yaml train.py")


def test_a_command_line_becomes_a_job_with_a_script() -> None:
    spec, report = _script(LINE)
    assert spec == {
        "model": {"base": "owner/base"},
        "dataset": {"source": "owner/data"},
        "training": {
            "script": {
                "path": "train_controlnet_sdxl.py",
                "args": {
                    "output_dir": "model",
                    "learning_rate": "1e-5",
                    "max_train_steps": 100,
                    "gradient_checkpointing": True,
                    "validation_prompt": ["a dog", "a cat"],
                },
                "env": {"HF_HUB_OFFLINE": "1"},
            }
        },
        "topology": {"nodes": 2, "processesPerNode": 4},
        "checkpoint": {"storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}}},
        "outputs": [{"format": "asWritten", "to": "model"}],
    }
    for flag in ("pretrained_model_name_or_path", "dataset_name", "output_dir", "learning_rate", "hub_token"):
        assert f"--{flag}: " in report
    assert "--main_process_port: left out" in report
    assert "secret" not in str(spec)


@pytest.mark.parametrize(
    ("line", "path", "topology"),
    [
        ("python /work/train.py --a 1", "/work/train.py", {}),
        ("torchrun --nnodes 2 --nproc-per-node=3 train.py", "train.py", {"nodes": 2, "processesPerNode": 3}),
        (
            "accelerate launch --cpu --num_processes=2 train.py",
            "train.py",
            {"processesPerNode": 2, "accelerator": "cpu"},
        ),
        ("./scripts/train.py", "./scripts/train.py", {}),
        ("accelerate launch \\\n  train.py \\\n  --seed 1", "train.py", {}),
    ],
)
def test_launchers(line: str, path: str, topology: dict[str, Any]) -> None:
    spec, _ = _script(line)
    assert spec["training"]["script"]["path"] == path
    assert spec["topology"] == topology


def test_arguments_that_are_not_flags_stay_a_list() -> None:
    spec, _ = _script("python train.py config.yaml --seed 1")
    assert spec["training"]["script"]["args"] == ["config.yaml", "--seed", "1"]


@pytest.mark.parametrize("line", ["accelerate launch", "ls train", "sh x.py", "python 'x.py"])
def test_a_line_without_a_script_is_refused(line: str) -> None:
    with pytest.raises(UsageError):
        parse_line(line)


def test_a_recipe_of_the_operator() -> None:
    line = parse_line(
        f"{LINE} --use_8bit_adam --mixed_precision=no --conditioning_image_column=edges --report_to tensorboard "
        "--allow_tf32 --unknown_flag 3 --validation_image a.png b.png"
    )
    document, report = to_recipe(line.script, line.args, {"nodes": 2})
    document["metadata"] = {"name": "x"}
    training = parse_job(document).spec.training
    assert document["spec"]["training"] == {
        "method": "ControlNet",
        "learningRate": 1e-5,
        "steps": 100,
        "gradientCheckpointing": True,
        "validation": {"prompts": ["a dog", "a cat"], "images": ["a.png", "b.png"]},
        "optimizer": "adamw8bit",
        "precision": "fp32",
        "trackers": ["tensorboard"],
    }
    assert training.learning_rate == 1e-5
    assert document["spec"]["dataset"] == {"source": "owner/data", "columns": {"conditioning": "edges"}}
    text = "\n".join(report)
    assert "--allow_tf32: left out; write spec.training.precision" in text
    assert "--unknown_flag: left out; no field replaces it" in text
    assert "--resume_from_checkpoint: left out" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_known_script_has_a_recipe(script: str) -> None:
    document, _ = to_recipe(f"{script}.py", {"max_train_steps": 5}, {})
    assert document["spec"]["training"] == {"method": SCRIPTS[script].value, "steps": 5}


def test_a_script_without_a_method_has_no_recipe() -> None:
    with pytest.raises(UsageError, match="leave --recipe out"):
        to_recipe("train_dreambooth_lora_flux.py", {}, {})


def test_variables_of_the_shell_are_replaced() -> None:
    lines = """
    # From a README.
    export MODEL="owner/base" OUT=trained
    export DATA="$MODEL-data"
    export HF_HUB_OFFLINE=1 HF_TOKEN=hf_1

    accelerate launch train_controlnet.py --pretrained_model_name_or_path=$MODEL \\
      --dataset_name=${DATA} --output_dir="$OUT" --seed $SEED --title '$5 and $WORD' --report_to=wandb
    """
    line = parse_line(lines, {"SEED": "3"})
    assert line.args == {
        "pretrained_model_name_or_path": "owner/base",
        "dataset_name": "owner/base-data",
        "output_dir": "trained",
        "seed": 3,
        "title": "$5 and $WORD",
        "report_to": "wandb",
    }
    assert line.unknown == ("WORD",)
    document, report = to_script(line)
    assert document["spec"]["training"]["script"]["env"] == {"HF_HUB_OFFLINE": "1"}
    assert "HF_TOKEN: left out; write a Secret with it in spec.secrets" in report
    assert any(each.startswith("--report_to") and "WANDB_API_KEY to spec.secrets" in each for each in report)


def test_the_command_writes_a_manifest_and_a_report(tmp_path: Path) -> None:
    target = tmp_path / "job.yaml"
    result = subprocess.run(
        [FINETUNE, "convert", LINE, "--to", str(target), "--name", "mine"], capture_output=True, text=True, check=True
    )
    document = yaml.safe_load(target.read_text(encoding="utf-8"))
    assert document["metadata"]["name"] == "mine"
    parse_job(document)
    assert "--learning_rate: spec.training.script.args" in result.stderr
