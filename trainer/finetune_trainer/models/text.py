"""Text encoders with their tokenizers: from captions to what the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TextEncoder(Protocol):
    """The text encoders of a base, as one."""

    parts: list[TextPart]
    """Encoder by encoder."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the UNet takes of captions, by name; first dimension n."""
        ...


class TextPart:
    """One CLIP text encoder with its tokenizer.

    Attributes:
        name: its folder in diffusers' layout.
        tokenizer: its tokenizer.
        model: the encoder.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self._new_tokens: dict[str, str] = {}

    @property
    def core(self) -> Any:
        """The transformer, below the projection where there is one."""
        return getattr(self.model, "text_model", self.model)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids (n, length) of captions, padded and cut to the encoder's length, on its device.

        Vector j of a new token has the id -1 - j: none of the base's own, and no end of text looks smaller.
        """
        size = len(self.core.embeddings.token_embedding.weight)
        for token, spelled in self._new_tokens.items():
            captions = [caption.replace(token, spelled) for caption in captions]
        ids: Tensor = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.core.config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids.to(self.model.device)
        if not self._new_tokens:
            return ids
        return torch.where(ids >= size, size - 1 - ids, ids)

    def add_token(self, token: str, vectors: nn.Parameter) -> None:
        """Let `token` in captions stand for vectors (k, width) beside the table.

        Raises:
            ValueError: the tokenizer knows it already.
        """
        pieces = [token, *(f"{token}_{number}" for number in range(1, len(vectors)))]
        known = len(self.tokenizer)
        if self.tokenizer.add_tokens(pieces) != len(pieces) or known != len(
            self.core.embeddings.token_embedding.weight
        ):
            raise ValueError(f"{token} is a token of the base already")
        self._new_tokens[token] = " ".join(pieces)
        self.core.embeddings.token_embedding = _TableWithRows(self.core.embeddings.token_embedding, vectors)

    def embedding_of(self, word: str) -> Tensor:
        """The table's vector (width,) of a word.

        Raises:
            ValueError: the word is not one token.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{word!r} is {len(ids)} tokens")
        vector: Tensor = self.core.embeddings.token_embedding.weight[ids[0]].detach()
        return vector


class _TableWithRows(nn.Module):
    """A frozen table of embeddings with a few trained rows beside it; only these get gradients.

    Training the whole table moves and decays 49,408 rows in every step for the sake of one
    (https://arxiv.org/abs/2208.01618 trains one vector).
    """

    def __init__(self, table: nn.Embedding, rows: nn.Parameter) -> None:
        super().__init__()
        self._table = table
        # In a list: the rows belong to the method, not to the encoder's own weights.
        self._rows = [rows]

    @property
    def weight(self) -> Tensor:
        """The base's own table."""
        return self._table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., width) of ids, where -1 - j is row j."""
        rows = self._rows[0].to(self._table.weight.dtype)
        known: Tensor = self._table(ids.clamp(min=0))
        return torch.where((ids < 0).unsqueeze(-1), rows[(-1 - ids).clamp(min=0)], known)


class SingleText:
    """Stable Diffusion 1.x and 2.x: the last hidden states of one encoder; see `TextEncoder`."""

    def __init__(self, part: TextPart) -> None:
        self.parts = [part]

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Hidden states (n, length, width) as `hidden`."""
        (part,) = self.parts
        return {"hidden": part.model(part.tokens(captions)).last_hidden_state}


class DualText:
    """SDXL: two encoders' penultimate hidden states, and the second's pooled output; see `TextEncoder`."""

    def __init__(self, parts: Sequence[TextPart], zero_empty: bool) -> None:
        self.parts = list(parts)
        self._zero_empty = zero_empty

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Hidden states (n, length, width 1 + width 2) as `hidden`, pooled output (n, width 2) as `pooled`.

        Both are zero for the empty caption where the base says so, in training as when pictures are drawn.
        """
        answers = [part.model(part.tokens(captions), output_hidden_states=True) for part in self.parts]
        hidden = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
        pooled = answers[-1].text_embeds
        if self._zero_empty:
            keep = torch.tensor([bool(caption) for caption in captions], device=hidden.device).to(hidden.dtype)
            hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return {"hidden": hidden, "pooled": pooled}
