"""An accelerate config in the manifest: FSDP on real CPU ranks, and the variables of accelerate's launcher."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.script_spec import ScriptSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.script.accelerate_config import read_environment
from finetune_trainer.script.launch import find_script
from testing.trainer.script_ranks import At, ScriptRanks
from testing.trainer.scripts import script_spec

pytestmark = pytest.mark.trainer


def _fsdp(version: int, kind: str) -> dict[str, Any]:
    """Return a config as `accelerate config` writes it."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": version, "fsdp_state_dict_type": kind},
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 8,
        "use_cpu": False,
    }


def _ranks(folder: Path, config: dict[str, Any] | None, attempt: int = 1, at: tuple[At, ...] = ()) -> ScriptRanks:
    spec = script_spec("train_sharded.py", {}, {"accelerateConfig": config})
    return ScriptRanks(spec, folder, attempt, world_size=2, at=at)


def _weights(ranks: ScriptRanks) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(ranks.job_dir / "script" / "model.pt")
    return state


@pytest.fixture(name="undisturbed", scope="module")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of an undisturbed run. The kind of checkpoints does not change them."""
    ranks = _ranks(tmp_path_factory.mktemp("undisturbed"), _fsdp(1, "FULL_STATE_DICT"))
    assert ranks.run() == [0, 0], ranks.stderr()
    # The main process alone has asked for these, and all ranks have saved them.
    assert ranks.checkpoints[0] in {"checkpoint-4", "checkpoint-5"}
    return _weights(ranks)


@pytest.mark.parametrize(
    ("version", "kind", "model"),
    [(1, "FULL_STATE_DICT", "pytorch_model_fsdp.bin"), (2, "SHARDED_STATE_DICT", "pytorch_model_fsdp_0")],
)
def test_a_divided_model_loses_no_step_on_a_notice(
    version: int, kind: str, model: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = _ranks(tmp_path, _fsdp(version, kind), at=(At("backward", 5, 1, signal.SIGTERM),))
    assert run.run() == [ExitCode.SAVED] * 2, run.stderr()
    assert "distribution: FSDP" in run.stderr()
    assert (run.job_dir / "script" / run.checkpoints[-1] / model).exists()
    again = _ranks(tmp_path, _fsdp(version, kind), attempt=2)
    assert again.run() == [0, 0], again.stderr()
    weights = _weights(again)
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def test_the_variables_are_those_of_the_launcher() -> None:
    found = read_environment(_fsdp(2, "SHARDED_STATE_DICT") | {"mixed_precision": "bf16"}, world_size=2, on_cpu=True)
    assert found["ACCELERATE_USE_FSDP"] == "true"
    assert found["FSDP_VERSION"] == "2"
    assert found["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not {"RANK", "MASTER_PORT", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU"} & found.keys()


def test_deepspeed_needs_its_package_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 1.0}}
    with pytest.raises(ConfigError, match=r"GPUs only; write distributed_type: FSDP"):
        read_environment(config, world_size=2, on_cpu=True)
    with pytest.raises(ConfigError, match=r"not installed; add deepspeed to training.script.requirements"):
        read_environment(config, world_size=2, on_cpu=False)
    # The launcher itself only reads the config.
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    found = read_environment(config, world_size=2, on_cpu=False)
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert found["ACCELERATE_CONFIG_DS_FIELDS"] == "zero_stage,gradient_clipping"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"distributed_type": "NOWHERE"}, "accelerate refuses it"),
        ({"distributed_type": "FSDP", "no_such_key": 1}, "no_such_key"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "must be LOCAL_MACHINE; leave it out"),
    ],
)
def test_a_bad_config_is_an_error_of_the_manifest(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_environment(config, world_size=1, on_cpu=True)


def test_a_step_counts_once_if_its_optimizer_is_wrapped_and_has_several_groups(tmp_path: Path) -> None:
    """ZeRO wraps the optimizer of the script, and steps it once for each group. DeepSpeed is not installed here."""
    script = tmp_path / "zero.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "class Zero(torch.optim.Optimizer):\n"
        "    def __init__(self, optimizer):\n"
        "        super().__init__(optimizer.param_groups, {})\n"
        "        self.optimizer = optimizer\n"
        "    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n"
        "            self.optimizer.param_groups = [group]\n"
        "            self.optimizer.step()\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))\n"
        "groups = [{'params': list(layer.parameters())} for layer in model]\n"
        "accelerator = Accelerator()\n"
        "optimizer = accelerator.prepare(Zero(torch.optim.SGD(groups, lr=0.1)))\n"
        "for _ in range(3):\n"
        "    accelerator.backward(model(torch.ones(1, 2)).sum())\n"
        "    optimizer.step()\n",
        encoding="utf-8",
    )
    run = ScriptRanks(script_spec(script, {}), tmp_path / "run")
    assert run.run() == [0], run.stderr()
    assert run.reports()[-1]["step"] == 3


def test_a_name_is_the_example_and_not_its_copy_in_a_research_project(tmp_path: Path) -> None:
    for folder in ("a_project/deeper/copies", "text_to_image", "research_projects/onnxruntime/text_to_image"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train_text_to_image.py").touch()
    found = find_script(ScriptSpec(path="train_text_to_image.py"), {environment.EXAMPLES: str(tmp_path)})
    assert found == tmp_path / "text_to_image" / "train_text_to_image.py"
    with pytest.raises(ConfigError, match=r"there is no example other\.py below"):
        find_script(ScriptSpec(path="other.py"), {environment.EXAMPLES: str(tmp_path)})
