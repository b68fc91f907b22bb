"""A small version of the reference job: textual inversion on four nodes with two ranks each, on limited links."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_contract.exit_codes import ExitCode
from testing.measure.namespaces import switched
from testing.trainer import tiny
from testing.trainer.methods import SETTINGS
from testing.trainer.node_ranks import NodeRanks

NODES, PER_NODE, STEPS, LOST_AT = 4, 2, 4, 2

pytestmark = [
    pytest.mark.trainer,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="network namespaces need root"),
]


@pytest.fixture(name="nodes")
def _nodes() -> Iterator[list[str]]:
    with switched(f"t{os.getpid()}", NODES, "1gbit", "1ms") as names:
        yield names


def test_a_job_loses_a_node_continues_and_exports(base: Path, data: Path, tmp_path: Path, nodes: list[str]) -> None:
    spec = tiny.make_spec(base, data, **SETTINGS["TextualInversion"], steps=STEPS, gradientAccumulation=1)
    spec = spec.model_copy(update={"global_batch": NODES * PER_NODE})
    size = NODES * PER_NODE
    lost = NodeRanks(spec, tmp_path, 1, size, namespaces=nodes, lost_node=NODES - 1, lost_at=LOST_AT).start()
    lost.announce()
    codes = lost.wait()
    assert codes[-PER_NODE:] == [-9] * PER_NODE
    assert codes[:-PER_NODE] == [ExitCode.FABRIC] * (size - PER_NODE), lost.stderr()
    # The machine is gone, and another one takes its place.
    subprocess.run(["ip", "-n", nodes[-1], "link", "set", "eth0", "down"], check=True)
    subprocess.run(["ip", "-n", nodes[-1], "link", "set", "eth0", "up"], check=True)
    rest = NodeRanks(spec, tmp_path, 2, size, namespaces=nodes).start()
    rest.announce()
    assert rest.wait() == [ExitCode.DONE] * size, rest.stderr()
    assert [report["restoredStep"] for report in rest.reports() if "restoredStep" in report][-1] == LOST_AT
    assert (rest.job_dir / "outputs" / "learned_embeds.safetensors").is_file()
