"""Tests of the demo's data set, which depends only on its arguments, and of the base model trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune_trainer.demo import circles
from finetune_trainer.demo.circles import STYLES, make_dataset, make_scene, paint, paint_edges
from finetune_trainer.demo.picture_metrics import measure_picture, sample_images
from finetune_trainer.demo.vocabulary import WORDS, learn_merges

BASE = Path(__file__).parents[3] / "examples" / "base-circles"

scenes = st.builds(make_scene, st.integers(0, 2**32), st.sampled_from(circles.SPLITS), st.integers(0, 10**6))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def small_dataset(folder: Path, style: str = "stripes", seed: int = 0) -> Path:
    return make_dataset(folder, style=style, num_train=5, num_validation=2, size=32, seed=seed)


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_caption_names_the_colours_of_the_picture(scene: circles.CircleScene) -> None:
    metrics = measure_picture(paint(scene))
    assert metrics.caption == scene.caption
    assert metrics.roundness > 0.9


@given(scenes, st.sampled_from(sorted(STYLES)))
@settings(max_examples=60, deadline=None)
def test_every_style_keeps_the_colours(scene: circles.CircleScene, style: str) -> None:
    assert measure_picture(paint(scene, style)).caption == scene.caption


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_edges_are_on_the_rim_of_the_circle(scene: circles.CircleScene) -> None:
    size = 64
    edges = np.asarray(paint_edges(scene, size=size).convert("L"))
    rows, columns = np.nonzero(edges > 96)
    distance = np.hypot(columns + 0.5 - scene.x * size, rows + 0.5 - scene.y * size)
    assert len(distance) > 2 * scene.radius * size
    assert np.abs(distance - scene.radius * size).max() < 2.5


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"plain"}))
def test_each_style_differs_from_the_plain_style(style: str) -> None:
    scene = make_scene(0, "train", 0)
    difference = np.asarray(paint(scene, style), dtype=int) - np.asarray(paint(scene), dtype=int)
    assert (np.abs(difference).max(axis=2) > 50).mean() > 0.02


def test_files_depend_on_the_arguments_only(tmp_path: Path) -> None:
    first, second = small_dataset(tmp_path / "a"), small_dataset(tmp_path / "b")
    other = small_dataset(tmp_path / "c", seed=1)
    assert files_of(first) == files_of(second)
    assert files_of(first)["train/000000.png"] != files_of(other)["train/000000.png"]


def test_splits_have_no_picture_in_common(tmp_path: Path) -> None:
    files = files_of(small_dataset(tmp_path))
    train = {data for name, data in files.items() if name.startswith("train/0")}
    validation = {data for name, data in files.items() if name.startswith("validation/0")}
    assert (len(train), len(validation)) == (5, 2)
    assert not train & validation


def test_metadata_lists_all_pictures_in_order(tmp_path: Path) -> None:
    train = small_dataset(tmp_path) / "train"
    rows = [json.loads(line) for line in (train / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == [f"{index:06d}.png" for index in range(5)]
    assert [row["text"] for row in rows] == [make_scene(0, "train", index).caption for index in range(5)]
    for row in rows:
        assert Image.open(train / row["file_name"]).size == (32, 32)
        assert Image.open(train / row["conditioning_image"]).size == (32, 32)


@pytest.mark.parametrize("num_files", range(0, 16, 3))
def test_next_call_finishes_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int) -> None:
    complete = files_of(small_dataset(tmp_path / "complete"))
    replace, num_written = Path.replace, 0

    def replace_until_killed(self: Path, target: Path) -> Path:
        nonlocal num_written
        if num_written == num_files:
            raise KeyboardInterrupt
        num_written += 1
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_until_killed)
        small_dataset(tmp_path / "broken")
    assert files_of(small_dataset(tmp_path / "broken")) == complete


def test_second_call_writes_nothing(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    small_dataset(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folder_with_another_data_set_is_refused(tmp_path: Path) -> None:
    small_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"has a data set with other arguments: .*stripes.*; name another folder"):
        small_dataset(tmp_path, style="squares")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "plaid"], "invalid choice: 'plaid'"),
        (["--num-train", "-1"], "num_train is -1; use 0 or more"),
        (["--size", "8"], "size is 8 pixels, which is too small to show a circle; use 16 or more"),
    ],
)
def test_command_refuses_invalid_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        circles.main([str(tmp_path / "data"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_command_writes_the_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    assert circles.main([str(folder), "--num-train", "2", "--num-validation", "1", "--size", "32"]) == 0
    assert "2 training and 1 held-out samples" in capsys.readouterr().out
    assert len(files_of(folder)) == 3 * 2 + 2 + 1


@given(st.lists(st.text("abcde", min_size=1, max_size=6), min_size=1, max_size=8))
def test_merges_make_each_word_a_single_token(words: list[str]) -> None:
    merges = learn_merges(words)
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for first, second in merges:
            position = 0
            while position < len(symbols) - 1:
                if (symbols[position], symbols[position + 1]) == (first, second):
                    symbols[position : position + 2] = [first + second]
                position += 1
        assert symbols == [word + "</w>"]


@pytest.fixture(scope="module")
def base() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None).to(torch.float32)


def test_shipped_base_is_small_and_has_no_pickle() -> None:
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert BASE / "model_index.json" in files
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


def test_each_word_is_one_token_of_the_shipped_tokenizer(base: StableDiffusionPipeline) -> None:
    assert all(len(base.tokenizer.tokenize(word)) == 1 for word in WORDS)
    assert base.tokenizer.tokenize("zebra") != base.tokenizer.tokenize("zebu")


def test_shipped_base_draws_the_colours_of_the_captions(base: StableDiffusionPipeline) -> None:
    captions = [
        "red circle with blue background",
        "blue circle with yellow background",
        "white circle with black background",
        "green circle with pink background",
    ]
    metrics = [measure_picture(image) for image in sample_images(base, captions, num_inference_steps=12)]
    assert [each.caption for each in metrics] == captions
