"""LoRA outputs: merged into the base, with a smaller rank, and with the metadata of kohya's scripts."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from finetune_contract.input_spec import ModelSpec
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.licence import parse_licence
from finetune_trainer.export.formats.merge import read_adapter
from finetune_trainer.export.formats.rank import closest_matrices, reduce_rank
from finetune_trainer.export.formats.write import write_format
from finetune_trainer.methods.method import Method
from finetune_trainer.models.base import open_base
from finetune_trainer.models.layouts.trained import LowRank
from finetune_trainer.weights.lazy import LazyTensor, in_memory
from testing.trainer import tiny
from testing.trainer.methods import export, make_batch, make_method

pytestmark = pytest.mark.trainer
ALL_LAYERS = {"rank": 2, "alpha": 5, "targetModules": ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1"]}


def fill(method: Method, seed: int = 0) -> Method:
    """Give the trained weights random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters().values():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    method.set_training(False)
    return method


def merged(method: Method, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the denoiser of a merged pipeline."""
    folder.mkdir()
    export(method, OutputSpec.model_validate({"format": "merged", "to": ".", **settings}), folder)
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def predict(method: Method, family: str) -> torch.Tensor:
    batch = make_batch(family, 9, 1)
    with torch.no_grad():
        return method.predict(batch.latents, batch.timesteps, batch.text)


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_base_computes_the_same_as_base_and_lora(
    bases: dict[str, Path], family: str, is_dora: bool, tmp_path: Path
) -> None:
    method = fill(make_method(bases[family], "LoRA", lora={**ALL_LAYERS, "useDora": is_dora}))
    merged(method, tmp_path / "out")
    alone = make_method(tmp_path / "out", "Full")
    alone.set_training(False)
    torch.testing.assert_close(predict(alone, family), predict(method, family), rtol=1e-5, atol=1e-5)
    assert (predict(make_method(bases[family], "Full"), family) - predict(alone, family)).abs().max() > 1e-2


def test_strength_further_loras_and_their_weights_add_up(bases: dict[str, Path], tmp_path: Path) -> None:
    """One LoRA at 0.5 and another one, in kohya's names, at -2: the sum of their matrices in fp64."""
    base = bases["sdxl"]
    one, two = (fill(make_method(base, "LoRA", lora=ALL_LAYERS), seed) for seed in (1, 2))
    (tmp_path / "two").mkdir()
    (file,) = export(two, OutputFormat.KOHYA, tmp_path / "two")
    found = merged(one, tmp_path / "out", strength=0.5, adapters=[{"source": str(file), "weight": -2}])
    expected = {
        name: value.double() for name, value in load_file(base / "unet/diffusion_pytorch_model.safetensors").items()
    }
    for method, factor in ((one, 0.5), (two, -2.0)):
        with method.trained() as trained:
            for name, layer in trained.layers.items():  # type: ignore[union-attr]
                key = f"{name.removeprefix('unet.')}.weight"
                product = layer.up.read().double().flatten(1) @ layer.down.read().double().flatten(1)
                expected[key] += factor * 2.5 * product.reshape(expected[key].shape)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)


def test_a_strength_of_zero_writes_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    found = merged(fill(make_method(bases["sd1"], "LoRA, text")), tmp_path / "out", strength=0)
    base = load_file(bases["sd1"] / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in base.items())


def test_a_merged_model_can_be_a_single_file(bases: dict[str, Path], tmp_path: Path) -> None:
    method = fill(make_method(bases["sd1"], "LoRA, text"))
    tensors = merged(method, tmp_path / "out")
    output = OutputSpec.model_validate({"format": "merged", "to": ".", "layout": "single-file", "precision": "fp16"})
    (file,) = export(method, output, tmp_path)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    original = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(load_file(file)[original], tensors[name].half())
    text = load_file(tmp_path / "out/text_encoder/model.safetensors")
    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(load_file(file)[f"cond_stage_model.transformer.{key}"], text[key].half())


def test_a_lora_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (file,) = export(make_method(bases["sdxl"], "LoRA"), OutputFormat.DIFFUSERS, tmp_path)
    with pytest.raises(ConfigError, match=r"outputs\.adapters\[0\]\.source: .*layers that the base lacks"):
        merged(make_method(bases["sd1"], "LoRA"), tmp_path / "out", adapters=[{"source": str(file)}])


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_a_reduced_rank_is_the_closest_matrix(shape: tuple[int, ...]) -> None:
    """The distance is the root of the sum of the squares of the singular values that are left out."""
    torch.manual_seed(0)
    down, up = torch.randn(4, *shape[1:]), torch.randn(shape[0], 4, *[1] * (len(shape) - 2))
    layer = LowRank(in_memory(down), in_memory(up), 2.0)
    full = 0.5 * up.flatten(1).double() @ down.flatten(1).double()
    small = reduce_rank(layer, 2, closest_matrices)
    assert (small.rank, small.alpha, small.down.shape, small.up.shape[:2]) == (2, 2.0, (2, *shape[1:]), (6, 2))
    found = small.up.read().flatten(1).double() @ small.down.read().flatten(1).double()
    rest = torch.linalg.svdvals(full)[2:].square().sum().sqrt()
    torch.testing.assert_close((full - found).norm(), rest, rtol=1e-5, atol=1e-6)
    assert reduce_rank(layer, 4, closest_matrices) is layer


@pytest.mark.parametrize("output", ["kohya", "diffusers"])
def test_a_file_of_the_same_rank_as_its_matrices_loses_nothing(
    bases: dict[str, Path], output: str, tmp_path: Path
) -> None:
    """A rank of 4 whose matrices have rank 1: a file of rank 1 has the same effect."""
    method = fill(make_method(bases["sd1"], "LoRA", lora={"rank": 4, "alpha": 4}))
    for name, parameter in method.parameters().items():
        if "lora_B" in name:
            parameter.data[:, 1:] = 0
    expected = predict(method, "sd1")
    (file,) = export(method, OutputSpec.model_validate({"format": output, "to": ".", "rank": 1}), tmp_path)
    ranks = {value.shape[0] for name, value in load_file(file).items() if ".lora_down." in name or ".lora_A." in name}
    assert ranks == {1}
    again = make_method(bases["sd1"], "LoRA", lora={"rank": 1, "base": str(file)})
    again.set_training(False)
    torch.testing.assert_close(predict(again, "sd1"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rank": 1}], ids=["complete", "reduced"])
@pytest.mark.parametrize("output", ["kohya", "diffusers"])
def test_each_matrix_of_a_lora_file_is_read_once_and_when_it_is_written(
    bases: dict[str, Path], output: str, settings: dict[str, int], tmp_path: Path
) -> None:
    """The matrices of a LoRA need hundreds of megabytes; those of one layer are in memory at a time."""
    (tmp_path / "in").mkdir()
    (file,) = export(fill(make_method(bases["sd1"], "LoRA")), OutputFormat.KOHYA, tmp_path / "in")
    opened = read_adapter(file, open_base(ModelSpec(base=str(bases["sd1"]))), "x")
    read: list[str] = []

    def watched(name: str, tensor: LazyTensor) -> LazyTensor:
        def rows(start: int, stop: int) -> torch.Tensor:
            assert (start, stop) == (0, tensor.num_rows)
            read.append(name)
            return tensor.rows(start, stop)

        return replace(tensor, rows=rows, region=None)

    layers = {
        name: replace(layer, down=watched(name, layer.down), up=watched(name, layer.up))
        for name, layer in opened.layers.items()
    }
    assert not read
    spec = OutputSpec.model_validate({"format": output, "to": ".", **settings})
    (tmp_path / "out").mkdir()
    write_format(replace(opened, layers=layers), spec, tmp_path / "out", About("tiny"))
    assert sorted(read) == sorted([*layers, *layers])
    assert [first for first, second in zip(read[::2], read[1::2], strict=True) if first != second] == []


def test_a_kohya_file_describes_itself(bases: dict[str, Path], tmp_path: Path) -> None:
    """By these keys the web UIs list the file for its base, and programs show its title, trigger and thumbnail."""
    run = tiny.make_spec(bases["sdxl"], tmp_path, method="LoRA", lora={"rank": 2, "alpha": 6}, seed=7)
    picture = tmp_path / "validation/pictures/step-00000006-00.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (512, 256), "red").save(picture)
    Image.new("RGB", (8, 8)).save(picture.with_name("step-00000003-00.png"))
    (tmp_path / "out").mkdir()
    with make_method(bases["sdxl"], "LoRA").trained() as trained:
        output = OutputSpec(format=OutputFormat.KOHYA, to=".", trigger_phrase="in the style of sks")
        (file,) = write_format(trained, output, tmp_path / "out", About.of_run(run, tmp_path, None))
    with safe_open(file, framework="pt") as tensors:
        found = tensors.metadata()
    assert file.name == "tiny.safetensors"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_v2"]) == ("2", "6", "False")
    assert (found["ss_output_name"], found["ss_seed"], found["ss_steps"]) == ("tiny", "7", "6")
    spec = {name.removeprefix("modelspec."): value for name, value in found.items() if name.startswith("modelspec.")}
    assert spec["sai_model_spec"] == "1.0.1"
    assert spec["architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (spec["title"], spec["resolution"], spec["trigger_phrase"]) == ("tiny", "16x16", "in the style of sks")
    content = file.read_bytes()
    assert spec["hash_sha256"] == f"0x{sha256(content[8 + int.from_bytes(content[:8], 'little') :]).hexdigest()}"
    head, _, data = spec["thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert thumbnail.size == (256, 128)
        red, green, _ = thumbnail.getpixel((9, 9))  # type: ignore[misc]
        assert red > 200
        assert green < 50


def test_a_folder_of_diffusers_has_a_card_with_the_job_and_its_pictures(bases: dict[str, Path], tmp_path: Path) -> None:
    run = tiny.make_spec(bases["sd1"], tmp_path, method="LoRA", lora={"rank": 2})
    for number in range(3):
        picture = tmp_path / f"validation/pictures/step-00000006-{number:02}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), ["red", "lime", "blue"][number]).save(picture)
    out = tmp_path / "out"
    out.mkdir()
    card_of_base = bases["sd1"] / "README.md"
    card_of_base.write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE.md\n---\n# A base\n"
    )
    with make_method(bases["sd1"], "LoRA").trained() as trained:
        write_format(trained, OutputSpec(format="diffusers", to="."), out, About.of_run(run, tmp_path, None))
    card_of_base.unlink()
    card = (out / "README.md").read_text(encoding="utf-8")
    # The hub refuses a name that is none of its identifiers; the file of the licence is not next to this card.
    assert ModelCard(card).data.to_dict() == {  # type: ignore[no-untyped-call]
        "library_name": "diffusers",
        "license": "other",
        "license_name": "some-licence",
        "tags": ["text-to-image", "lora"],
    }
    assert "| licence of the base | some-licence |" in card
    for words in ("library_name", "# tiny", "| method | LoRA |", "| steps | 6 |", "| learning rate | 0.01 |", "torch "):
        assert words in card
    assert str(tmp_path) not in card
    manifest = json.loads((out / "finetune-job.json").read_text(encoding="utf-8"))
    assert manifest["training"]["lora"]["rank"] == 2
    with Image.open(out / "samples.png") as grid:
        colours = [grid.getpixel(at) for at in ((8, 8), (24, 8), (8, 24), (24, 24))]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize(
    ("front", "fields", "name"),
    [
        ("license: openrail++", {"license": "openrail++"}, "openrail++"),
        (
            "license: other  # see below\nlicense_name: 'community'\nlicense_link: https://host/licence",
            {"license": "other", "license_name": "community", "license_link": "https://host/licence"},
            "community",
        ),
        ("license_name: community", {"license": "other", "license_name": "community"}, "community"),
        ("license:\ntags: [x]", None, None),
        ("tags: [x]", None, None),
    ],
)
def test_the_licence_is_that_of_the_base(front: str, fields: dict[str, str] | None, name: str | None) -> None:
    found = parse_licence(f"---\n{front}\n---\nlicense: mit\n")
    assert (found and found.front_matter(), found and found.name) == (fields, name)


def test_a_full_lora_output_contains_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    method = fill(make_method(bases["sd1"], "LoRA"))
    export(method, OutputSpec.model_validate({"format": "diffusers", "to": ".", "full": True}), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    batch = make_batch("sd1", 9, 1)
    with torch.no_grad():
        found = pipeline.unet(batch.latents, batch.timesteps, encoder_hidden_states=batch.text["hidden"]).sample
    torch.testing.assert_close(found, predict(method, "sd1"), rtol=1e-4, atol=1e-5)
