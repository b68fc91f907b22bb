"""What a sample is called: the caption of the data set, one prompt for all, or a sentence with the new token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_contract.spec import LearnableProperty
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.data.sources.base import Samples

SENTENCES = {
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
"""Neutral sentences around a new token (https://arxiv.org/abs/2208.01618, section 4)."""


class Captions(Protocol):
    """Chooses the caption of each drawing of a sample."""

    def caption(self, source: Samples, ref: SampleRef, draws: Draws) -> str:
        """Caption of one drawing of a sample."""
        ...

    def every(self, source: Samples) -> Sequence[str]:
        """All captions that can come up."""
        ...


class OwnCaptions:
    """The data set's captions."""

    def caption(self, source: Samples, ref: SampleRef, draws: Draws) -> str:
        """Caption of one drawing of a sample."""
        del draws
        return source.caption(ref.index)

    def every(self, source: Samples) -> Sequence[str]:
        """All captions that can come up."""
        return [source.caption(index) for index in range(len(source))]


@dataclass(frozen=True)
class OnePrompt:
    """The same prompt for every sample."""

    prompt: str

    def caption(self, source: Samples, ref: SampleRef, draws: Draws) -> str:
        """Caption of one drawing of a sample."""
        del source, ref, draws
        return self.prompt

    def every(self, source: Samples) -> Sequence[str]:
        """All captions that can come up."""
        del source
        return [self.prompt]


@dataclass(frozen=True)
class TokenSentences:
    """Captions that hold a new token: the data set's own where they do, else a neutral sentence, drawn anew."""

    token: str
    learnable: LearnableProperty

    def caption(self, source: Samples, ref: SampleRef, draws: Draws) -> str:
        """Caption of one drawing of a sample."""
        own = source.caption(ref.index)
        if self.token in own:
            return own
        sentences = SENTENCES[self.learnable]
        return sentences[draws.integer(Purpose.SENTENCE, ref, len(sentences))].format(self.token)

    def every(self, source: Samples) -> Sequence[str]:
        """All captions that can come up."""
        own = [source.caption(index) for index in range(len(source))]
        sentences = [sentence.format(self.token) for sentence in SENTENCES[self.learnable]]
        return [*sentences, *(caption for caption in own if self.token in caption)]
