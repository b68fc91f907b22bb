"""Textual inversion (https://arxiv.org/abs/2208.01618): only the embedding vectors of a new token are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune_contract.spec import TrainingSpec
from finetune_trainer.data.captions import Captions, TokenTemplates
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.denoiser_method import DenoiserMethod
from finetune_trainer.methods.embedding_file import find_embedding_files, select_embedding
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.models.layouts.trained import TrainedEmbedding
from finetune_trainer.models.text import TextPart


class TextualInversion(DenoiserMethod):
    """Additional rows of the embedding tables; the tables themselves are frozen. See `Method`."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        spec = context.training.textual_inversion
        assert spec is not None
        self._spec = spec
        self._vectors: dict[str, nn.Parameter] = {}
        self._parts = self._load_text(context.dtype).parts
        for number, part in enumerate(self._parts):
            self._vectors[part.name] = self._add_vectors(number, part)
            if context.training.gradient_checkpointing:
                self._checkpoint_activations(part.model)
            self._modules.append(part.model)
        self._finish(self._vectors)

    @staticmethod
    def captions(training: TrainingSpec) -> Captions:
        """Return captions that contain the new token."""
        spec = training.textual_inversion
        assert spec is not None
        return TokenTemplates(spec.placeholder_token, spec.learnable_property)

    @contextlib.contextmanager
    def trained(self) -> Iterator[TrainedEmbedding]:
        """Return a block in which the vectors can be written."""
        keys = {part.name: part.webui_key for part in self._parts}
        vectors = {name: value.detach() for name, value in self._vectors.items()}
        yield TrainedEmbedding(self._family, self._spec.placeholder_token, vectors, keys)

    def _add_vectors(self, number: int, part: TextPart) -> nn.Parameter:
        """Add rows for the new token to a text encoder, initialized as the manifest specifies."""
        token = self._spec.placeholder_token
        vectors = nn.Parameter(self._initial_vectors(number, part))
        try:
            part.add_token(token, vectors)
        except ValueError as error:
            raise ConfigError(
                f"training.textualInversion.placeholderToken: {error}; write another, e.g. <my-token>"
            ) from error
        return vectors

    def _initial_vectors(self, number: int, part: TextPart) -> Tensor:
        """Return the rows to start from, float32: those of the base, or copies of the initializer token's vector."""
        spec = self._spec
        width = part.core.embeddings.token_embedding.weight.shape[1]
        if spec.base is not None:
            files = find_embedding_files(Path(spec.base))
            return select_embedding(files, spec, part.name, number, part.webui_key, width)
        if spec.initializer_token is None:
            # The base is not needed when a checkpoint replaces these rows.
            return torch.zeros(spec.num_vectors, width)
        try:
            vector = part.embedding_of(spec.initializer_token)
        except ValueError as error:
            raise ConfigError(
                f"training.textualInversion.initializerToken: {error} of the base's text encoder; write a simpler word"
            ) from error
        return vector.float().repeat(spec.num_vectors, 1)
