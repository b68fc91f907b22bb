"""Checks of a script on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from finetune_contract import environment
from finetune_contract.script_spec import ScriptSpec


def find_script_problems(script: ScriptSpec) -> Iterator[str]:
    """Yield a message for each reason why a script cannot run on this machine."""
    if script.config_map is not None:
        yield (
            "spec.training.script.configMap: a local run has no ConfigMaps of a cluster; write path with the file of "
            "the script"
        )
    if script.path is None:
        return
    path, examples = Path(script.path), os.environ.get(environment.EXAMPLES)
    if path.is_file() or (len(path.parts) == 1 and examples and any(Path(examples).rglob(path.name))):
        return
    if len(path.parts) == 1:
        yield (
            f"spec.training.script.path: {path} does not exist, and {environment.EXAMPLES} names no folder with an "
            "example of this name; write the path of a file"
        )
    else:
        yield f"spec.training.script.path: {path} does not exist; write the path of a file"
