"""The rules of the data sets and images next to `dataset.source`. Part of the table in `spec`."""

from __future__ import annotations

from typing import Any

from finetune_contract.methods import CONDITIONED_METHODS, methods_where
from finetune_operator.api.rules.forms import no_web_address
from finetune_operator.api.rules.rule import FieldErrorReason, Rule, cel_list, join_names
from finetune_operator.api.rules.training import SPEC, TRAINING, VALIDATION

PROMPTED_METHODS = methods_where(lambda traits: "dreambooth" in traits.settings)
"""Methods whose captions are one prompt of the manifest."""

DATASET_RULES: tuple[Rule[Any], ...] = (
    no_web_address("spec.dataset.additional[].source", "lambdalabs/naruto-blip-captions"),
    no_web_address("spec.training.dreambooth.classImages", "owner/photos-of-dogs"),
    Rule(
        SPEC,
        "dataset.shuffleTags",
        f"!has(self.dataset.shuffleTags) || !has(self.training.method)"
        f" || !(self.training.method in {cel_list(PROMPTED_METHODS)})",
        lambda spec: spec.dataset.shuffle_tags is None or spec.training.method not in PROMPTED_METHODS,
        f"{join_names(PROMPTED_METHODS)} train on instancePrompt and read no captions; leave shuffleTags out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "validation.images",
        f"!has(self.validation) || self.validation.images.size() == 0"
        f" || has(self.method) && self.method in {cel_list(CONDITIONED_METHODS)}",
        lambda training: (
            training.validation is None or not training.validation.images or training.method in CONDITIONED_METHODS
        ),
        f"images are the conditioning images of {join_names(CONDITIONED_METHODS)}; leave images out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        VALIDATION,
        "images",
        "self.images.size() == 0 || self.images.size() == self.prompts.size()",
        lambda validation: not validation.images or len(validation.images) == len(validation.prompts),
        "images and prompts have different numbers of entries; write one image for each prompt, or leave images out",
    ),
    Rule(
        VALIDATION,
        "epochs",
        "!has(self.steps) || !has(self.epochs)",
        lambda validation: validation.steps is None or validation.epochs is None,
        "steps and epochs of the validation exclude each other; leave steps out, or leave epochs out",
        FieldErrorReason.FORBIDDEN,
    ),
)
"""Rules of additional data sets, tags, class images and conditioning images."""
