"""The environment of `accelerate launch --config_file`, for FSDP, DeepSpeed and mixed precision.

accelerate's own launcher turns the config into variables, so that they are those of the installed version.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.errors import ConfigError

FIELD = "training.script.accelerateConfig"
PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")
"""Variables that configure accelerate. The others that its launcher sets belong to the start of the ranks."""
USE_CPU = "ACCELERATE_USE_CPU"
ON_CPUS = {"FSDP_VERSION": "2", "FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
"""On CPUs, torch saves a wrong state of the optimizer with FSDP 1: the first moments are those of the second ones. The
other two need a GPU; the hook gives all ranks the weights of rank 0 instead."""


def read_environment(config: Mapping[str, Any], *, world_size: int, on_cpu: bool) -> dict[str, str]:
    """Return the variables of a config.

    Args:
        config: contents of a file that `accelerate config` writes.
        world_size: number of ranks.
        on_cpu: whether the ranks use no GPU.

    Raises:
        ConfigError: accelerate refuses the config, or a package that it needs is not installed.
    """
    kind = str(config.get("distributed_type", "")).upper()
    if kind == "DEEPSPEED":
        _check_deepspeed(on_cpu)
    if str(config.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise ConfigError(f"{FIELD}: compute_environment must be LOCAL_MACHINE; leave it out")
    # A single machine: the launcher only reads the variables, and the topology defines the ranks.
    given = {**config, "num_processes": world_size, "num_machines": 1, "machine_rank": 0, "main_process_port": 0}
    with tempfile.TemporaryDirectory(prefix="accelerate-config-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", **given, "use_cpu": False}), "utf-8")
        try:
            found = _launch_environment(path)
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
            raise ConfigError(f"{FIELD}: accelerate refuses it: {' '.join(str(error).split())}") from error
    changed = {name: value for name, value in found.items() if os.environ.get(name) != value}
    chosen = {name: value for name, value in changed.items() if name.startswith(PREFIXES) and name != USE_CPU}
    return chosen | (ON_CPUS if on_cpu and chosen.get("ACCELERATE_USE_FSDP") == "true" else {})


def _check_deepspeed(on_cpu: bool) -> None:
    if on_cpu:
        raise ConfigError(f"{FIELD}: accelerate uses DEEPSPEED on GPUs only; write distributed_type: FSDP")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{FIELD}: distributed_type DEEPSPEED needs the package deepspeed, which is not installed; add deepspeed "
            "to training.script.requirements, or write distributed_type: FSDP"
        )


def _launch_environment(path: Path) -> dict[str, str]:
    """Return the complete environment that accelerate's launcher gives to the ranks."""
    from accelerate.commands import launch  # noqa: PLC0415  the script's requirements choose its version
    from accelerate.utils import launch as environments  # noqa: PLC0415

    args = launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, defaults, has_precision = launch._validate_launch_command(args)
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return dict(environments.prepare_deepspeed_cmd_env(args)[1])
    if args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
        return dict(environments.prepare_multi_gpu_env(args))
    return dict(environments.prepare_simple_launcher_cmd_env(args)[1])
