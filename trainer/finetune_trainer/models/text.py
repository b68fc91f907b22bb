"""Text encoders with their tokenizers: from captions to the text conditions of the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TextEncoder(Protocol):
    """All text encoders of a base."""

    parts: list[TextPart]
    """The single encoders."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text conditions of n captions, by name, each (n, ...)."""
        ...


class TextPart:
    """One CLIP text encoder with its tokenizer.

    Attributes:
        name: its folder in diffusers' layout.
        tokenizer: its tokenizer.
        model: the encoder.
        webui_key: name of its vectors in the web UIs' embedding files.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any, webui_key: str) -> None:
        self.name = name
        self.webui_key = webui_key
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self._new_tokens: dict[str, str] = {}

    @property
    def core(self) -> Any:
        """The transformer, without the projection that some encoders have."""
        return getattr(self.model, "text_model", self.model)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return the token ids (n, length) of captions, padded and cut to the encoder's length, on its device.

        Vector j of a new token has the id -1 - j. It differs from all ids of the base, and the end-of-text token keeps
        the largest id, by which CLIP finds it.
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
        """Map `token` in captions to new vectors (k, width), which are kept outside the embedding table.

        Raises:
            ValueError: the tokenizer already has this token.
        """
        pieces = [token, *(f"{token}_{number}" for number in range(1, len(vectors)))]
        known = len(self.tokenizer)
        if self.tokenizer.add_tokens(pieces) != len(pieces) or known != len(
            self.core.embeddings.token_embedding.weight
        ):
            raise ValueError(f"{token} is already a token of the base")
        self._new_tokens[token] = " ".join(pieces)
        self.core.embeddings.token_embedding = _TableWithRows(self.core.embeddings.token_embedding, vectors)

    def embedding_of(self, word: str) -> Tensor:
        """Return the vector (width,) of a word in the embedding table.

        Raises:
            ValueError: the word is not a single token.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{word!r} is {len(ids)} tokens")
        vector: Tensor = self.core.embeddings.token_embedding.weight[ids[0]].detach()
        return vector


class _TableWithRows(nn.Module):
    """A frozen embedding table with a few additional trained rows; only these rows get gradients.

    Training the complete table would update and decay 49,408 rows in every step, although only the new ones are used
    (https://arxiv.org/abs/2208.01618 trains one vector).
    """

    def __init__(self, table: nn.Embedding, rows: nn.Parameter) -> None:
        super().__init__()
        self._table = table
        # A list hides the rows from torch: they are parameters of the method, not of the encoder.
        self._rows = [rows]

    @property
    def weight(self) -> Tensor:
        """The base's table, without the additional rows."""
        return self._table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., width) of ids, where -1 - j is row j."""
        rows = self._rows[0].to(self._table.weight.dtype)
        known: Tensor = self._table(ids.clamp(min=0))
        return torch.where((ids < 0).unsqueeze(-1), rows[(-1 - ids).clamp(min=0)], known)


class SingleText:
    """Stable Diffusion 1.x and 2.x: the last hidden states of one encoder; see `TextEncoder`."""

    def __init__(self, part: TextPart) -> None:
        self.parts = [part]

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the hidden states (n, length, width) as `hidden`."""
        (part,) = self.parts
        return {"hidden": part.model(part.tokens(captions)).last_hidden_state}


class DualText:
    """SDXL: penultimate hidden states of two encoders, and the pooled output of the second; see `TextEncoder`."""

    def __init__(self, parts: Sequence[TextPart], zero_empty: bool) -> None:
        self.parts = list(parts)
        self._zero_empty = zero_empty

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return hidden states (n, length, width 1 + width 2) as `hidden`, pooled output (n, width 2) as `pooled`.

        If the base is configured so, both are zero for the empty caption, in training and in sampling.
        """
        outputs = [part.model(part.tokens(captions), output_hidden_states=True) for part in self.parts]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[-1].text_embeds
        if self._zero_empty:
            keep = torch.tensor([bool(caption) for caption in captions], device=hidden.device).to(hidden.dtype)
            hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return {"hidden": hidden, "pooled": pooled}
