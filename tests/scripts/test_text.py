"""What the launcher reads from the text of a script, and the command line that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_trainer.script import arguments
from finetune_trainer.script.source import ScriptFacts, read_facts

FACTS = ScriptFacts(
    flags={"output_dir": "model", "seed": None, "resume_from_checkpoint": None, "max_train_steps": None}
)


@pytest.mark.parametrize(
    ("args", "argv"),
    [
        (["--a", "1"], ["--a", "1"]),
        ({"steps": 5, "rate": 1e-4}, ["--steps", "5", "--rate", "0.0001"]),
        ({"steps": 1e6}, ["--steps", "1000000"]),
        ({"weight": 1.0, "half": 0.5, "none": 0.0}, ["--weight", "1", "--half", "0.5", "--none", "0.0"]),
        ({"on": True, "off": False, "empty": None, "next": "x"}, ["--on", "--next", "x"]),
        ({"prompts": ["a dog", "a cat"]}, ["--prompts", "a dog", "a cat"]),
    ],
)
def test_arguments_become_a_command_line(args: Any, argv: list[str]) -> None:
    assert arguments.to_argv(args) == argv


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--seed", "1"], "1"),
        (["--seed=1"], "1"),
        (["--seed", "1", "--seed", "2"], "2"),
        (["--seed"], ""),
        (["--seed", "--other", "3"], ""),
        (["--seeds", "1"], None),
        (["--resume-from-checkpoint", "x"], None),
    ],
)
def test_the_last_value_of_a_flag_counts(argv: list[str], value: str | None) -> None:
    assert arguments.find_flag(argv, "seed") == value


def test_dashes_and_underscores_name_the_same_flag() -> None:
    assert arguments.find_flag(["--output-dir", "x"], "output_dir") == "x"
    assert arguments.without_flag(["--output-dir", "x", "--a", "--output_dir=y", "b"], "output_dir") == ["--a", "b"]


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        ([], "/job/script"),
        (["--output_dir", "lora"], "/job/script/lora"),
        (["--output_dir=/data/lora"], "/data/lora"),
    ],
)
def test_the_output_folder_is_on_the_storage(argv: list[str], folder: str) -> None:
    assert arguments.place_output(argv, FACTS, Path("/job/script")) == (["--output_dir", folder], Path(folder))


def test_a_script_without_the_flag_gets_no_output_folder() -> None:
    assert arguments.place_output(["--a"], ScriptFacts(), Path("/job/script")) == (["--a"], Path("/job/script"))


@pytest.mark.parametrize(
    ("argv", "flag", "found", "expected"),
    [
        ([], None, None, []),
        ([], None, "/o/checkpoint-5", ["--resume_from_checkpoint", "/o/checkpoint-5"]),
        (["--resume_from_checkpoint", "latest"], None, None, []),
        (["--resume_from_checkpoint=latest"], None, "/o/checkpoint-5", ["--resume_from_checkpoint", "/o/checkpoint-5"]),
        (["--resume_from_checkpoint", "checkpoint-3"], None, None, ["--resume_from_checkpoint", "checkpoint-3"]),
        ([], "load", "/o/checkpoint-5", ["--load", "/o/checkpoint-5"]),
    ],
)  # fmt: skip
def test_the_newest_verified_checkpoint_is_resumed(
    argv: list[str], flag: str | None, found: str | None, expected: list[str]
) -> None:
    assert arguments.place_resume(argv, FACTS, flag, Path(found) if found else None) == expected


def test_a_script_without_the_flag_resumes_nothing() -> None:
    assert arguments.place_resume(["--a"], ScriptFacts(), None, Path("/o/checkpoint-5")) == ["--a"]


def test_a_seed_is_given_only_if_the_script_draws_without_one() -> None:
    assert arguments.place_seed([], FACTS, 7) == ["--seed", "7"]
    assert arguments.place_seed(["--seed", "1"], FACTS, 7) == ["--seed", "1"]
    assert arguments.place_seed([], ScriptFacts(flags={"seed": 42}), 7) == []
    assert arguments.place_seed([], ScriptFacts(), 7) == []


def test_the_base_and_the_data_set_of_the_job_fill_the_flags(tmp_path: Path) -> None:
    facts = ScriptFacts(flags=dict.fromkeys(("pretrained_model_name_or_path", "dataset_name", "train_data_dir")))
    model = ModelSpec(base="owner/base", variant="fp16")
    hub, folder = DatasetSpec(source="owner/data"), DatasetSpec(source=str(tmp_path))
    base = ["--pretrained_model_name_or_path", "owner/base"]
    assert arguments.place_inputs([], facts, model, hub) == [*base, "--dataset_name", "owner/data"]
    assert arguments.place_inputs([], facts, model, folder) == [*base, "--train_data_dir", str(tmp_path)]
    given = ["--pretrained_model_name_or_path", "mine", "--dataset_name", "other"]
    assert arguments.place_inputs(given, facts, model, folder) == given


@pytest.mark.parametrize(
    ("argv", "flags", "steps"),
    [
        (["--max_train_steps", "7"], {}, 7),
        ([], {"max_train_steps": 9}, 9),
        ([], {"max_train_steps": None}, None),
        (["--num_train_epochs", "2"], {}, None),
    ],
)
def test_the_flags_name_the_total_steps(argv: list[str], flags: dict[str, Any], steps: int | None) -> None:
    assert arguments.total_steps(argv, ScriptFacts(flags=flags)) == steps


def test_the_facts_of_a_script() -> None:
    facts = read_facts(
        "from accelerate import Accelerator\n"
        "parser.add_argument('-o', '--output_dir', default='x')\n"
        "parser.add_argument('--max-train-steps', type=int)\n"
        "if accelerator.is_main_process or accelerator.distributed_type == DEEPSPEED:\n"
        "    accelerator.save_state(f'{args.output_dir}/checkpoint-{step}')\n"
    )
    assert facts == ScriptFacts(
        flags={"output_dir": "x", "max_train_steps": None},
        save_guard="accelerator.is_main_process or accelerator.distributed_type == DEEPSPEED",
    )


def test_the_facts_of_a_script_in_the_style_of_accelerate() -> None:
    facts = read_facts(
        "import accelerate.utils\n"
        "for step, batch in enumerate(loader):\n"
        "    if epoch == first and step < resume_step:\n"
        "        continue\n"
        "    accelerator.save_state(f'step_{step}')\n"
    )
    assert (facts.saves_on_all_ranks, facts.skips_by_step, facts.checkpoint_prefix) == (True, True, "step_")


def test_the_guard_of_a_save_names_kinds_of_distribution() -> None:
    text = (
        "if accelerator.sync_gradients:\n"
        "    if accelerator.is_main_process or accelerator.distributed_type == DistributedType.DEEPSPEED:\n"
        "        accelerator.save_state(path)\n"
    )
    facts = read_facts(text)
    assert not facts.saves_on_all_ranks
    assert "DEEPSPEED" in facts.save_guard
    assert "FSDP" not in facts.save_guard


def test_a_script_that_cannot_be_parsed_has_default_facts() -> None:
    assert read_facts("def (") == ScriptFacts()


def test_a_script_without_accelerate() -> None:
    assert not read_facts("import torch\n").uses_accelerate
