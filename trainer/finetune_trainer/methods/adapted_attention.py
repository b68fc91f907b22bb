"""Attention of diffusers' UNets whose queries, keys and values are computed by groups of adapted layers.

Called by `adapter_bank`. It replaces diffusers' attention processor where the block has nothing but projections and
attention, which is the case in the UNets of Stable Diffusion; other attention keeps diffusers' processor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from finetune_trainer.methods.adapter_group import AdapterGroup

QUERIES_KEYS_VALUES = ("to_q", "to_k", "to_v")
KEYS_VALUES = ("to_k", "to_v")
_TEXT = "encoder_hidden_states"
"""Name of the argument of denoisers, and of attention blocks, with the input of the cross-attentions."""


class PassAnchor(Protocol):
    """The bank of the adapters; see `AdapterBank`."""

    anchor: Tensor


class AdaptedAttention:
    """An attention block with adapted layers; used as its attention processor.

    Args:
        block: diffusers' attention block.
        grouped: its layers with a common input: queries, keys and values, or keys and values of a cross-attention.
    """

    def __init__(self, block: Any, grouped: Sequence[Any]) -> None:
        self.block = block
        self.grouped = list(grouped)
        self._keys_values: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self._query: Callable[[Tensor], Tensor] | None = None

    def use_group(self, group: AdapterGroup, bank: PassAnchor) -> None:
        """Compute the grouped layers from the block's input or text."""
        self.use_keys_values(lambda x: group.heads(x, bank.anchor, self.block.heads))

    def use_keys_values(self, project: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Compute the grouped layers, each (n, heads, tokens, channels), by a function of the block's input or text."""
        self._keys_values = project
        self.block.set_processor(self)

    def use_query(self, group: AdapterGroup, bank: PassAnchor) -> None:
        """Compute the queries of a cross-attention by a group of one layer."""
        self._query = lambda x: group.heads(x, bank.anchor, self.block.heads)[0]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Return the output of the block, of the shape of `hidden_states` (n, tokens, channels)."""
        del temb
        query, key, value = self._project(hidden_states, encoder_hidden_states)
        mask = None
        if attention_mask is not None:
            count = len(hidden_states)
            mask = attn.prepare_attention_mask(attention_mask, key.shape[2], count)
            mask = mask.view(count, attn.heads, -1, mask.shape[-1])
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        result: Tensor = attn.to_out[1](output)
        return result

    def _project(self, hidden_states: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        assert self._keys_values is not None
        if not self.block.is_cross_attention:
            return self._keys_values(hidden_states)
        assert text is not None
        if self._query is not None:
            query = self._query(hidden_states)
        else:
            query = self.block.to_q(hidden_states).unflatten(-1, (self.block.heads, -1)).transpose(1, 2)
        return query, *self._keys_values(text)


class TextProjections:
    """Keys and values of all cross-attentions of a pass, computed from the same text by one product for each width.

    They are computed before the first block: with gradient checkpointing, a block must not compute them for others.
    """

    def __init__(self, bank: PassAnchor) -> None:
        self._bank = bank
        self._groups: list[tuple[AdapterGroup, int]] = []
        self._text: Tensor | None = None
        self._outputs: list[tuple[Tensor, ...]] = []

    def add(self, group: AdapterGroup, attentions: Sequence[AdaptedAttention]) -> None:
        """Compute keys and values of attention blocks with equal shapes by a group, block after block."""
        position, num_heads = len(self._groups), attentions[0].block.heads
        self._groups.append((group, num_heads))
        for index, attention in enumerate(attentions):
            attention.use_keys_values(self._part(group, position, len(KEYS_VALUES) * index, num_heads))

    def _part(
        self, group: AdapterGroup, position: int, first: int, num_heads: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        own = group.part(first, len(KEYS_VALUES))

        def project(text: Tensor) -> tuple[Tensor, ...]:
            if text is self._text:
                return self._outputs[position][first : first + len(KEYS_VALUES)]
            # The denoiser has changed the text on the way to its blocks.
            return own.heads(text, self._bank.anchor, num_heads)

        return project

    def start(self, text: Tensor) -> None:
        """Compute all keys and values of a pass."""
        self._text = text
        self._outputs = [group.heads(text, self._bank.anchor, heads) for group, heads in self._groups]

    def clear(self) -> None:
        """Release the memory after a pass."""
        self._text, self._outputs = None, []


def takes_text(denoiser: nn.Module) -> bool:
    """Return whether the text for all cross-attentions is an argument of the forward pass."""
    return list(inspect.signature(denoiser.forward).parameters)[2:3] == [_TEXT]


def find_attention(denoiser: nn.Module, can_be_grouped: Callable[[Any], bool]) -> Iterator[AdaptedAttention]:
    """Yield each attention block of a denoiser whose layers with a common input can be grouped.

    Args:
        denoiser: the module to search.
        can_be_grouped: whether a layer has an adapter that a group can compute.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: PLC0415  slow to import

    for module in denoiser.modules():
        if (
            isinstance(module, Attention)
            and type(module.processor) is AttnProcessor2_0
            and _has_only_projections(module)
        ):
            names = KEYS_VALUES if module.is_cross_attention else QUERIES_KEYS_VALUES
            layers = [getattr(module, name) for name in names]
            if all(map(can_be_grouped, layers)) and _have_equal_shapes(layers):
                yield AdaptedAttention(module, layers)


def _has_only_projections(attention: Any) -> bool:
    absent = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        all(getattr(attention, name, None) in {None, False} for name in absent)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and getattr(attention, "to_out", None) is not None
    )


def _have_equal_shapes(layers: list[Any]) -> bool:
    """Return whether weights, biases and adapters of the layers have equal shapes."""
    return (
        len({layer.base_layer.weight.shape for layer in layers}) == 1
        and len({layer.base_layer.bias is None for layer in layers}) == 1
        and len({layer.lora_A["default"].weight.shape for layer in layers}) == 1
    )
