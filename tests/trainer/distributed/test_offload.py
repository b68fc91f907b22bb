"""Slices in host memory: the same bytes as without offload, and only the computing module on the device."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune_contract import paths
from finetune_contract.spec import Method, Offload, Optimizer, Precision, Sharding, TrainingSpec
from finetune_trainer.distributed.sharding import ShardedGradients, Shards, offload_policy
from finetune_trainer.distributed.world import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.full import Full
from finetune_trainer.optim.optimizer import make_optimizer
from finetune_trainer.train.checks import check_spec
from finetune_trainer.train.preset import GIB, Hardware, Weights, choose
from testing.trainer import tiny
from testing.trainer.ranks import Ranks
from tests.trainer.checkpoint.test_sharding import assert_close, done, outputs, spec_of
from tests.trainer.train.test_memory import run_with

pytestmark = pytest.mark.trainer

GPU = torch.device("cuda", 0)
SDXL = Weights(2_567_000_000, 0, 2_567_000_000)


def shards_of(ranks: Ranks) -> dict[str, bytes]:
    """Return the slices in the newest checkpoint."""
    newest = max(paths.checkpoints(ranks.job_dir).glob("step-*"))
    slices = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    assert slices
    return slices


def test_offload_does_not_change_the_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    """Outputs and checkpoints of two ranks, with gradient checkpointing, validation and weight average."""
    runs = [
        done(
            Ranks(
                spec_of(base, data, "Full", offload=offload, gradientCheckpointing=True, validation={"split": "test"}),
                tmp_path / offload.value,
                world_size=2,
            )
        )
        for offload in Offload
    ]
    assert outputs(runs[0]) == outputs(runs[1])
    assert shards_of(runs[0]) == shards_of(runs[1])


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_three(base: Path, data: Path, tmp_path: Path) -> None:
    """Three ranks give the same bytes with and without offload. One rank with offload gives close values."""
    validation = {"prompts": ["x"], "numInferenceSteps": 1}
    spec = {offload: spec_of(base, data, "Full", offload=offload, validation=validation) for offload in Offload}
    killed = Ranks(spec[Offload.CPU], tmp_path / "killed", 1, 2, ("write shards", 1))
    assert -signal.SIGKILL in killed.run()

    def resume(offload: Offload, world_size: int) -> Ranks:
        folder = tmp_path / f"{offload.value}-{world_size}"
        shutil.copytree(killed.folder, folder)
        run = done(Ranks(spec[offload], folder, 2, world_size))
        assert any(report.get("restoredStep") == 2 for report in run.reports()), run.stderr()
        return run

    plain, offloaded, alone = resume(Offload.NONE, 3), resume(Offload.CPU, 3), resume(Offload.CPU, 1)
    assert outputs(plain) == outputs(offloaded)
    assert shards_of(plain) == shards_of(offloaded)
    assert_close(alone, plain)


@pytest.fixture(name="fake_ranks")
def _fake_ranks() -> Iterator[None]:
    """Create a process group of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.parametrize(("offload", "device_type"), [(Offload.CPU, "cpu"), (Offload.NONE, "cuda")])
def test_devices_of_slices_and_signals(monkeypatch: pytest.MonkeyPatch, offload: Offload, device_type: str) -> None:
    """Use fake tensors, which have a device but no data: operations across devices fail as on a real GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # Fake tensors cannot be pinned.
    monkeypatch.setattr(
        "finetune_trainer.distributed.sharding.offload_policy",
        lambda offload, device: offload_policy(offload, torch.device("cpu")),
    )
    # The mesh needs real data for its rank numbers.
    mesh = init_device_mesh("cuda", (2,))
    monkeypatch.setattr("finetune_trainer.distributed.sharding.init_device_mesh", lambda *_: mesh)
    with FakeTensorMode():
        module = nn.Sequential(nn.Linear(8, 8, device=GPU), nn.Linear(8, 4, device=GPU))
        world = World(rank=0, size=2, local_rank=0, device=GPU)
        shards = Shards([module], dict(module.named_parameters()), world, offload)
        assert {parameter.device.type for parameter in shards.parameters.values()} == {device_type}
        optimizer = make_optimizer(TrainingSpec(steps=1), shards.parameters)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        gradients = ShardedGradients(shards, world)
        gradients.reduce(world)
        norm = gradients.norm()
        gradients.scale(0.5)
        optimizer.step()
    assert norm.device == GPU
    assert gradients.signals.device == GPU
    for parameter in shards.parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.device.type == device_type
        assert {moment.device.type for moment in optimizer.state[parameter].values()} == {device_type}


def test_memory_is_pinned_for_a_gpu() -> None:
    on_gpu, on_cpu = (offload_policy(Offload.CPU, torch.device(kind)) for kind in ("cuda", "cpu"))
    assert isinstance(on_gpu, CPUOffloadPolicy)
    assert isinstance(on_cpu, CPUOffloadPolicy)
    assert on_gpu.pin_memory
    assert not on_cpu.pin_memory
    assert not isinstance(offload_policy(Offload.NONE, GPU), CPUOffloadPolicy)


def test_a_single_rank_has_one_slice_of_each_module(base: Path) -> None:
    """The modules are small, so that the device holds few weights at a time."""
    from finetune_trainer.models.base import open_base  # noqa: PLC0415  slow to import

    unet = open_base(tiny.make_spec(base, base).model).load_denoiser(torch.float32)
    complete = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    try:
        shards = Shards([unet], dict(unet.named_parameters()), world, Offload.CPU)
        assert all(torch.equal(shards.parameters[name], tensor) for name, tensor in complete.items())
        parts = [name for name, part in unet.named_modules() if isinstance(part, FSDPModule)]
        assert "down_blocks.1.attentions.0.transformer_blocks.0" in parts
        assert "up_blocks.0.resnets.1" in parts
        with shards.unsharded():
            assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in complete.items())
    finally:
        world.close()


def test_offload_without_sharding_is_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.offload: .* write sharding: full"):
        check_spec(tiny.make_spec(base, base, method="Full", offload="cpu"))


@pytest.mark.usefixtures("restored")
def test_a_step_out_of_memory_ends_with_a_message(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded step cannot be retried after a partial backward pass."""
    monkeypatch.setattr(Full, "losses", lambda *_: torch.empty(2**50))
    with pytest.raises(ConfigError, match=r"memory runs out with 2 samples at a time, .* write a smaller batchSize"):
        run_with(spec_of(base, data, "Full", offload="cpu"), tmp_path / "job")


REQUESTED = TrainingSpec(batch_size=4, resolution=1024, memory_preset="auto", steps=1, method=Method.FULL)


def gpus(gigabytes: int, num_ranks: int = 1, host_gigabytes: int = 128) -> Hardware:
    return Hardware(gigabytes * GIB, True, True, True, host_gigabytes * GIB, num_ranks)


PRESETS = [
    # GB, ranks: sharding, offload, micro-batch (of four samples), part of the explanation.
    (12, 1, Sharding.FULL, Offload.CPU, 1, "sharded, in host memory (66.9 GiB)"),
    (24, 1, Sharding.FULL, Offload.CPU, 4, "sharded, in host memory (66.9 GiB)"),
    (24, 4, Sharding.FULL, Offload.NONE, 1, "sharded over 4 ranks;"),
    (16, 4, Sharding.FULL, Offload.CPU, 2, "sharded over 4 ranks, in host memory (16.7 GiB per rank)"),
    (40, 1, Sharding.NONE, Offload.NONE, 4, "adafactor"),
    (80, 1, Sharding.NONE, Offload.NONE, 4, "adamw"),
]


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: f"{row[1]}x{row[0]}GB")
def test_a_preset_offloads_only_if_nothing_else_fits(row: tuple[int, int, Sharding, Offload, int, str]) -> None:
    gigabytes, num_ranks, sharding, offload, size, explanation = row
    choice = choose(REQUESTED, gpus(gigabytes, num_ranks), SDXL, may_shard=True)
    training = choice.training
    assert (training.sharding, training.offload, training.batch_size) == (sharding, offload, size)
    assert explanation in choice.explanation
    assert "may not be enough" not in choice.explanation


@pytest.mark.parametrize(
    ("host_gigabytes", "may_shard", "requested"),
    [
        (32, True, {}),
        (128, False, {}),
        (128, True, {"precision": Precision.FP16}),
        (128, True, {"optimizer": Optimizer.PRODIGY}),
    ],
)
def test_a_preset_does_not_offload_unsupported_settings(
    host_gigabytes: int, may_shard: bool, requested: dict[str, object]
) -> None:
    choice = choose(REQUESTED.model_copy(update=requested), gpus(24, 1, host_gigabytes), SDXL, may_shard=may_shard)
    assert choice.training.offload is Offload.NONE
    assert choice.explanation.endswith("which may not be enough")


def test_a_later_attempt_may_offload_a_sharded_run() -> None:
    """Slices are larger on fewer ranks, and a checkpoint does not depend on where they were stored."""
    for sharding, offload in ((Sharding.FULL, Offload.CPU), (Sharding.NONE, Offload.NONE)):
        noted = REQUESTED.model_copy(update={"sharding": sharding, "precision": Precision.BF16})
        assert choose(noted, gpus(24), SDXL, settled=True, may_shard=True).training.offload is offload
