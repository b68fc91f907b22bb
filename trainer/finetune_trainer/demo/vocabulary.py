"""Builds the demo's CLIP tokenizer, in which every word of the captions is a single token.

Like CLIP's tokenizer it is a byte-level pair encoding, so other words are spelled in letters, and no word is unknown.
Called by `train_base` only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from finetune_trainer.demo.circles import PALETTE

Pair = tuple[str, str]

WORDS: Final = (
    *PALETTE,
    *("circle", "with", "background"),
    # Words for fine-tuning. They are not in the captions of the base.
    *("a", "the", "of", "in", "on", "and", "photo", "picture", "style", "square", "ring", "striped", "stripes"),
)

_END_OF_WORD: Final = "</w>"
_SPECIAL_TOKENS: Final = ("<|startoftext|>", "<|endoftext|>")


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Return the merges that make each of `words` a single token (byte pair encoding; Sennrich et al., ACL 2016).

    The most frequent pair is merged first, or the alphabetically first of several, until no pair remains.
    """
    spellings = [[*word[:-1], word[-1] + _END_OF_WORD] for word in sorted(set(words))]
    merges: list[Pair] = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def write_tokenizer(folder: Path, num_tokens: int) -> CLIPTokenizer:
    """Write the files of the tokenizer, and load it from them. It pads all texts to `num_tokens`, its longest input."""
    merges = learn_merges(WORDS)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, *_SPECIAL_TOKENS])}
    rules = "".join(f"{first} {second}\n" for first, second in merges)
    start, end = _SPECIAL_TOKENS
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "do_lower_case": True,
        "model_max_length": num_tokens,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + rules, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _merge(spelling: list[str], pair: Pair) -> list[str]:
    """Return the spelling with each occurrence of the pair joined, from the left."""
    joined: list[str] = []
    for symbol in spelling:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
