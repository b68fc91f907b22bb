"""Names of the files that an output is sure to have, known before anything is trained."""

from __future__ import annotations

from finetune_contract.methods import METHODS, TrainedPart
from finetune_contract.outputs.spec import FileContainer, OutputFormat, OutputLayout, OutputSpec
from finetune_contract.spec import Method
from finetune_trainer.delivery.claims import MANIFEST
from finetune_trainer.export.formats.card import CARD
from finetune_trainer.export.formats.diffusers_folder import EMBEDDING_NAME, INDEX, LORA_NAME

_ONE_FILE = (OutputFormat.SINGLE_FILE, OutputFormat.WEBUI, OutputFormat.COMFYUI, OutputFormat.KOHYA)
_PIPELINES = (OutputFormat.MERGED, OutputFormat.OPENVINO, OutputFormat.COMPILED)
_OF_PART = {
    TrainedPart.BASE: INDEX,
    TrainedPart.ADAPTER: LORA_NAME,
    TrainedPart.TOKENS: EMBEDDING_NAME.format(""),
    TrainedPart.CONTROLNET: "config.json",
}


def expected_names(output: OutputSpec, job: str, method: Method | None) -> tuple[str, ...]:
    """Return the names of files that an output will have; empty if none is known.

    Args:
        output: the output.
        job: name of the job.
        method: what trains; None: a script.
    """
    if output.format is OutputFormat.AS_WRITTEN:
        return ()
    if output.format in _ONE_FILE or output.layout is OutputLayout.SINGLE_FILE:
        return (f"{job}.{'ckpt' if output.container is FileContainer.CKPT else 'safetensors'}",)
    # Nothing is known of a script that a card could say.
    known = () if method is None else (CARD, MANIFEST)
    if output.format in _PIPELINES or output.full:
        return (*known, INDEX)
    return known if method is None else (*known, _OF_PART[METHODS[method].trains])
