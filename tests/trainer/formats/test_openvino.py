"""Outputs for OpenVINO, as far as it does not have to be installed; tests/export runs the conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from finetune_contract.outputs.environments import needs_export_image
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.requirements import find_missing_export
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats import openvino
from finetune_trainer.export.formats.openvino import Comparison, check, psnr
from testing.trainer.methods import export, make_method

pytestmark = pytest.mark.trainer


def output(**settings: object) -> OutputSpec:
    return OutputSpec.model_validate({"format": "openvino", "to": ".", **settings})


def compared(ratio: float, quantization: str | None = None) -> Comparison:
    limit = openvino.MIN_PSNR if quantization is None else openvino.MIN_PSNR_INT8
    return Comparison(ratio, limit, "a photo", 0, 4, 512, 512, quantization)


def test_the_ratio_is_that_of_the_mean_square_of_the_difference() -> None:
    black = numpy.zeros((2, 2, 3), numpy.float32)
    assert psnr(black, black) == 100
    assert psnr(black, black + 1) == 0
    assert psnr(black, black + 0.1) == pytest.approx(20)
    assert psnr(black, numpy.where(numpy.arange(3) == 0, black + 0.1, black)) == pytest.approx(24.77, abs=0.01)
    assert psnr(black, black + numpy.nan) == 0


@pytest.mark.parametrize(
    ("comparison", "remedy"),
    [
        (compared(29.9), "write precision: fp32 for this output, or format: diffusers"),
        (compared(14.9, "int8"), "leave quantization out"),
        (compared(0), "format: diffusers"),
    ],
)
def test_a_ratio_below_the_limit_is_an_error_with_a_remedy(comparison: Comparison, remedy: str) -> None:
    with pytest.raises(
        ConfigError, match=f"PSNR of {comparison.psnr:.1f} dB .* at least {comparison.limit:g} dB.*{remedy}"
    ):
        check(comparison)


@pytest.mark.parametrize("comparison", [compared(30), compared(15, "int8")])
def test_a_ratio_at_the_limit_is_accepted(comparison: Comparison) -> None:
    check(comparison)


def has(*missing: str) -> Callable[[str], bool]:
    return lambda name: name not in missing


@pytest.mark.parametrize(
    ("wanted", "missing", "message"),
    [
        (output(), "openvino", "outputs[0].format: openvino needs the packages openvino and optimum-intel"),
        (output(), "optimum.intel", "outputs[0].format: openvino needs the packages openvino and optimum-intel"),
        (output(), "nncf", None),
        (output(quantization="int8"), "nncf", "outputs[0].quantization: int8 needs the package nncf"),
        (output(format="diffusers"), "openvino", None),
    ],
)
def test_missing_packages_are_named_with_the_extra_that_has_them(
    wanted: OutputSpec, missing: str, message: str | None
) -> None:
    found = list(find_missing_export([wanted], has(missing)))
    assert [each[: len(message or "")] for each in found] == ([message] if message else [])
    assert all("install finetune-operator[trainer,export]" in each for each in found)


@pytest.mark.skipif(not list(find_missing_export([output()])), reason="OpenVINO is installed here")
def test_without_the_packages_nothing_is_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^outputs: openvino needs the packages openvino and optimum-intel"):
        export(make_method(base, "Full"), output(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_openvino_needs_the_export_image() -> None:
    assert {each for each in OutputFormat if needs_export_image(output(format=each))} == {OutputFormat.OPENVINO}


@pytest.mark.parametrize("settings", [{"strength": 0.5}, {"adapters": [{"source": "me/lora"}]}])
def test_the_output_of_a_script_without_a_lora_has_no_strength(
    base: Path, settings: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="strength and adapters are for a LoRA"):
        export(make_method(base, "Full"), output(**settings), tmp_path)
