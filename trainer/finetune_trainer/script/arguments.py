"""The command line of a script: its flags, and what the launcher adds to them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_trainer.script.source import ScriptFacts

STEP_FLAGS = ("max_train_steps", "max_steps", "num_train_steps", "train_steps", "num_steps", "total_steps")
EPOCH_FLAGS = ("num_train_epochs", "num_epochs", "epochs")
OUTPUT_FLAGS = ("output_dir", "project_dir", "out_dir", "save_dir")
FOLDER_FLAGS = ("train_data_dir", "instance_data_dir", "data_dir")
BASE_FLAG = "pretrained_model_name_or_path"
DATA_FLAGS = (*FOLDER_FLAGS, "dataset_name", "instance_data_root")
SEED_FLAG = "seed"


def to_argv(args: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return a command line: a list as it is; of a map each entry as `--name value`.

    True is a flag without a value. False and null leave the flag out. A list is a flag with several values.
    """
    if not isinstance(args, Mapping):
        return [str(each) for each in args]
    argv: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv += [_text(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    return argv


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # YAML reads 1e6 steps as a float; argparse's int refuses '1000000.0'.
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() and abs(value) >= 1 else str(value)


def find_flag(argv: Sequence[str], name: str) -> str | None:
    """Return the value of the last occurrence of a flag; '' if it has none, None if it is absent."""
    value = None
    for index, each in enumerate(argv):
        flag, has_value, rest = each.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name.replace("-", "_"):
            continue
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        value = rest if has_value else ("" if following.startswith("--") else following)
    return value


def without_flag(argv: Sequence[str], name: str) -> list[str]:
    """Return a command line without a flag and its value."""
    kept: list[str] = []
    follows = False
    for each in argv:
        flag, has_value, _ = each.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name.replace("-", "_"):
            follows = not has_value
        elif follows and not each.startswith("--"):
            follows = False
        else:
            follows = False
            kept.append(each)
    return kept


def with_flag(argv: Sequence[str], name: str, value: str) -> list[str]:
    """Return a command line in which a flag has a value."""
    return [*without_flag(argv, name), f"--{name}", value]


def place_output(argv: Sequence[str], facts: ScriptFacts, folder: Path) -> tuple[list[str], Path]:
    """Return the command line with an absolute output folder, and that folder.

    Args:
        argv: of the script.
        facts: of the script.
        folder: folder on the job's storage: the default, and the parent of a relative folder.
    """
    for name in OUTPUT_FLAGS:
        if value := find_flag(argv, name):
            path = folder / value
            return with_flag(argv, name, str(path)), path
    for name in OUTPUT_FLAGS:
        if name in facts.flags:
            return with_flag(argv, name, str(folder)), folder
    return list(argv), folder


def place_inputs(argv: Sequence[str], facts: ScriptFacts, model: ModelSpec, dataset: DatasetSpec) -> list[str]:
    """Return the command line with the base and the data set of the job, for flags that the user does not give.

    Only flags that the script declares are added.
    """
    values = {
        BASE_FLAG: model.base,
        "revision": model.revision,
        "variant": model.variant,
    }
    if not any(find_flag(argv, name) for name in DATA_FLAGS):
        flags = FOLDER_FLAGS if Path(dataset.source).exists() else ("dataset_name",)
        if name := next((each for each in flags if each in facts.flags), None):
            values[name] = dataset.source
    placed = list(argv)
    for name, value in values.items():
        if value is not None and name in facts.flags and find_flag(argv, name) is None:
            placed = with_flag(placed, name, value)
    return placed


@dataclass(frozen=True)
class ScriptBase:
    """The base of a script.

    Attributes:
        model: where it is.
        flag_is_given: whether the script receives it by diffusers' flag; otherwise it is only that of the manifest.
    """

    model: ModelSpec
    flag_is_given: bool


def find_base(argv: Sequence[str], model: ModelSpec) -> ScriptBase:
    """Return the base that the command line of a script names, or that of the manifest."""
    named = find_flag(argv, BASE_FLAG)
    known = model if named in (None, "", model.base) else ModelSpec(base=named)
    flags = {"revision": "revision", "variant": "variant", "vae": "pretrained_vae_model_name_or_path"}
    given = {field: value for field, flag in flags.items() if (value := find_flag(argv, flag))}
    return ScriptBase(known.model_copy(update=given), bool(named))


def place_seed(argv: Sequence[str], facts: ScriptFacts, seed: int) -> list[str]:
    """Return the command line with a seed if the script has a flag for it, no default, and the user gives none.

    Without a seed, some scripts choose their samples at random in each attempt.
    """
    if SEED_FLAG in facts.flags and facts.flags[SEED_FLAG] is None and find_flag(argv, SEED_FLAG) is None:
        return with_flag(argv, SEED_FLAG, str(seed))
    return list(argv)


def place_resume(argv: Sequence[str], facts: ScriptFacts, flag: str | None, found: Path | None) -> list[str]:
    """Return the command line that resumes a verified checkpoint, or begins if there is none.

    Without a verified checkpoint, a checkpoint that the user names is kept; the word `latest` is not, because the
    newest folder may be incomplete.

    Args:
        argv: of the script.
        facts: of the script.
        flag: name of the flag for a checkpoint; None: resume_from_checkpoint, if the script declares it.
        found: folder of the newest verified checkpoint.
    """
    name = (flag or "resume_from_checkpoint").lstrip("-")
    if flag is None and name not in facts.flags and find_flag(argv, name) is None:
        return list(argv)
    if found is not None:
        return with_flag(argv, name, str(found))
    return without_flag(argv, name) if find_flag(argv, name) == "latest" else list(argv)


def total_steps(argv: Sequence[str], facts: ScriptFacts) -> int | None:
    """Return the number of optimizer steps that the flags, or the defaults of the script, name."""
    for name in STEP_FLAGS:
        given = find_flag(argv, name)
        value = facts.flags.get(name) if given is None else given
        if value is not None and str(value).isdecimal() and int(value) > 0:
            return int(value)
    return None
