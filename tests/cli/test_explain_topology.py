"""`finetune explain-topology`: who runs where, on this machine and on one that a file of lscpu describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.cli.main import main
from tests.cpu.machines import REFERENCE, SUB_NUMA

EXAMPLE = Path(__file__).parents[2] / "examples/textual-inversion-4-cpu-nodes.yaml"


@pytest.fixture
def lscpu(tmp_path: Path) -> Path:
    """Return a file with the output of `lscpu -J -e` on the reference machine."""
    return write_lscpu(tmp_path / "lscpu.json", REFERENCE.cpus)


def write_lscpu(path: Path, cpus: Any) -> Path:
    rows = [{"cpu": c.number, "node": c.numa_node, "socket": c.socket, "core": c.core, "online": "yes"} for c in cpus]
    path.write_text(json.dumps({"cpus": rows}))
    return path


def explain(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["explain-topology", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def manifest(path: Path, topology: dict[str, Any]) -> Path:
    document = next(each for each in yaml.safe_load_all(EXAMPLE.read_text()) if each["kind"] == "FineTuneJob")
    document["spec"]["topology"] = {"accelerator": "cpu", **topology}
    path.write_text(yaml.safe_dump(document))
    return path


REFERENCE_CASE = """\
cat-toy: 4 nodes x 4 ranks; each node like the machine of the file: 2 sockets, 2 NUMA nodes, 112 cores, \
224 hardware threads, quota of 224 CPUs
placement: 2 ranks per socket
backend: ccl (the job requests it)
note: processesPerNode: 2 gives one rank per NUMA node

Ranks          Threads   Compute CPUs   Communication CPUs   Memory
0, 4, 8, 12    27        0-26           27                   NUMA node 0
1, 5, 9, 13    27        28-54          55                   NUMA node 0
2, 6, 10, 14   27        56-82          83                   NUMA node 1
3, 7, 11, 15   27        84-110         111                  NUMA node 1

Environment of rank 0 (ghcr.io/finetune-operator/trainer-cpu-intel:"""


def test_the_reference_case(capsys: pytest.CaptureFixture[str], lscpu: Path) -> None:
    code, out, err = explain(capsys, EXAMPLE, "--lscpu", lscpu)
    assert (code, err) == (0, "")
    assert out.startswith(REFERENCE_CASE)
    assert "  CCL_WORKER_AFFINITY=27,55,83,111\n" in out
    assert "  OMP_NUM_THREADS=27\n" in out


def test_a_limit_of_cpu_time(capsys: pytest.CaptureFixture[str], tmp_path: Path, lscpu: Path) -> None:
    job = manifest(tmp_path / "job.yaml", {"processesPerNode": 2, "resources": {"cpu": "56"}})
    code, out, _ = explain(capsys, job, "--lscpu", lscpu)
    assert code == 0
    assert "backend: gloo (auto, and the package oneccl_bindings_for_pytorch is not installed)" in out
    assert "0       28        0-55,112-167" in out
    assert "static CPU policy" in out


def test_one_rank_per_numa_node_is_recommended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_lscpu(tmp_path / "lscpu.json", SUB_NUMA.cpus)
    _, out, _ = explain(capsys, manifest(tmp_path / "job.yaml", {"processesPerNode": 2}), "--lscpu", file)
    assert "note: processesPerNode: 8 gives one rank per NUMA node" in out
    assert "placement: 4 NUMA nodes per rank" in out
    _, out, _ = explain(capsys, manifest(tmp_path / "job.yaml", {"processesPerNode": 8}), "--lscpu", file)
    assert "note:" not in out


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = explain(capsys, manifest(tmp_path / "job.yaml", {"nodes": 9}))
    assert code == 0
    assert "each node like this machine: " in out
    assert "0, 1, ..., 8" in out
    assert "network: interface " in out


def test_errors_name_the_file_or_the_field(capsys: pytest.CaptureFixture[str], tmp_path: Path, lscpu: Path) -> None:
    text = tmp_path / "lscpu.txt"
    text.write_text("Architecture: x86_64")
    code, _, err = explain(capsys, EXAMPLE, "--lscpu", text)
    assert code == 2
    assert f"--lscpu {text}: it is not JSON; write the output of `lscpu -J -e`" in err
    assert explain(capsys, EXAMPLE, "--lscpu", tmp_path / "none")[0] == 2
    job = manifest(tmp_path / "job.yaml", {"processesPerNode": 56, "cpu": {"coresForCommunication": 2}})
    code, _, err = explain(capsys, job, "--lscpu", lscpu)
    assert code == 2
    assert "spec.topology.cpu.coresForCommunication: 2 leaves no core to compute on" in err
