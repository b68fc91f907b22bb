"""`finetune convert`: writes a manifest for a command line such as `accelerate launch train.py --flag ...`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import yaml_text
from finetune_operator.api.job import API_VERSION, KIND
from finetune_operator.api.names import MAX_JOB_NAME
from finetune_operator.api.validate import InvalidJob, parse_job
from finetune_operator.cli.commands.convert_recipe import method_of, to_recipe
from finetune_operator.cli.errors import Exit, UsageError

LAUNCHERS = frozenset({"accelerate", "launch", "python", "python3", "torchrun", "finetune"})
SWITCHES = frozenset(
    {
        *("multi_gpu", "cpu", "use_cpu", "same_network", "standalone", "no_python", "quiet", "debug"),
        *("use_fsdp", "use_deepspeed"),
    }
)
"""Options of launchers that take no value."""
LAUNCH_KEYS = frozenset(
    {
        *("compute_environment", "machine_rank", "main_process_ip", "main_process_port", "main_training_function"),
        *("num_machines", "num_processes", "rdzv_backend", "same_network", "use_cpu", "gpu_ids"),
    }
)
"""Keys of an accelerate config that spec.topology replaces."""
DATA_FLAGS = ("dataset_name", "train_data_dir", "instance_data_dir")
NONE = "none"
_PACKAGE = "; add {} to spec.training.script.requirements if the image lacks it"
_NOTES = {
    "use_8bit_adam": _PACKAGE.format("bitsandbytes"),
    "enable_xformers_memory_efficient_attention": _PACKAGE.format("xformers"),
    "optimizer=prodigy": _PACKAGE.format("prodigyopt"),
    "report_to=wandb": _PACKAGE.format("wandb") + ", and a Secret with WANDB_API_KEY to spec.secrets",
    "push_to_hub": "; add a Secret with HF_TOKEN to spec.secrets, or leave it out and add an output to hub://OWNER/NAME",
    "validation_image": "; the files must be in the image or on a volume",
}
"""What flags of the examples need in addition."""
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})")
_SECRET = re.compile(r"TOKEN$|KEY$|SECRET|PASSWORD")
"""Names of variables whose values a manifest must not contain."""
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        script: path of the script.
        args: its flags; a flag without a value is true, one with several values is a list.
        rest: its arguments as a list, if they are not flags only.
        options: options of the launcher.
        env: variables before the command, and exported ones that it does not contain.
        unknown: variables of the shell that the command contains and that have no value.
    """

    script: str
    args: dict[str, Any]
    rest: list[str] | None = None
    options: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def convert(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune convert`."""
    text = " ".join(arguments.line) if len(arguments.line) == 1 else shlex.join(arguments.line)
    line = parse_line(text)
    document, report = to_recipe(line.script, line.args, _topology(line)[0]) if arguments.recipe else to_script(line)
    document["metadata"] = {"name": arguments.name or job_name(line.script)}
    report += [f"to correct in the manifest: ${name} has no value here; write the value" for name in line.unknown]
    try:
        parse_job(document)
    except InvalidJob as error:
        report += [f"to correct in the manifest: {message}" for message in error.messages]
    text = yaml_text.dump(document)
    if arguments.to is None:
        sys.stdout.write(text)
    else:
        arguments.to.write_text(text, encoding="utf-8")
    sys.stderr.write("".join(f"{each}\n" for each in report))
    return Exit.SUCCEEDED


def parse_line(text: str, shell: Mapping[str, str] | None = None) -> CommandLine:
    """Parse a command line, with lines before it that set variables.

    Args:
        text: the lines.
        shell: variables of the shell; default: those of this process.

    Raises:
        UsageError: it contains no script.
    """
    exported, text = _split_exports(text)
    variables = {**(os.environ if shell is None else shell), **exported}
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise UsageError(f"the command line cannot be parsed: {error}") from error
    used = {name.strip("{}") for word in words for name in _VARIABLE.findall(word)}
    words = [_expand(word, variables) for word in words]
    env = {name: value for name, value in exported.items() if name not in used}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        env[match[1]] = match[2]
        words.pop(0)
    index = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    if index is None or (words[0] not in LAUNCHERS and index != 0):
        raise UsageError(
            "the command line names no script; write e.g. 'accelerate launch train_controlnet.py --seed 1'"
        )
    options = _options([word for word in words[:index] if word not in LAUNCHERS])
    args, rest = _flags(words[index + 1 :])
    return CommandLine(words[index], args, rest, options, env, tuple(sorted(used - variables.keys())))


def _split_exports(text: str) -> tuple[dict[str, str], str]:
    """Return the variables that the first lines set, and the rest of the lines."""
    variables: dict[str, str] = {}
    lines = text.splitlines(keepends=True)
    while lines:
        try:
            words = shlex.split(lines[0], comments=True)
        except ValueError:
            break
        found = [_ASSIGNMENT.fullmatch(word) for word in words[words[:1] == ["export"] :]]
        if not all(found):
            break
        variables |= {match[1]: _expand(match[2], variables) for match in found if match}
        lines.pop(0)
    return variables, "".join(lines)


def _expand(word: str, variables: Mapping[str, str]) -> str:
    """Return a word with the values of the variables that have one."""
    return _VARIABLE.sub(lambda match: variables.get(match[1].strip("{}"), match[0]), word)


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options of a launcher, with underscores."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].replace("-", "_", word[2:].count("-")).partition("=")
            found[name] = value
        elif name and name not in SWITCHES and not found[name]:
            found[name] = word
    return found


def _flags(words: Sequence[str]) -> tuple[dict[str, Any], list[str] | None]:
    """Return the flags of a script; also the words themselves if they contain something else than flags."""
    args: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            args[name] = _value(value) if has_value else True
        elif not name:
            return {}, list(words)
        else:
            old = args[name]
            added = _value(word)
            args[name] = added if old is True else [*(old if isinstance(old, list) else [old]), added]
    return args, None


def _value(text: str) -> Any:
    """Return a number if it is written back as the same text."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text:
            return number
    return text


def job_name(script: str) -> str:
    """Return a name for a job, from the name of its script."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")
    return (name if name[:1].isalpha() else f"job-{name}")[:MAX_JOB_NAME].rstrip("-")


def to_script(line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest that runs the script, and what became of each flag."""
    topology, report = _topology(line)
    args = dict(line.args)
    spec: dict[str, Any] = {"model": {"base": NONE}, "dataset": {"source": NONE}}
    if (base := args.pop("pretrained_model_name_or_path", None)) is not None:
        spec["model"]["base"] = base
        report.append("--pretrained_model_name_or_path: spec.model.base")
    for name in ("revision", "variant"):
        if name in args:
            spec["model"][name] = args.pop(name)
            report.append(f"--{name}: spec.model.{name}")
    if (name := next((each for each in DATA_FLAGS if each in args), "")) and not line.rest:
        spec["dataset"]["source"] = args.pop(name)
        report.append(f"--{name}: spec.dataset.source")
    for path in ("model.base", "dataset.source"):
        part, key = path.split(".")
        if spec[part][key] == NONE:
            report.append(f"spec.{path}: the command line has no flag for it, and the script does not need it")
    output = _place_output(args, report)
    _drop_flags(args, report)
    report += [
        f"--{name}: spec.training.script.args{_NOTES.get(f'{name}={value}') or _NOTES.get(name, '')}"
        for name, value in args.items()
    ]
    script = _script(line, args, report)
    if method := method_of(line.script):
        report.append(f"finetune convert --recipe writes a manifest for method {method.value}")
    spec["training"] = {"script": script}
    spec["topology"] = topology
    spec["checkpoint"] = {"storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}}}
    report.append("spec.checkpoint.storage: write the volume that the pods share")
    spec["outputs"] = [{"format": "asWritten", "to": output}]
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {}, "spec": spec}, report


def _script(line: CommandLine, args: dict[str, Any], report: list[str]) -> dict[str, Any]:
    """Return spec.training.script."""
    script: dict[str, Any] = {"path": line.script if "/" in line.script.lstrip("./") else Path(line.script).name}
    if line.rest is not None or args:
        script["args"] = line.rest if line.rest is not None else args
    if config := _accelerate_config(line.options, report):
        script["accelerateConfig"] = config
    secret = [name for name in line.env if _SECRET.search(name)]
    report += [f"{name}: left out; write a Secret with it in spec.secrets" for name in secret]
    if env := {name: value for name, value in line.env.items() if name not in secret}:
        script["env"] = env
        report += [f"{name}: spec.training.script.env" for name in env]
    return script


def _accelerate_config(options: Mapping[str, str], report: list[str]) -> dict[str, Any] | None:
    """Return the accelerate config that the options of the launcher name."""
    config: dict[str, Any] = {}
    if file := options.get("config_file"):
        try:
            found = yaml_text.load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"--config_file: {file} cannot be read ({error}); write the path of the file") from error
        if not isinstance(found, dict):
            raise UsageError(f"--config_file: {file} is not a file of accelerate config; write the path of one")
        config = found
        report.append("--config_file: spec.training.script.accelerateConfig")
    for name, kind in (("use_fsdp", "FSDP"), ("use_deepspeed", "DEEPSPEED")):
        if name in options:
            config["distributed_type"] = kind
            report.append(f"--{name}: spec.training.script.accelerateConfig.distributed_type")
    for name in (each for each in options if each.startswith("fsdp_")):
        config.setdefault("fsdp_config", {})[name] = _value(options[name])
        report.append(f"--{name}: spec.training.script.accelerateConfig.fsdp_config")
    return {name: value for name, value in config.items() if name not in LAUNCH_KEYS} or None


def _place_output(args: dict[str, Any], report: list[str]) -> str:
    """Make the output folder relative, so that it is on the job's storage; return its name."""
    given = args.get("output_dir")
    if not isinstance(given, str):
        return "out"
    name = Path(given).name or "out"
    if given.startswith(("/", "~", "..")):
        args["output_dir"] = name
        report.append(f"--output_dir: {given} became {name}, a folder on the job's storage")
    report.append(f"--output_dir: also spec.outputs, which copies the result to {name}")
    return name


def _drop_flags(args: dict[str, Any], report: list[str]) -> None:
    """Remove the flags that the job replaces."""
    if args.get("resume_from_checkpoint") == "latest":
        del args["resume_from_checkpoint"]
        report.append("--resume_from_checkpoint: left out; a job resumes its newest verified checkpoint by itself")
    if args.pop("hub_token", None) is not None:
        report.append("--hub_token: left out; write a Secret with HF_TOKEN in spec.secrets")
    if args.pop("local_rank", None) is not None:
        report.append("--local_rank: left out; spec.topology defines the ranks")


def _topology(line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Return the topology of a launcher's options, and what became of each of them."""
    topology: dict[str, Any] = {}
    report: list[str] = []
    options = dict(line.options)
    machines = _number(options.pop("num_machines", "") or options.pop("nnodes", ""))
    total = _number(options.pop("num_processes", ""))
    each = _number(options.pop("nproc_per_node", ""))
    if machines > 1:
        topology["nodes"] = machines
        report.append("number of machines: spec.topology.nodes")
    each = each or total // max(1, machines)
    if each > 1:
        topology["processesPerNode"] = each
        report.append("number of processes: spec.topology.processesPerNode")
    if any(name in options for name in ("cpu", "use_cpu")):
        topology["accelerator"] = "cpu"
        report.append("--cpu: spec.topology.accelerator")
    if precision := options.pop("mixed_precision", ""):
        line.env.setdefault("ACCELERATE_MIXED_PRECISION", precision)
    placed = {"cpu", "use_cpu", "config_file", "use_fsdp", "use_deepspeed"}
    left = [name for name in options if name not in placed and not name.startswith("fsdp_")]
    report += [f"--{name}: left out; an option of the launcher, which spec.topology replaces" for name in left]
    return topology, report


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
