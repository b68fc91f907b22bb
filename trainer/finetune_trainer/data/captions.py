"""Chooses the captions of samples: the data set's captions, one prompt for all, or templates with the new token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_contract.spec import LearnableProperty
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.base import SampleSet

TEMPLATES = {
    LearnableProperty.OBJECT: (
        "a photo of a {}",
        "a picture of one {}",
        "a close view of the {}",
        "a good photo of a {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a small {}",
        "a drawing of a {}",
    ),
    LearnableProperty.STYLE: (
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "a photo in the style of {}",
        "a small picture in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
    ),
}
"""Neutral prompt templates around a new token (https://arxiv.org/abs/2208.01618, section 4)."""


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
        """Return the caption of one use of a sample."""
        del draws
        return source.caption(ref.index)

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        return [source.caption(index) for index in range(len(source))]


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
        own = source.caption(ref.index)
        if self.token in own:
            return own
        templates = TEMPLATES[self.learnable]
        return templates[draws.integer(Purpose.SENTENCE, ref, len(templates))].format(self.token)

    def every(self, source: SampleSet) -> Sequence[str]:
        """Return all captions that can be chosen."""
        own = [source.caption(index) for index in range(len(source))]
        filled = [template.format(self.token) for template in TEMPLATES[self.learnable]]
        return [*filled, *(caption for caption in own if self.token in caption)]
