"""Attention of diffusers' UNets whose queries, keys and values are computed by groups of adapted layers.

Called by `lora`. It replaces diffusers' attention processor where the block has nothing but projections and attention,
which is the case in the UNets of Stable Diffusion; other attention keeps diffusers' processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Projections = Callable[[Tensor], tuple[Tensor, ...]]

QUERIES_KEYS_VALUES = ("to_q", "to_k", "to_v")
KEYS_VALUES = ("to_k", "to_v")


class AdaptedAttentionProcessor:
    """An attention processor of diffusers.

    Args:
        project: returns queries, keys and values of a self-attention, or keys and values of a cross-attention.
        is_self_attention: which of the two.
    """

    def __init__(self, project: Projections, is_self_attention: bool) -> None:
        self._project = project
        self._is_self_attention = is_self_attention

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
        if self._is_self_attention:
            query, key, value = self._project(hidden_states)
        else:
            assert encoder_hidden_states is not None
            query, (key, value) = attn.to_q(hidden_states), self._project(encoder_hidden_states)
        query, key, value = (_by_head(part, attn.heads) for part in (query, key, value))
        mask = None
        if attention_mask is not None:
            count = len(hidden_states)
            mask = attn.prepare_attention_mask(attention_mask, key.shape[2], count)
            mask = mask.view(count, attn.heads, -1, mask.shape[-1])
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        result: Tensor = attn.to_out[1](output)
        return result


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """View (n, tokens, channels) as (n, heads, tokens, channels of a head)."""
    return rows.view(*rows.shape[:2], heads, -1).transpose(1, 2)


def find_groups(denoiser: nn.Module, can_be_grouped: Callable[[Any], bool]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each attention block of a denoiser with its layers that have a common input, if it has only projections.

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
                yield module, layers


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
