"""Sharded training (FSDP2): real ranks over gloo, and shards that another number of ranks reads."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from finetune_contract import paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Sharding
from finetune_trainer.checkpoint.shards import ShardReader
from finetune_trainer.checkpoint.split import file_name
from finetune_trainer.checkpoint.store.tensor_stream import write_stream
from finetune_trainer.data.sampling.order import micro_batches, most_micro_batches, rank_share
from finetune_trainer.delivery.claims import MANIFEST
from finetune_trainer.distributed.sharding import slice_offset
from finetune_trainer.errors import StorageError
from finetune_trainer.export.formats.card import CARD
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

TOLERANCE = 1e-4
"""Relative difference of the weights after six steps on another number of ranks: the sums have another order."""


def write_shards(folder: Path, tensors: dict[str, Tensor], world_size: int) -> list[Path]:
    """Write the files that this number of ranks would write."""
    files = []
    for rank in range(world_size):
        mine, offsets = {}, {}
        for name, tensor in tensors.items():
            offset = slice_offset(tuple(tensor.shape), rank, world_size)
            rows = tensor.chunk(world_size)[rank] if rank < len(tensor.chunk(world_size)) else tensor[:0]
            if rows.numel():
                mine[name], offsets[name] = rows.contiguous(), offset
        if mine:
            files.append(folder / file_name("shards", rank, world_size))
            write_stream(files[-1], mine, offsets)
    return files


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_any_number_of_ranks_can_read_shards(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, written_by: int, read_by: int
) -> None:
    complete = torch.arange(num_rows * 3, dtype=torch.float32).view(num_rows, 3)
    reader = ShardReader(write_shards(tmp_path_factory.mktemp("shards"), {"w": complete}, written_by))
    assert reader.shape("w") == (num_rows, 3)
    slices = complete.chunk(read_by)
    for rank in range(read_by):
        like = slices[rank] if rank < len(slices) else complete[:0]
        assert torch.equal(reader.read("w", slice_offset((num_rows, 3), rank, read_by), like), like)


def test_error_names_the_missing_rows(tmp_path: Path) -> None:
    complete = torch.zeros(8, 2)
    files = write_shards(tmp_path, {"w": complete}, 4)
    reader = ShardReader([files[0], *files[2:]])
    with pytest.raises(StorageError, match="rows 2 to 8 of w are missing in all files"):
        reader.read("w", (0, 0), complete)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_distributed_checkpoint_reads_the_shards(tmp_path: Path) -> None:
    tensors = {"model.w": torch.randn(5, 3), "optimizer.w.exp_avg": torch.randn(5, 3)}
    write_shards(tmp_path, tensors, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp_load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5))
def test_all_ranks_have_at_most_one_pass_less(global_batch: int, world_size: int, batch_size: int) -> None:
    num_passes = [
        len(list(micro_batches(rank_share(3, global_batch, rank, world_size), batch_size)))
        for rank in range(world_size)
    ]
    assert max(num_passes) == most_micro_batches(global_batch, world_size, batch_size) <= min(num_passes) + 1


def spec_of(base: Path, data: Path, method: str, sharding: Sharding = Sharding.FULL, **training: Any) -> RunSpec:
    return tiny.make_spec(base, data, method=method, ema=True, learningRate=1e-3, sharding=sharding, **training)


def outputs(ranks: Ranks) -> dict[str, bytes]:
    """Return the bytes of each file of the outputs, without those that describe the settings of the run."""
    folder = ranks.job_dir / paths.OUTPUTS
    written = [path for path in folder.rglob("*") if path.is_file() and path.name not in (CARD, MANIFEST)]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in written}
    assert any(name.endswith(".safetensors") for name in files), sorted(files)
    return files


def weights(ranks: Ranks) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((ranks.job_dir / paths.OUTPUTS).rglob("*.safetensors")):
        if "text_encoder" not in str(path) and "vae" not in str(path):
            found.update(load_file(path))
    return found


def assert_close(one: Ranks, other: Ranks) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    reference = torch.cat([theirs[name].flatten() for name in ours])
    assert float(difference.norm() / reference.norm()) < TOLERANCE


def done(ranks: Ranks) -> Ranks:
    codes = ranks.run()
    assert codes == [ExitCode.DONE] * ranks.world_size, [ranks.stderr(rank) for rank in range(ranks.world_size)]
    return ranks


@pytest.fixture(scope="module")
def uninterrupted(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Return an uninterrupted sharded run on two ranks."""
    return done(Ranks(spec_of(base, data, "Full"), tmp_path_factory.mktemp("sharded") / "job", world_size=2))


@pytest.mark.trainer
def test_sharded_training_matches_replicated_training(
    base: Path, data: Path, tmp_path: Path, uninterrupted: Ranks
) -> None:
    replicated = done(Ranks(spec_of(base, data, "Full", Sharding.NONE), tmp_path / "job", world_size=2))
    ours, theirs = outputs(uninterrupted), outputs(replicated)
    assert ours.keys() == theirs.keys()
    # Config files contain class names, which must not be those of sharded modules.
    configs = [name for name in ours if name.endswith(".json")]
    assert configs
    assert all(ours[name] == theirs[name] for name in configs)
    assert_close(uninterrupted, replicated)
    newest = max(paths.checkpoints(uninterrupted.job_dir).glob("step-*"))
    names = {path.name for path in newest.iterdir()}
    assert names == {
        *("shards-00001-of-00002.safetensors", "shards-00002-of-00002.safetensors"),
        *("state.json", "manifest.json"),
    }


@pytest.mark.trainer
@pytest.mark.parametrize("victim", [0, 1])
def test_resume_of_a_killed_sharded_run_keeps_bytes(
    base: Path, data: Path, tmp_path: Path, uninterrupted: Ranks, victim: int
) -> None:
    """One rank is killed while it writes its shard; all ranks resume from the previous checkpoint."""
    spec = spec_of(base, data, "Full")
    killed = Ranks(spec, tmp_path / "job", 1, 2, ("write shards", 1), victim)
    codes = killed.run()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == ExitCode.FABRIC, killed.stderr(1 - victim)
    again = done(Ranks(spec, tmp_path / "job", 2, 2))
    began = next(report["restoredStep"] for report in again.reports() if "restoredStep" in report)
    assert began == 2
    assert outputs(again) == outputs(uninterrupted)


@pytest.mark.trainer
@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_resumes_a_sharded_checkpoint(
    base: Path, data: Path, tmp_path: Path, uninterrupted: Ranks, world_size: int
) -> None:
    spec = spec_of(base, data, "Full")
    stopped = Ranks(spec, tmp_path / "job", 1, 2, ("write shards", 1))
    assert -signal.SIGKILL in stopped.run()
    resized = done(Ranks(spec, tmp_path / "job", 2, world_size))
    assert any(report.get("restoredStep") == 2 for report in resized.reports())
    assert_close(resized, uninterrupted)


@pytest.mark.trainer
def test_resume_of_a_sharded_controlnet_keeps_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    spec = spec_of(base, data, "ControlNet")
    expected = done(Ranks(spec, tmp_path / "expected", world_size=2))
    assert -signal.SIGKILL in Ranks(spec, tmp_path / "job", 1, 2, ("write shards", 2)).run()
    again = done(Ranks(spec, tmp_path / "job", 2, 2))
    assert outputs(again) == outputs(expected)


@pytest.mark.trainer
def test_sharding_without_shared_storage_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    ranks = Ranks(spec_of(base, data, "Full"), tmp_path / "job", world_size=2, own_disks=True)
    assert set(ranks.run()) == {ExitCode.STORAGE}
    assert "ranks [1] cannot access rank 0's checkpoints" in ranks.stderr()
