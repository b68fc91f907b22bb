"""Text conditions: skipped layers, long captions, new tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune_contract.input_spec import ModelSpec
from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.cache.encode import TextCache
from finetune_trainer.data.hashes import FileHashes
from finetune_trainer.errors import ConfigError
from finetune_trainer.models.base import open_base
from finetune_trainer.models.family import Family
from finetune_trainer.models.text import NUM_CHUNKS, TextEncoder, TextSettings, count_cut
from testing.trainer import tiny

CPU = torch.device("cpu")
INNER = tiny.NUM_TOKENS - 2
"""Tokens of a caption in one chunk; every letter is a token."""
LONG = "abcdefghij" * 2


@pytest.fixture(name="family_base", scope="module", params=tiny.FAMILIES)
def _family_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "base", family=request.param)


def open_with(base: Path, settings: TextSettings) -> Family:
    family = open_base(ModelSpec(base=str(base)))
    family.text_settings = settings
    return family


def load(base: Path, settings: TextSettings) -> TextEncoder:
    return open_with(base, settings).load_text_encoder(CPU)


@torch.no_grad()
def encode(base: Path, settings: TextSettings, *captions: str) -> dict[str, Tensor]:
    return load(base, settings).encode(captions)


def test_defaults_keep_the_keys_of_earlier_caches() -> None:
    assert TextSettings.of(TrainingSpec()) == TextSettings()
    assert TextSettings().key == ()
    assert TextSettings.of(TrainingSpec.model_validate({"longCaptions": "chunk"})).num_chunks == NUM_CHUNKS


def test_skipped_layers_equal_those_of_transformers(family_base: Path) -> None:
    """The reference is the formula of diffusers' pipelines: hidden state -1 - skip, and the final normalization."""
    if (family_base / "text_encoder_2").is_dir():
        return
    model = CLIPTextModel.from_pretrained(family_base / "text_encoder")
    (part,) = load(family_base, TextSettings()).parts
    with torch.no_grad():
        states = model(part.tokens(["a dog"]), output_hidden_states=True).hidden_states
        expected = getattr(model, "text_model", model).final_layer_norm(states[-2])
    skipped = encode(family_base, TextSettings(clip_skip=1), "a dog")["hidden"]
    torch.testing.assert_close(skipped, expected)
    assert not torch.allclose(skipped, encode(family_base, TextSettings(), "a dog")["hidden"])


def test_skipped_layers_of_sdxl_count_from_its_own(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", family="sdxl")
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = CLIPTextConfig.from_pretrained(base / name)
        config.num_hidden_layers = 3
        torch.manual_seed(0)
        kind(config).save_pretrained(base / name)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    with torch.no_grad():
        expected = pipeline.encode_prompt("a dog", device=CPU, clip_skip=1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(encode(base, TextSettings(clip_skip=1), "a dog")["hidden"], expected)


def test_too_many_skipped_layers_are_refused(family_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.clipSkip: text_encoder.* has \d layers to skip; write at"):
        load(family_base, TextSettings(clip_skip=31))


def test_chunks_of_a_long_caption_are_encoded_like_captions(family_base: Path) -> None:
    parts = [LONG[start : start + INNER] for start in range(0, NUM_CHUNKS * INNER, INNER)]
    chunked = encode(family_base, TextSettings(num_chunks=NUM_CHUNKS), LONG)
    single = encode(family_base, TextSettings(), *parts)
    assert chunked["hidden"].shape[1] == NUM_CHUNKS * INNER + 2
    torch.testing.assert_close(chunked["hidden"][0, 0], single["hidden"][0, 0])
    for number in range(NUM_CHUNKS):
        inner = chunked["hidden"][0, 1 + number * INNER : 1 + (number + 1) * INNER]
        expected = single["hidden"][number, 1:-1]
        if number == 0:
            # The letter at the end of a word is another token.
            inner, expected = inner[:-1], expected[:-1]
        torch.testing.assert_close(inner[: INNER - 1], expected[: INNER - 1])
    if "pooled" in chunked:
        assert chunked["pooled"].shape == single["pooled"][:1].shape


def test_a_short_caption_is_the_same_in_its_first_chunk(family_base: Path) -> None:
    chunked = encode(family_base, TextSettings(num_chunks=NUM_CHUNKS), "ab", "")
    single = encode(family_base, TextSettings(), "ab", "")
    torch.testing.assert_close(chunked["hidden"][:, : INNER + 1], single["hidden"][:, : INNER + 1])
    for name in single.keys() - {"hidden"}:
        torch.testing.assert_close(chunked[name], single[name])


def test_cut_captions_are_counted(family_base: Path) -> None:
    family = open_base(ModelSpec(base=str(family_base)))
    captions = ["a" * INNER, "a" * (INNER + 1), LONG, "", "é" * INNER, "a" * (NUM_CHUNKS * INNER + 1)]
    tokenizers = family.load_tokenizers()
    assert count_cut(tokenizers, captions, TextSettings()) >= 3
    assert count_cut(tokenizers, captions[:1], TextSettings()) == 0
    assert count_cut(tokenizers, captions, TextSettings(num_chunks=NUM_CHUNKS)) == 2
    assert count_cut([], captions, TextSettings()) == 0


def test_settings_have_their_own_cache(base: Path, tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "hashes.json")
    folders = set()
    for settings in (TextSettings(), TextSettings(clip_skip=1), TextSettings(num_chunks=NUM_CHUNKS)):
        folders.add(TextCache(tmp_path, open_with(base, settings), hashes, torch.float32)._encoder_id)
    assert len(folders) == 3


@pytest.mark.parametrize("token", ["*", "a", "<|endoftext|>"])
def test_an_existing_token_cannot_be_a_placeholder(base: Path, token: str) -> None:
    """transformers 5 reports some existing tokens as added; their vectors would never be used."""
    (part,) = load(base, TextSettings()).parts
    with pytest.raises(ValueError, match="already a token of the base"):
        part.add_token(token, nn.Parameter(torch.zeros(1, tiny.WIDTH)))


def test_a_new_token_trains_in_a_chunked_caption(base: Path) -> None:
    encoder = load(base, TextSettings(num_chunks=NUM_CHUNKS))
    vectors = nn.Parameter(torch.zeros(2, tiny.WIDTH))
    encoder.parts[0].add_token("<cat>", vectors)
    torch.autograd.backward(encoder.encode([f"{LONG[:INNER]} <cat>"])["hidden"].square().sum())
    assert vectors.grad is not None
    assert vectors.grad.any(dim=1).all()
