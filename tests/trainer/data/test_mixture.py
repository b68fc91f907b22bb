"""Tests of several data sets, repeats, weights, several captions, shuffled tags and own class images."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import DatasetSpec, ShuffleTagsSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import LearnableProperty
from finetune_trainer.data.batches import Batch, BatchMaker
from finetune_trainer.data.captions import OwnCaptions, ShuffledTags, TokenTemplates
from finetune_trainer.data.images.class_images import ClassImages
from finetune_trainer.data.images.decoding import CENTRE, read_conditions
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import SampleRef, ends_epochs, sample_at
from finetune_trainer.data.sources.open import open_source
from finetune_trainer.errors import DataError
from testing.trainer import streams, tiny
from testing.trainer.ranks import Ranks

DRAWS = Draws(5)


def write_captioned(folder: Path, captions: Sequence[str], seed: int = 7) -> Path:
    """Write an image with a caption file for each caption."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number, caption in enumerate(captions):
        pixels = random.integers(0, 256, (tiny.RESOLUTION, tiny.RESOLUTION, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def with_dataset(spec: RunSpec, **dataset: Any) -> RunSpec:
    merged = {**spec.dataset.model_dump(by_alias=True), **dataset}
    return spec.model_copy(update={"dataset": DatasetSpec.model_validate(merged)})


@pytest.fixture(name="mixed", scope="module")
def _mixed(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """The tiny data set twice, and two data sets with own repeats and weights."""
    folder = tmp_path_factory.mktemp("mixed")
    rings = write_captioned(folder / "rings", ["ring 0", "ring 1"])
    write_captioned(folder / "kohya" / "3_disc", ["disc 0"], seed=8)
    additional = [
        {"source": str(rings), "repeats": 2, "weight": 0.5},
        {"source": str(folder / "kohya"), "repeats": 2},
    ]
    return with_dataset(tiny.make_spec(base, data, centerCrop=True), repeats=2, additional=additional)


def batch_of(maker: BatchMaker, epoch: int = 0) -> Batch:
    return maker.make([SampleRef(epoch, index) for index in range(len(maker.source))])


def test_each_sample_appears_as_often_as_its_repeats(mixed: RunSpec, tmp_path: Path) -> None:
    maker = streams.prepare(mixed, tmp_path / "cache").batches
    batch = batch_of(maker)
    counts = {caption: batch.captions.count(caption) for caption in batch.captions}
    pictures = {f"picture {number}": 2 for number in range(tiny.NUM_SAMPLES)}
    assert counts == {**pictures, "ring 0": 2, "ring 1": 2, "disc 0": 6}
    assert batch.weights is not None
    assert all(
        weight == (0.5 if caption.startswith("ring") else 1)
        for caption, weight in zip(batch.captions, batch.weights.tolist(), strict=True)
    )
    # The uses of a sample share their image and have their own noise.
    first, second = (index for index, caption in enumerate(batch.captions) if caption == "ring 1")
    assert torch.equal(maker.latents.posterior(first, CENTRE).mean, maker.latents.posterior(second, CENTRE).mean)
    assert not torch.equal(batch.noise[first], batch.noise[second])


def test_streamed_mixture_equals_that_of_copies(mixed: RunSpec, tmp_path: Path) -> None:
    plain = batch_of(streams.prepare(mixed, tmp_path / "plain").batches, 1)
    streamed = batch_of(streams.prepare(streams.streamed(mixed), tmp_path / "streamed").batches, 1)
    assert streamed.captions == plain.captions
    assert torch.equal(streamed.latents, plain.latents)
    assert streamed.weights is not None
    assert plain.weights is not None
    assert torch.equal(streamed.weights, plain.weights)


def test_single_data_set_gives_the_same_batches_as_before(base: Path, data: Path, tmp_path: Path) -> None:
    """Neither draws nor the structure change for a manifest without the new fields."""
    maker = streams.prepare(tiny.make_spec(base, data, centerCrop=True), tmp_path / "cache").batches
    assert maker.weights is None
    assert batch_of(maker).weights is None
    assert type(maker.source) is type(open_source(DatasetSpec(source=str(data)), "train"))


def test_broken_images_of_all_data_sets_count(mixed: RunSpec, tmp_path: Path) -> None:
    broken = write_captioned(tmp_path / "broken", ["one", "two", "three"])
    (broken / "0.png").write_bytes(b"x")
    others = [{"source": str(broken)}, {"source": str(broken), "weight": 2}]
    spec = with_dataset(mixed, additional=others, maxBroken=1)
    with pytest.raises(DataError, match=r"^dataset\.additional\[1\]\.source: 1 of 3 .* maxBroken: 2$"):
        streams.prepare(spec, tmp_path / "cache")
    source = streams.prepare(with_dataset(spec, maxBroken=2), tmp_path / "cache").batches.source
    assert len(source) == 2 * tiny.NUM_SAMPLES + 4


def test_messages_name_the_field_of_an_additional_data_set(mixed: RunSpec, tmp_path: Path) -> None:
    for changed, message in (
        ({"source": "/nowhere"}, r"^dataset\.additional\[0\]\.source: there is no folder or file /nowhere"),
        ({"source": mixed.dataset.source, "split": "no"}, r"^dataset\.additional\[0\]\.split: .* no split 'no'"),
    ):
        with pytest.raises(DataError, match=message):
            streams.prepare(with_dataset(mixed, additional=[changed]), tmp_path / "cache")


@pytest.fixture(name="several")
def _several(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "several", ["a\nb\nc", "only", "<cat> x\nplain\n<cat> y"])


def test_one_of_several_captions_is_drawn_for_each_epoch(several: Path) -> None:
    source = open_source(DatasetSpec(source=str(several)), "train")
    captions = OwnCaptions()
    drawn = [captions.caption(source, SampleRef(epoch, 0), DRAWS) for epoch in range(60)]
    assert {each: drawn.count(each) > 10 for each in "abc"} == dict.fromkeys("abc", True)
    assert drawn == [captions.caption(source, SampleRef(epoch, 0), Draws(5)) for epoch in range(60)]
    assert captions.caption(source, SampleRef(3, 1), DRAWS) == "only"
    assert sorted(captions.every(source)) == ["<cat> x", "<cat> y", "a", "b", "c", "only", "plain"]


def test_captions_with_the_token_are_preferred(several: Path) -> None:
    source = open_source(DatasetSpec(source=str(several)), "train")
    captions = TokenTemplates("<cat>", LearnableProperty.OBJECT)
    drawn = {captions.caption(source, SampleRef(epoch, 2), DRAWS) for epoch in range(30)}
    assert drawn == {"<cat> x", "<cat> y"}
    assert {"<cat> x", "<cat> y"} < set(captions.every(source))


@pytest.mark.parametrize(
    ("keep_first", "separator", "caption", "kept"),
    [(2, ",", "1girl, solo,smile , hat,, tree", "1girl, solo, "), (0, "|", "a|b|c", ""), (9, ",", "a,b", "a, b")],
)
def test_tags_are_shuffled_for_each_use(keep_first: int, separator: str, caption: str, kept: str) -> None:
    shuffled = ShuffledTags(OwnCaptions(), ShuffleTagsSpec(keep_first=keep_first, separator=separator))
    drawn = [shuffled.shuffle(caption, SampleRef(epoch, 3), DRAWS) for epoch in range(80)]
    tags = sorted(tag.strip() for tag in caption.split(separator) if tag.strip())
    assert all(each.startswith(kept) for each in drawn)
    assert all(sorted(tag.strip() for tag in each.split(separator)) == tags for each in drawn)
    assert len(set(drawn)) == (1 if keep_first == 9 else 6)
    assert drawn == [shuffled.shuffle(caption, SampleRef(epoch, 3), Draws(5)) for epoch in range(80)]


def test_order_of_tags_is_stable_across_releases() -> None:
    """A run that resumes from a checkpoint of an older release trains on the same captions."""
    shuffled = ShuffledTags(OwnCaptions(), ShuffleTagsSpec())
    assert shuffled.shuffle("a, b, c, d, e", SampleRef(2, 3), Draws(1)) == "c, d, b, e, a"


def test_text_of_shuffled_tags_is_encoded_in_each_step(base: Path, tmp_path: Path) -> None:
    """The embeddings equal those that the cache would hold, and do not depend on the other samples of the batch."""
    data = write_captioned(tmp_path / "tags", ["a, b, c", "d, e, f"])
    spec = with_dataset(
        tiny.make_spec(base, data, centerCrop=True, validation={"prompts": ["a"]}), shuffleTags={"keepFirst": 1}
    )
    maker = streams.prepare(spec, tmp_path / "cache").batches
    refs = [SampleRef(epoch, index) for epoch in range(4) for index in range(2)]
    batch = maker.make(refs)
    assert {caption for caption in batch.captions if "a" in caption} == {"a, b, c", "a, c, b"}
    for number, ref in enumerate(refs):
        assert torch.equal(maker.make([ref]).text["hidden"][0], batch.text["hidden"][number])
    plain = write_captioned(tmp_path / "plain", batch.captions)
    cached = streams.prepare(tiny.make_spec(base, plain, centerCrop=True), tmp_path / "other").batches
    expected = cached.make([SampleRef(0, index) for index in range(len(refs))])
    assert expected.captions == batch.captions
    assert torch.equal(expected.text["hidden"], batch.text["hidden"])


@pytest.fixture(name="generated")
def _generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the numbers of the class images that are generated."""
    numbers: list[int] = []
    generate = ClassImages._generate

    def recording(self: ClassImages, folder: Path, missing: list[int]) -> None:
        numbers.extend(missing)
        generate(self, folder, missing)

    monkeypatch.setattr(ClassImages, "_generate", recording)
    return numbers


@pytest.mark.parametrize("count", [2, 3, 5])
def test_only_missing_class_images_are_generated(
    count: int, base: Path, data: Path, tmp_path: Path, generated: list[int]
) -> None:
    own = write_captioned(tmp_path / "own" / "nested", ["", "", "", ""]).parent
    (own / "nested" / "1.png").write_bytes(b"x")
    dreambooth = {"instancePrompt": "x", "classPrompt": "dog", "numClassImages": count, "classImages": str(own)}
    spec = tiny.make_spec(base, data, method="DreamBooth", dreambooth=dreambooth, centerCrop=True)
    reports: list[str] = []
    prior = streams.prepare(spec, tmp_path / "cache", reports).batches.prior
    assert prior is not None
    # One of the four own images is broken.
    assert generated == list(range(count - 3))
    assert len(prior.batches.source) == count
    assert prior.batches.source.name(0) == str(own / "nested" / "0.png")
    assert any(re.search(r"training\.dreambooth\.classImages: 1 of \d images is broken", each) for each in reports)
    assert prior.sample(DRAWS, SampleRef(0, 0)).caption == "dog"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            "LoRA",
            {"validation": {"split": "val"}},
            r"training\.validation\.split: .* no split 'val'; write one that it has: test, train",
        ),
        (
            "DreamBooth",
            {"dreambooth": {"instancePrompt": "x", "classPrompt": "dog", "classImages": "/nowhere"}},
            r"training\.dreambooth\.classImages: there is no folder or file /nowhere",
        ),
    ],
)
def test_missing_inputs_are_found_before_any_image_is_read(  # noqa: PLR0917  fixtures and parameters
    method: str, settings: dict[str, Any], message: str, streaming: bool, base: Path, data: Path, tmp_path: Path
) -> None:
    spec = with_dataset(tiny.make_spec(base, data, method=method, centerCrop=True, **settings), streaming=streaming)
    reports: list[str] = []
    with pytest.raises(DataError, match=f"^{message}"):
        streams.prepare(spec, tmp_path / "cache", reports)
    assert reports == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("samples", "batch", "epochs"), [(7, 4, 1), (10, 5, 2), (3, 8, 1), (9, 2, 3)])
def test_steps_that_end_epochs(samples: int, batch: int, epochs: int) -> None:
    steps = [step for step in range(1, 60) if ends_epochs(step, samples, batch, epochs)]
    last = [max(sample_at(0, samples, position).epoch for position in range(step * batch)) for step in (1, 2)]
    assert last[0] <= last[1]
    ends = [-(-epochs * samples * number // batch) for number in range(1, 1000)]
    assert steps == sorted({end for end in ends if end < 60})


@pytest.mark.trainer
def test_run_with_mixture_tags_and_conditioning_images(base: Path, data: Path, tmp_path: Path) -> None:
    """Two ranks: the samples of an epoch include all data sets, and the pictures use the images of the manifest."""
    edges = [str(data / "test" / f"edges-{number}.png") for number in (0, 1)]
    validation = {"prompts": ["a", "a"], "images": edges, "epochs": 1, "numInferenceSteps": 2}
    spec = tiny.make_spec(base, data, method="ControlNet", steps=4, centerCrop=True, validation=validation)
    spec = with_dataset(spec, shuffleTags={}, additional=[{"source": str(data), "split": "test", "weight": 0.5}])
    ranks = Ranks(spec, tmp_path / "job", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    folder = ranks.job_dir / "validation"
    # 14 samples in an epoch and 4 in a step: the first epoch ends with step 4, the last one.
    assert sorted(path.name for path in folder.glob("step-*.png")) == ["step-00000000.png", "step-00000004.png"]
    first, second = ((folder / "pictures" / f"step-00000004-0{number}.png").read_bytes() for number in (0, 1))
    assert first != second


@pytest.mark.trainer
def test_killed_run_with_mixture_tags_and_text_settings_keeps_its_weights(
    base: Path, data: Path, tmp_path: Path
) -> None:
    training = {"clipSkip": 1, "longCaptions": "chunk", "lora": {"rank": 2, "dropout": 0.1, "trainTextEncoder": True}}
    additional = [{"source": str(data), "split": "test", "weight": 0.5}, {"source": str(data), "repeats": 2}]
    spec = with_dataset(
        tiny.make_spec(base, data, steps=6, textEncoderLearningRate=0.001, **training),
        shuffleTags={"keepFirst": 1},
        additional=additional,
    )
    whole = Ranks(spec, tmp_path / "whole" / "job", world_size=2)
    assert whole.run() == [ExitCode.DONE] * 2, whole.stderr()
    killed = Ranks(spec, tmp_path / "killed" / "job", 1, 2, ("copy", 1), 0, saves_all=True)
    assert killed.run()[0] == -signal.SIGKILL, killed.stderr()
    again = Ranks(spec, tmp_path / "killed" / "job", 2, 2)
    assert again.run() == [ExitCode.DONE] * 2, again.stderr()
    assert any(report.get("restoredStep", 0) > 0 for report in again.reports())
    assert again.weights() == whole.weights()


@pytest.mark.trainer
def test_missing_image_of_a_picture_is_found_before_the_map_phase(base: Path, data: Path, tmp_path: Path) -> None:
    validation = {"prompts": ["a"], "images": ["/nowhere/edges.png"]}
    ranks = Ranks(tiny.make_spec(base, data, method="ControlNet", validation=validation), tmp_path / "job")
    assert ranks.run() == [ExitCode.DATA], ranks.stderr()
    assert "training.validation.images[0]: /nowhere/edges.png cannot be read" in ranks.stderr()
    assert not any("scanned" in str(report.get("detail")) for report in ranks.reports())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_conditioning_images_of_the_manifest_are_checked_and_cropped(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (8, 0, 24, 16))
    picture.save(tmp_path / "edges.png")
    (condition,) = read_conditions([str(tmp_path / "edges.png")], 8)
    assert condition.shape == (3, 8, 8)
    assert torch.equal(condition[:, :, 1:-1], torch.ones(3, 8, 6))
    (tmp_path / "bad.png").write_bytes(b"x")
    for name, problem in (("gone.png", "cannot be read: No such file"), ("bad.png", "is not a complete image")):
        paths = [str(tmp_path / "edges.png"), str(tmp_path / name)]
        with pytest.raises(DataError, match=rf"^training\.validation\.images\[1\]: .*{name} {problem}"):
            read_conditions(paths, 8)
