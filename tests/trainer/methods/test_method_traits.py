"""The table of method traits (`finetune_contract.methods`) matches the classes that train the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from torch import nn

from finetune_contract.methods import METHODS, MethodTraits, TrainedPart, encodes_text
from finetune_contract.outputs.environments import needs_export_image
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.spec import Method as MethodName
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.registry import METHOD_CLASSES, method_class
from testing.trainer.methods import SETTINGS, export, make_batch, make_method

ROW = "the row of {} in METHODS (trainer/finetune_contract/methods.py)"


class NoCaptions:
    """A data set of images without captions."""

    def __len__(self) -> int:
        return 1

    def captions(self, index: int) -> tuple[str, ...]:
        del index
        return ()

    def repeats(self, index: int) -> int:
        del index
        return 1

    def name(self, index: int) -> str:
        return str(index)

    def open_conditioning(self, index: int) -> IO[bytes]:
        raise NotImplementedError


def training_of(name: str) -> TrainingSpec:
    return TrainingSpec.model_validate(SETTINGS[name])


def traits_of(name: str) -> MethodTraits:
    return METHODS[MethodName(SETTINGS[name]["method"])]


def row_of(name: str) -> str:
    return ROW.format(SETTINGS[name]["method"])


def trained_part(parameters: Mapping[str, nn.Parameter]) -> TrainedPart:
    """Return the part that a method trains, found from the names of its parameters."""
    if any("lora" in name for name in parameters):
        return TrainedPart.ADAPTER
    if any(name.startswith("controlnet") for name in parameters):
        return TrainedPart.CONTROLNET
    return TrainedPart.BASE if any(name.startswith("unet.") for name in parameters) else TrainedPart.TOKENS


@pytest.fixture(params=SETTINGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def method(base: Path, name: str) -> Method:
    return make_method(base, name)


def test_every_method_has_traits_a_class_and_test_settings() -> None:
    tested = {MethodName(settings["method"]) for settings in SETTINGS.values()}
    for method in MethodName:
        assert method in METHODS, f"add {ROW.format(method.value)}"
        assert method in METHOD_CLASSES, f"add the class of {method} to METHOD_CLASSES (methods/registry.py)"
        assert method in tested, f"add settings of {method} to SETTINGS (testing/trainer/methods.py)"


@pytest.mark.parametrize("output", OutputFormat)
def test_formats_are_those_that_the_class_exports(
    method: Method, name: str, output: OutputFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats that need more than the trainer's packages are refused for their lack only."""
    needs_compiler = output is OutputFormat.COMPILED
    if needs_compiler:
        # Compiling takes most of a minute; test_compiled.py does it.
        monkeypatch.setenv("PATH", "")
    needs_more = needs_compiler or needs_export_image(OutputSpec(format=output, to="."))
    if needs_more and output in traits_of(name).formats:
        with pytest.raises(ConfigError, match=r"needs (the packages|a C\+\+ compiler)"):
            export(method, output, tmp_path)
    elif output in traits_of(name).formats:
        assert export(method, output, tmp_path), f"correct formats in {row_of(name)}"
    else:
        with pytest.raises(ConfigError, match="cannot be written as"):
            export(method, output, tmp_path)


def test_captions_are_needed_if_the_class_uses_only_the_data_sets_own(name: str) -> None:
    training = training_of(name)
    captions = method_class(training.method).captions(training)
    caption = captions.caption(NoCaptions(), SampleRef(0, 0), Draws(0))
    assert traits_of(name).needs_captions == (caption == ""), f"correct needs_captions in {row_of(name)}"


def test_conditioning_is_needed_if_the_class_cannot_train_without_it(method: Method, name: str) -> None:
    batch = replace(make_batch("sd1", caption="a <cat>"), conditioning=None)
    if traits_of(name).needs_conditioning:
        with pytest.raises(AssertionError):
            method.losses(batch)
    else:
        assert method.losses(batch).shape == (3,), f"correct needs_conditioning in {row_of(name)}"


def test_shardable_methods_have_modules_to_shard(method: Method, name: str) -> None:
    assert traits_of(name).shardable == bool(method.sharded_modules()), f"correct shardable in {row_of(name)}"


def test_text_is_encoded_in_every_step_if_the_class_loads_text_encoders(method: Method, name: str) -> None:
    assert encodes_text(training_of(name)) == (method.text is not None), (
        f"correct always_encodes_text or settings in {row_of(name)}"
    )


def test_trained_part_is_found_in_the_parameters(method: Method, name: str) -> None:
    assert traits_of(name).trains is trained_part(method.parameters()), f"correct trains in {row_of(name)}"


def test_settings_are_required_if_the_class_cannot_do_without_them(name: str) -> None:
    training, traits = training_of(name), traits_of(name)
    used = {block for block in TrainingSpec.model_fields if block in _blocks() and getattr(training, block)}
    assert used <= set(traits.settings), f"add {used - set(traits.settings)} to settings in {row_of(name)}"
    assert set(traits.required_settings) <= set(traits.settings)
    for block in traits.settings:
        without = training.model_copy(update={block: None})
        if block in traits.required_settings:
            with pytest.raises(AssertionError):
                method_class(training.method).captions(without)
        else:
            assert method_class(training.method).captions(without), (
                f"add {block} to required_settings in {row_of(name)}"
            )


def test_settings_name_fields_of_the_training_spec() -> None:
    assert _blocks() <= TrainingSpec.model_fields.keys()


def _blocks() -> set[str]:
    return {block for traits in METHODS.values() for block in traits.settings}
