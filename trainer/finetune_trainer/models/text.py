"""Text encoders with their tokenizers: from captions to the text conditions of the denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune_contract.spec import LongCaptions, TrainingSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.transfers import to_device

TOKENS = "tokens."
"""Prefix of the names of token ids; the name of the text encoder follows."""
_IS_NOT_EMPTY = f"{TOKENS}is_not_empty"
NUM_CHUNKS = 3
"""Chunks of a long caption, as in kohya's scripts with 225 tokens."""


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the argument of transformers' `from_pretrained` for a dtype: before 4.56 it has another name."""
    major, minor = (int(each) for each in version("transformers").split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


@dataclass(frozen=True)
class TextSettings:
    """How captions become text conditions.

    Attributes:
        clip_skip: number of last layers of each text encoder to skip, in addition to those that the base skips.
        num_chunks: number of chunks of a caption, each as long as the text encoder's input.
    """

    clip_skip: int = 0
    num_chunks: int = 1

    @staticmethod
    def of(training: TrainingSpec) -> TextSettings:
        """Return the settings of a job."""
        is_chunked = training.long_captions is LongCaptions.CHUNK
        return TextSettings(training.clip_skip, NUM_CHUNKS if is_chunked else 1)

    @property
    def key(self) -> tuple[str, ...]:
        """Parts of a cache key; none for the defaults, so that caches of earlier releases stay valid."""
        return () if self == TextSettings() else (str(self),)


class TextEncoder(Protocol):
    """All text encoders of a base."""

    parts: list[TextPart]
    """The single encoders."""

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text conditions of n captions, by name, each (n, ...)."""
        ...

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what `encode_tokens` needs of n captions, by name, on the encoders' device."""
        ...

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the text conditions, as `encode`. It computes on the device only, so that a GPU can replay it."""
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

    def tokens(self, captions: Sequence[str], num_chunks: int = 1) -> Tensor:
        """Return the token ids (n * num_chunks, length) of captions, padded and cut, on the encoder's device.

        Vector j of a new token has the id -1 - j. It differs from all ids of the base, and the end-of-text token keeps
        the largest id, by which CLIP finds it.
        """
        size = len(self.core.embeddings.token_embedding.weight)
        for token, spelled in self._new_tokens.items():
            captions = [caption.replace(token, spelled) for caption in captions]
        length = self.core.config.max_position_embeddings
        if num_chunks == 1:
            ids: Tensor = self.tokenizer(
                list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
        else:
            words = self.tokenizer(list(captions), add_special_tokens=False).input_ids
            ids = torch.tensor([row for each in words for row in self._chunks(each, num_chunks, length)])
        ids = to_device(ids, self.model.device)
        if not self._new_tokens:
            return ids
        return torch.where(ids >= size, size - 1 - ids, ids)

    def _chunks(self, ids: Sequence[int], num_chunks: int, length: int) -> list[list[int]]:
        """Cut the tokens of a caption into chunks, each in the form of a complete caption (num_chunks, length)."""
        own, tokenizer = length - 2, self.tokenizer
        parts = [list(ids[start : start + own]) for start in range(0, num_chunks * own, own)]
        rows = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        return [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]

    def hidden(self, states: Tensor, num_chunks: int) -> Tensor:
        """Join the hidden states of chunks (n * num_chunks, length, width): one start, all tokens, one end.

        The same order as in kohya's scripts, whose long captions this follows.
        """
        if num_chunks == 1:
            return states
        chunks = states.unflatten(0, (-1, num_chunks))  # type: ignore[no-untyped-call]
        inner = chunks[:, :, 1:-1].flatten(1, 2)
        return torch.cat([chunks[:, 0, :1], inner, chunks[:, -1, -1:]], dim=1)

    def check_clip_skip(self, clip_skip: int, base_skip: int) -> None:
        """Check that the encoder has the layers to skip.

        Raises:
            ConfigError: it has fewer.
        """
        most = self.core.config.num_hidden_layers - base_skip
        if clip_skip > most:
            raise ConfigError(
                f"training.clipSkip: {self.name} of the base has {most} layers to skip; write at most {most}"
            )

    def add_token(self, token: str, vectors: nn.Parameter) -> None:
        """Map `token` in captions to new vectors (k, width), which are kept outside the embedding table.

        Raises:
            ValueError: the tokenizer already has this token.
        """
        pieces = [token, *(f"{token}_{number}" for number in range(1, len(vectors)))]
        known = len(self.core.embeddings.token_embedding.weight)
        self.tokenizer.add_tokens(pieces)
        # Some releases of transformers count existing tokens as added: only the size of the vocabulary is reliable.
        if len(self.tokenizer) != known + len(pieces):
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

    def __init__(self, part: TextPart, settings: TextSettings = TextSettings()) -> None:
        part.check_clip_skip(settings.clip_skip, 0)
        self.parts = [part]
        self._settings = settings

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text conditions of captions."""
        return self.encode_tokens(self.tokenize(captions))

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the token ids of captions."""
        return _tokenize(self.parts, captions, self._settings)

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the hidden states (n, length, width) as `hidden`, normalized, also if layers are skipped."""
        (part,) = self.parts
        skip, num_chunks = self._settings.clip_skip, self._settings.num_chunks
        output = part.model(tokens[TOKENS + part.name], output_hidden_states=skip > 0)
        states = part.core.final_layer_norm(output.hidden_states[-1 - skip]) if skip else output.last_hidden_state
        return {"hidden": part.hidden(states, num_chunks)}


class DualText:
    """SDXL: penultimate hidden states of two encoders, and the pooled output of the second; see `TextEncoder`."""

    def __init__(self, parts: Sequence[TextPart], zero_empty: bool, settings: TextSettings = TextSettings()) -> None:
        for part in parts:
            part.check_clip_skip(settings.clip_skip, 1)
        self.parts = list(parts)
        self._zero_empty = zero_empty
        self._settings = settings

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the text conditions of captions."""
        return self.encode_tokens(self.tokenize(captions))

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the token ids of captions, and which captions are not empty if the base distinguishes them."""
        tokens = _tokenize(self.parts, captions, self._settings)
        if self._zero_empty:
            device = tokens[TOKENS + self.parts[0].name].device
            tokens[_IS_NOT_EMPTY] = to_device(torch.tensor([bool(caption) for caption in captions]), device)
        return tokens

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return hidden states (n, length, width 1 + width 2) as `hidden`, pooled output (n, width 2) as `pooled`.

        If the base is configured so, both are zero for the empty caption, in training and in sampling. The pooled
        output of a long caption is that of its first chunk.
        """
        skip, num_chunks = self._settings.clip_skip, self._settings.num_chunks
        outputs = [part.model(tokens[TOKENS + part.name], output_hidden_states=True) for part in self.parts]
        states = [
            part.hidden(output.hidden_states[-2 - skip], num_chunks)
            for part, output in zip(self.parts, outputs, strict=True)
        ]
        hidden = torch.cat(states, dim=-1)
        pooled = outputs[-1].text_embeds[::num_chunks]
        if self._zero_empty:
            keep = tokens[_IS_NOT_EMPTY].to(hidden.dtype)
            hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return {"hidden": hidden, "pooled": pooled}


def _tokenize(parts: Sequence[TextPart], captions: Sequence[str], settings: TextSettings) -> dict[str, Tensor]:
    return {TOKENS + part.name: part.tokens(captions, settings.num_chunks) for part in parts}


def count_cut(tokenizers: Sequence[Any], captions: Sequence[str], settings: TextSettings) -> int:
    """Return the number of captions that are longer than the text encoders' input.

    Args:
        tokenizers: those of all text encoders; none: nothing is cut.
        captions: the captions; long lists are fast, because a token has at least one byte.
        settings: the number of chunks.
    """
    if not tokenizers:
        return 0
    longest = min(tokenizer.model_max_length for tokenizer in tokenizers)
    room = settings.num_chunks * (longest - 2)
    candidates = [caption for caption in captions if len(caption.encode()) > room]
    if not candidates:
        return 0
    lengths = [
        [len(ids) for ids in tokenizer(candidates, add_special_tokens=False).input_ids] for tokenizer in tokenizers
    ]
    return sum(max(each) > room for each in zip(*lengths, strict=True))
