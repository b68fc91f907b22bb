"""Chooses the captions of samples: the data set's captions, one prompt for all, or templates with the new token.

Captions that are lists of tags can be shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_contract.input_spec import ShuffleTagsSpec
from finetune_contract.spec import LearnableProperty
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.base import SampleSet

TEMPLATES = {
    LearnableProperty.OBJECT: (
        "a photo of a {}",
        "a photo of the {}",
        "a photo of my {}",
        "a photo of one {}",
        "a picture of a {}",
        "a picture of the {}",
        "an image of a {}",
        "a close-up of the {}",
        "a detail of the {}",
        "a good photo of a {}",
        "a good photo of the {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a clear photo of a {}",
        "a blurred photo of a {}",
        "a grainy photo of the {}",
        "a cropped photo of the {}",
        "a snapshot of a {}",
        "a studio photo of the {}",
        "a photo of a small {}",
        "a photo of a large {}",
        "a photo of a clean {}",
        "a photo of a dirty {}",
        "a photo of a beautiful {}",
        "a photo of a strange {}",
        "a drawing of a {}",
        "a rendering of the {}",
    ),
    LearnableProperty.STYLE: (
        "a picture in the style of {}",
        "an image in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a photo in the style of {}",
        "a rendering in the style of {}",
        "a detail in the style of {}",
        "a close-up in the style of {}",
        "a small painting in the style of {}",
        "a large painting in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
        "a clean painting in the style of {}",
        "a dirty painting in the style of {}",
        "a good painting in the style of {}",
        "a beautiful painting in the style of {}",
        "a strange painting in the style of {}",
        "a cropped painting in the style of {}",
        "a scene in the style of {}",
    ),
}
"""Neutral prompt templates around a new token (https://arxiv.org/abs/2208.01618, section 4).

A token that is seen in few sentences learns to depend on them.
"""


class Captions(Protocol):
    """Chooses the caption of each use of a sample."""

    def caption(self, source: SampleSet, ref: SampleRef, draws: Draws) -> str:
        """Return the caption of one use of a sample."""
        ...

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        ...


class OwnCaptions:
    """The data set's captions."""

    def caption(self, source: SampleSet, ref: SampleRef, draws: Draws) -> str:
        """Return the caption of one use of a sample; a random one of several."""
        return _choose(source.captions(ref.index), ref, draws) or ""

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        return [caption for index in range(len(source)) for caption in source.captions(index) or ("",)]


@dataclass(frozen=True)
class OnePrompt:
    """The same prompt for every sample."""

    prompt: str

    def caption(self, source: SampleSet, ref: SampleRef, draws: Draws) -> str:
        """Return the caption of one use of a sample."""
        del source, ref, draws
        return self.prompt

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        del source
        return [self.prompt]


@dataclass(frozen=True)
class TokenTemplates:
    """Captions with a new token: the data set's own caption if it has the token, else a random template."""

    token: str
    learnable: LearnableProperty

    def caption(self, source: SampleSet, ref: SampleRef, draws: Draws) -> str:
        """Return the caption of one use of a sample."""
        own = _choose([each for each in source.captions(ref.index) if self.token in each], ref, draws)
        if own is not None:
            return own
        templates = TEMPLATES[self.learnable]
        return templates[draws.integer(Purpose.SENTENCE, ref, len(templates))].format(self.token)

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        own = [caption for index in range(len(source)) for caption in source.captions(index)]
        filled = [template.format(self.token) for template in TEMPLATES[self.learnable]]
        return [*filled, *(caption for caption in own if self.token in caption)]


@dataclass(frozen=True)
class ShuffledTags:
    """Captions whose tags have another order for each use.

    Attributes:
        captions: chooses the caption.
        spec: the separator of the tags, and the number of tags that keep their place.
    """

    captions: Captions
    spec: ShuffleTagsSpec

    def caption(self, source: SampleSet, ref: SampleRef, draws: Draws) -> str:
        """Return the caption of one use of a sample, with its tags in a random order."""
        return self.shuffle(self.captions.caption(source, ref, draws), ref, draws)

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen, in their own order: there are too many others to list."""
        return self.captions.every(source)

    def shuffle(self, caption: str, ref: SampleRef, draws: Draws) -> str:
        """Return a caption with its tags in a random order."""
        parts = [tag.strip() for tag in caption.split(self.spec.separator)]
        tags = [tag for tag in parts if tag]
        kept, moved = tags[: self.spec.keep_first], tags[self.spec.keep_first :]
        order = draws.order(Purpose.TAGS, ref, len(moved))
        separator = self.spec.separator.strip()
        joint = f"{separator} " if separator else self.spec.separator
        return joint.join([*kept, *(moved[place] for place in order)])


def _choose(captions: Sequence[str], ref: SampleRef, draws: Draws) -> str | None:
    """Return one of the captions of a sample; None if there are none."""
    if len(captions) < 2:
        return captions[0] if captions else None
    return captions[draws.integer(Purpose.CHOICE, ref, len(captions))]
