"""Defaults that depend on the method, and settings that would have no effect on a base or a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.methods import METHODS, crops_at_centre, peak_learning_rate, with_defaults
from finetune_contract.spec import LearnableProperty, Method, TrainingSpec
from finetune_contract.validation_spec import TimestepBiasSpec
from finetune_trainer.data.captions import TEMPLATES
from finetune_trainer.data.sampling.noising import find_bias_fault, timestep_weights
from finetune_trainer.data.sampling.schedule_checks import check_length, check_schedule
from finetune_trainer.errors import ConfigError
from finetune_trainer.train.checks import check_spec
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer

SCRIPTS = {
    Method.LORA: (1e-4, False),
    Method.DREAMBOOTH: (5e-6, False),
    Method.DREAMBOOTH_LORA: (1e-4, False),
    Method.TEXTUAL_INVERSION: (1e-4, False),
    Method.FULL: (1e-4, False),
    Method.CONTROLNET: (5e-6, True),
}
"""Learning rate and centre crop that the scripts of diffusers use by default."""


def make(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"method": "LoRA", "steps": 10, **settings})


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_script_for_the_method(method: Method) -> None:
    training = make(method=method.value)
    assert (peak_learning_rate(training), crops_at_centre(training)) == SCRIPTS[method]
    assert (with_defaults(training).learning_rate, with_defaults(training).center_crop) == SCRIPTS[method]
    given = make(method=method.value, learningRate=0.5, centerCrop=not SCRIPTS[method][1])
    assert with_defaults(given) == given


def test_prodigy_has_a_factor_of_one_by_default() -> None:
    for method in METHODS:
        assert peak_learning_rate(make(method=method.value, optimizer="prodigy")) == 1
    assert peak_learning_rate(make(optimizer="prodigy", learningRate=0.5)) == 0.5


def test_controlnet_can_be_streamed_without_a_crop_in_the_manifest(tmp_path: Path) -> None:
    spec = tiny.make_spec(tmp_path, tmp_path, method="ControlNet")
    streamed = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"streaming": True})})
    check_spec(streamed)
    training = streamed.training.model_copy(update={"center_crop": False})
    with pytest.raises(ConfigError, match=r"dataset\.streaming: a random crop needs the image again"):
        check_spec(streamed.model_copy(update={"training": training}))


def test_templates_are_as_many_as_in_the_script() -> None:
    assert {kind: len(set(TEMPLATES[kind])) for kind in LearnableProperty} == {
        LearnableProperty.OBJECT: 27,
        LearnableProperty.STYLE: 19,
    }
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


def bias(**settings: Any) -> TimestepBiasSpec:
    return TimestepBiasSpec.model_validate(settings)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"strategy": "range", "begin": 1000, "end": 1200}, "training.timestepBias.begin: the base has the"),
        ({"strategy": "range"}, "training.timestepBias: it selects every timestep of the base"),
        ({"strategy": "range", "end": 5000}, "training.timestepBias: it selects every timestep of the base"),
        ({"strategy": "later", "portion": 1}, "training.timestepBias: it selects every timestep of the base"),
        ({"strategy": "earlier", "portion": 0.9999}, "training.timestepBias: it selects every timestep of the base"),
        ({"strategy": "range", "begin": 999}, None),
        ({"strategy": "range", "begin": 900, "end": 2000}, None),
        ({"strategy": "later"}, None),
        ({"strategy": "range", "begin": 3000, "end": 4000, "multiplier": 1}, None),
    ],
)
def test_bias_without_effect_is_found(settings: dict[str, Any], fault: str | None) -> None:
    found = find_bias_fault(bias(**settings), 1000)
    assert (found or "").startswith(fault or "")
    assert (found is None) == (fault is None)
    has_effect = len(set(timestep_weights(bias(**settings), 1000))) > 1
    assert has_effect == (fault is None and settings.get("multiplier") != 1)


@pytest.mark.parametrize("remedy", [{"begin": 200, "end": 600}, {"begin": 999}])
def test_remedy_for_a_bias_without_effect_works(remedy: dict[str, int]) -> None:
    assert find_bias_fault(bias(strategy="range", **remedy), 1000) is None


def test_a_run_that_an_older_version_accepted_continues_with_a_warning() -> None:
    warnings: list[str] = []
    training = make(timestepBias={"strategy": "range", "begin": 1000, "end": 1200})
    with pytest.raises(ConfigError, match="write a number below 1000"):
        check_schedule(training, 1000, 1, warnings.append)
    assert warnings == []
    check_schedule(training, 1000, 2, warnings.append)
    assert [warning.partition(":")[0] for warning in warnings] == ["training.timestepBias.begin"]


def test_range_that_ends_after_the_schedule_is_reported() -> None:
    warnings: list[str] = []
    check_schedule(make(timestepBias={"strategy": "range", "begin": 400}), 500, 1, warnings.append)
    (warning,) = warnings
    assert warning.startswith("training.timestepBias.end: the last timestep of the base is 499; the range ends there")


@pytest.mark.parametrize(("cycles", "warned"), [(None, True), (1, True), (2, False)])
def test_restarts_without_a_second_cycle_are_reported(cycles: int | None, warned: bool) -> None:
    warnings: list[str] = []
    settings = {} if cycles is None else {"lrNumCycles": cycles}
    check_schedule(make(lrScheduler="cosine_with_restarts", **settings), 1000, 1, warnings.append)
    assert [warning.partition(":")[0] for warning in warnings] == (["training.lrNumCycles"] if warned else [])


def test_warm_up_is_compared_with_the_steps_of_the_epochs() -> None:
    warnings: list[str] = []
    training = make(steps=None, epochs=2, lrScheduler="linear", lrWarmupSteps=14)
    check_length(training, 15, 1, warnings.append)
    for attempt in (1, 2):
        if attempt == 1:
            with pytest.raises(ConfigError, match=r"lrWarmupSteps: 14 steps leave no step .* is 14 steps; write"):
                check_length(training, 14, attempt, warnings.append)
            assert warnings == []
        else:
            check_length(training, 14, attempt, warnings.append)
            assert len(warnings) == 1
    check_length(make(), 1, 1, warnings.append)


def test_run_with_too_long_a_warm_up_ends_before_anything_is_encoded(base: Path, data: Path, tmp_path: Path) -> None:
    """Seven samples, a global batch of four, two epochs: four steps."""
    settings = {"steps": None, "epochs": 2, "lrScheduler": "linear", "lrWarmupSteps": 4}
    ranks = Ranks(tiny.make_spec(base, data, **settings), tmp_path / "job")
    assert ranks.run() == [ExitCode.CONFIG]
    assert "epochs: 2 of this data set is 4 steps; write a number below 4" in ranks.stderr()
    assert not list((tmp_path / "cache").glob("latents*"))
