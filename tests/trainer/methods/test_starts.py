"""LoRAs and textual inversions that start from a file: those of diffusers, of kohya's scripts and of the web UIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_contract.outputs.spec import OutputFormat
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.adapter_file import find_adapter_file, read_adapters
from finetune_trainer.methods.lora import WEIGHTS_NAME
from finetune_trainer.methods.method import Method
from finetune_trainer.models.layouts.trained import TrainedAdapter
from testing.trainer.methods import export, make_batch, make_method

pytestmark = pytest.mark.trainer


def trained(method: Method, seed: int = 0) -> Method:
    """Give the trained weights random values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in method.parameters().items():
            if "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    method.set_training(False)
    return method


def losses(method: Method, family: str) -> Tensor:
    method.set_training(False)
    with torch.no_grad():
        return method.losses(make_batch(family))


def lora(**settings: Any) -> dict[str, Any]:
    return {"method": "LoRA", "lora": {"rank": 2, **settings}}


@pytest.mark.parametrize("output_format", [OutputFormat.DIFFUSERS, OutputFormat.KOHYA])
@pytest.mark.parametrize(("family", "dora"), [("sd1", False), ("sd1", True), ("sdxl", False)])
def test_lora_continues_from_its_own_file(
    bases: dict[str, Path], tmp_path: Path, family: str, output_format: OutputFormat, dora: bool
) -> None:
    """The alpha of the file applies, whatever the alpha of the run is."""
    before = trained(make_method(bases[family], "LoRA", **lora(alpha=6, useDora=dora, trainTextEncoder=True)))
    (path,) = export(before, output_format, tmp_path)
    settings = lora(alpha=3, useDora=dora, trainTextEncoder=True, base=str(path))
    after = make_method(bases[family], "LoRA", **settings)
    torch.testing.assert_close(losses(after, family), losses(before, family), rtol=1e-5, atol=1e-6)
    plain = make_method(bases[family], "LoRA", **lora(useDora=dora, trainTextEncoder=True))
    assert not torch.allclose(losses(plain, family), losses(before, family), rtol=1e-3)


def test_names_of_older_releases_are_read(base: Path, tmp_path: Path) -> None:
    before = trained(make_method(base, "LoRA", **lora()))
    (path,) = export(before, OutputFormat.DIFFUSERS, tmp_path)
    renamed = {}
    for name, value in load_file(path).items():
        old = name.replace(".to_out.0.lora_", ".processor.to_out_lora.").replace(".lora_", "_lora.")
        old = old.replace(".to_q_", ".processor.to_q_").replace(".to_k_", ".processor.to_k_")
        renamed[old.replace(".A.", ".down.").replace(".B.", ".up.")] = value
    assert any(".processor.to_out_lora.down.weight" in name for name in renamed)
    save_file(renamed, tmp_path / "old.safetensors")
    after = make_method(base, "LoRA", **lora(base=str(tmp_path / "old.safetensors")))
    torch.testing.assert_close(losses(after, "sd1"), losses(before, "sd1"), rtol=1e-5, atol=1e-6)


def test_alpha_in_metadata_applies(base: Path, tmp_path: Path) -> None:
    """Newer releases of diffusers write the configuration of peft into the metadata."""
    before = trained(make_method(base, "LoRA", **lora(alpha=8)))
    with before.trained() as written:
        assert isinstance(written, TrainedAdapter)
        tensors = {
            f"{name}.lora_{kind}.weight": value.read()
            for name, layer in written.layers.items()
            for kind, value in (("A", layer.down), ("B", layer.up))
        }
    metadata = {"format": "pt", "lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 2}'}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    after = make_method(base, "LoRA", **lora(base=str(tmp_path / "a.safetensors")))
    torch.testing.assert_close(losses(after, "sd1"), losses(before, "sd1"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("written", "settings", "message"),
    [
        (lora(rank=3), lora(), "has rank 3, and training.lora.rank is 2; write rank: 3"),
        (lora(useDora=True), lora(), "has the magnitudes of DoRA; write useDora: true"),
        (lora(), lora(useDora=True), "lacks the magnitudes of DoRA; write useDora: false"),
        (
            lora(trainTextEncoder=True),
            lora(),
            "also has adapters for the text encoder .*write .*trainTextEncoder: true",
        ),
        (
            lora(targetModules=["to_q", "ff.net.2", "proj_in"]),
            lora(targetModules=["to_q"]),
            "leaves out .*; add net.2, proj_in to targetModules",
        ),
    ],
)
def test_lora_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, written: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    (path,) = export(make_method(base, "LoRA", **written), OutputFormat.KOHYA, tmp_path)
    settings["lora"] = {**settings["lora"], "base": str(path)}
    with pytest.raises(ConfigError, match=f"training.lora.base: {path} .*{message}"):
        make_method(base, "LoRA", **settings)


def test_lora_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (path,) = export(make_method(bases["sdxl"], "LoRA", **lora()), OutputFormat.DIFFUSERS, tmp_path)
    with pytest.raises(ConfigError, match="write a LoRA of the same kind of base"):
        make_method(bases["sd1"], "LoRA", **lora(base=str(path)))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"contains unet.conv_in.weight, which is not a part of a LoRA"):
        read_adapters(tmp_path / "model.safetensors")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match="is not a complete LoRA: lora_unet_a lacks one of its matrices"):
        read_adapters(tmp_path / "half.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"cannot be read: .*; write a complete .safetensors file"):
        read_adapters(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"contains 3 .safetensors files \(cut.safetensors, half.safe"):
        find_adapter_file(tmp_path, WEIGHTS_NAME)


INVERSION = {"placeholderToken": "<cat>", "initializerToken": "a", "numVectors": 2}


def inversion(**settings: Any) -> dict[str, Any]:
    return {"method": "TextualInversion", "textualInversion": {**INVERSION, **settings}}


@pytest.mark.parametrize("output_format", [OutputFormat.DIFFUSERS, OutputFormat.WEBUI])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inversion_continues_from_its_own_files(
    bases: dict[str, Path], tmp_path: Path, family: str, output_format: OutputFormat
) -> None:
    before = trained(make_method(bases[family], "TextualInversion"))
    export(before, output_format, tmp_path)
    after = make_method(bases[family], "TextualInversion", **inversion(base=str(tmp_path), initializerToken=None))
    for name, value in before.parameters().items():
        assert torch.equal(after.parameters()[name], value)


@pytest.mark.parametrize(
    "content",
    [
        {"<other>": torch.arange(32.0).view(2, 16)},
        {"string_to_param": {"*": torch.nn.Parameter(torch.arange(32.0).view(2, 16))}, "name": "cat", "step": 100},
    ],
    ids=["diffusers", "web UI"],
)
def test_pickled_embeddings_are_read_as_weights_only(base: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "cat.bin")
    method = make_method(base, "TextualInversion", **inversion(base=str(tmp_path / "cat.bin")))
    assert torch.equal(method.parameters()["text_encoder"], torch.arange(32.0).view(2, 16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<cat>": torch.zeros(16)}, "has 1 vectors, and numVectors is 2; write numVectors: 1"),
        ({"<cat>": torch.zeros(2, 8)}, "has no vectors of width 16 for the base's text_encoder .it has 8."),
        ({"<cat>": torch.zeros(2, 16), "x": torch.zeros(1, 1, 1)}, "is not an embedding file"),
        ({"<cat>": Path("x")}, "contains more than weights, which can run code when it is read"),
    ],
)
def test_embedding_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    torch.save(content, tmp_path / "cat.bin")
    with pytest.raises(ConfigError, match=f"training.textualInversion.base: .*{message}"):
        make_method(base, "TextualInversion", **inversion(base=str(tmp_path / "cat.bin")))


def test_embedding_of_one_text_encoder_is_refused_for_two(bases: dict[str, Path], tmp_path: Path) -> None:
    save_file({"<cat>": torch.zeros(2, 16)}, tmp_path / "cat.safetensors")
    with pytest.raises(ConfigError, match=r"for the base's text_encoder_2 .*; write the folder with the files of all"):
        make_method(bases["sdxl"], "TextualInversion", **inversion(base=str(tmp_path / "cat.safetensors")))
