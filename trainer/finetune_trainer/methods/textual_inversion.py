"""Textual inversion (https://arxiv.org/abs/2208.01618): a new token's few vectors are all that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from finetune_contract.spec import OutputFormat, TrainingSpec
from finetune_trainer.data.captions import Captions, TokenSentences
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.unet_method import UNetMethod
from finetune_trainer.models.text import TextPart
from finetune_trainer.tensor_file import write_tensors

_NAMES = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}
_WEBUI_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class TextualInversion(UNetMethod):
    """The new rows of the embedding tables, beside the tables themselves; see `Method`."""

    formats: ClassVar = frozenset({OutputFormat.DIFFUSERS, OutputFormat.WEBUI})
    needs_captions: ClassVar = False

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        spec = context.training.textual_inversion
        assert spec is not None
        self._spec = spec
        self._vectors: dict[str, nn.Parameter] = {}
        for part in self._load_text(context.dtype).parts:
            self._vectors[part.name] = self._add_vectors(part)
            if context.training.gradient_checkpointing:
                part.model.gradient_checkpointing_enable({"use_reentrant": False})
            self._modules.append(part.model)
        self._finish(self._vectors)

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Captions that hold the new token."""
        spec = training.textual_inversion
        assert spec is not None
        return TokenSentences(spec.placeholder_token, spec.learnable_property)

    @staticmethod
    def encodes_text(training: TrainingSpec) -> bool:
        """Always."""
        del training
        return True

    def export(self, output_format: OutputFormat, folder: Path) -> list[Path]:
        """Write a file for each text encoder, as diffusers' load_textual_inversion reads it, or one for the web UIs."""
        if output_format is OutputFormat.WEBUI and len(self._vectors) > 1:
            path = folder / "learned_embeds.safetensors"
            write_tensors(path, {_WEBUI_KEYS[name]: value for name, value in self._vectors.items()}, {"format": "pt"})
            return [path]
        key = "emb_params" if output_format is OutputFormat.WEBUI else self._spec.placeholder_token
        for name, value in self._vectors.items():
            write_tensors(folder / _NAMES[name], {key: value}, {"format": "pt"})
        return [folder / _NAMES[name] for name in self._vectors]

    def _add_vectors(self, part: TextPart) -> nn.Parameter:
        """New rows that begin as copies of the initializer's."""
        word, token = self._spec.initializer_token, self._spec.placeholder_token
        try:
            vector = part.embedding_of(word)
        except ValueError as error:
            raise ConfigError(
                f"training.textualInversion.initializerToken: {error} of the base's text encoder; write a simpler word"
            ) from error
        vectors = nn.Parameter(vector.float().repeat(self._spec.num_vectors, 1))
        try:
            part.add_token(token, vectors)
        except ValueError as error:
            raise ConfigError(
                f"training.textualInversion.placeholderToken: {error}; write another, e.g. <my-{word}>"
            ) from error
        return vectors
