"""Real oneCCL in ranks that real supervisors start, with exactly the environment that they set.

The ranks are a small C++ program in place of torch with the Python binding, whose wheel is on no ordinary index. An
empty package stands for the binding, so that the supervisor starts the ranks. `make test-intel` installs oneCCL.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_contract import environment
from finetune_contract.cpu.backend import CCL_BINDING
from finetune_contract.cpu.placement import PlacementRequest, place_ranks
from finetune_contract.cpu.spec import CpuBackend, CpuSpec
from finetune_contract.cpu.sysfs import read_machine
from finetune_contract.exit_codes import ExitCode
from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrainingSpec

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("allreduce.cpp")
PREFIX = Path(sys.prefix)
DEADLINE_SECONDS = 200.0

pytestmark = pytest.mark.skipif(
    not (PREFIX / "include/oneapi/ccl.hpp").is_file(),
    reason="the packages oneccl, oneccl-devel and impi-rt are not installed here; make test-intel installs them",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the program of a rank."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = tmp_path_factory.mktemp("program") / "allreduce"
    libraries = ["-L", str(PREFIX / "lib"), "-lccl", f"-Wl,-rpath,{PREFIX / 'lib'}", "-Wl,--allow-shlib-undefined"]
    command = ["g++", "-O1", "-std=c++17", "-I", str(PREFIX / "include"), str(SOURCE), "-o", str(target), *libraries]
    subprocess.run(command, check=True)
    return target


class Gang:
    """Supervisors of several pods on this machine."""

    def __init__(self, folder: Path, program: Path, num_nodes: int, ranks_per_node: int) -> None:
        self.folder, self.program = folder, program
        self.num_nodes, self.ranks_per_node = num_nodes, ranks_per_node
        (folder / "packages" / CCL_BINDING).mkdir(parents=True)
        (folder / "packages" / CCL_BINDING / "__init__.py").write_text("")
        spec = RunSpec(
            namespace="default",
            job="circles",
            uid="1f0c3a2b-0000",
            model=ModelSpec(base="base"),
            dataset=DatasetSpec(source="data"),
            training=TrainingSpec(),
            global_batch=num_nodes * ranks_per_node,
            cpu=CpuSpec(backend=CpuBackend.CCL),
        )
        (folder / "run.json").write_text(spec.to_json())

    def run(self, command: list[str] | None = None, **extra: str) -> list[tuple[int, str]]:
        """Return the exit code and the output of each supervisor.

        Args:
            command: command of a rank; None: the program.
            extra: other environment variables.
        """
        rank = command or [str(self.program), str(self.folder / "kvs")]
        paths = [str(self.folder / "packages"), str(ROOT / "trainer"), str(ROOT / "operator")]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer.supervisor", "--", *rank],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    # Intel's packages leave it to their users to add this folder.
                    "LD_LIBRARY_PATH": str(PREFIX / "lib"),
                    environment.RUN_SPEC: str(self.folder / "run.json"),
                    environment.ATTEMPT: "1",
                    environment.POD_NAME: f"circles-a1-n{node}",
                    environment.POD_UID: f"uid-{node}",
                    environment.NODE_RANK: str(node),
                    environment.NUM_NODES: str(self.num_nodes),
                    environment.PROCESSES_PER_NODE: str(self.ranks_per_node),
                    environment.BACKEND: "ccl",
                    "MASTER_ADDR": "127.0.0.1",
                    **extra,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(self.num_nodes)
        ]
        try:
            outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), [(1, 2), (1, 4), (2, 2)])
def test_the_ranks_of_supervisors_sum(num_nodes: int, ranks_per_node: int, program: Path, tmp_path: Path) -> None:
    ends = Gang(tmp_path, program, num_nodes, ranks_per_node).run()
    assert [code for code, _ in ends] == [ExitCode.DONE] * num_nodes, ends[0][1][-3000:]
    size = num_nodes * ranks_per_node
    places = place_ranks(read_machine(), PlacementRequest(ranks_per_node, has_worker_threads=True)).ranks
    for node, (_, output) in enumerate(ends):
        assert "backend ccl: the job requests it" in output
        assert "provider tcp, interface lo: all ranks run on this machine" in output
        for local_rank, place in enumerate(places):
            found = re.search(rf"\[rank {node * ranks_per_node + local_rank}\] sum (\d+) (\w+) affinity (\S+)", output)
            assert found is not None, output[-3000:]
            assert found.groups()[:2] == (str(size), "right")
            cpus = place.compute or sorted(os.sched_getaffinity(0))
            assert found[3] == ",".join(map(str, cpus))


def test_oneccl_refuses_a_list_without_an_entry_for_each_rank_of_the_pod(program: Path, tmp_path: Path) -> None:
    """Why every rank gets the list of all: this is what a list with the CPU of one rank does."""
    ((code, output),) = Gang(tmp_path, program, 1, 2).run(CCL_WORKER_AFFINITY="0")
    assert code not in (ExitCode.DONE, ExitCode.SAVED)
    assert "unexpected number of values" in output


@pytest.mark.skipif(
    not os.environ.get("FINETUNE_TEST_CCL") or importlib.util.find_spec(CCL_BINDING) is None,
    reason="needs oneccl_bind_pt, which is on no ordinary index, and FINETUNE_TEST_CCL=1",
)
def test_the_python_binding_sums(tmp_path: Path) -> None:
    """The binding itself, with the ranks of a supervisor and the trainer's own code to join the world."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, torch\n"
        "from finetune_trainer.distributed.world import join_world\n"
        "world = join_world(os.environ)\n"
        "total = world.sum(torch.full((1000,), float(world.rank + 1)))\n"
        "right = bool((total == world.size * (world.size + 1) / 2).all())\n"
        "print('sum', world.size, 'right' if right else 'wrong', torch.distributed.get_backend())\n"
        "world.close()\n"
    )
    gang = Gang(tmp_path, Path(sys.executable), 1, 2)
    shutil.rmtree(tmp_path / "packages")
    (tmp_path / "kvs").symlink_to(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ((code, output),) = gang.run(MASTER_PORT=str(port))
    assert code == ExitCode.DONE, output[-3000:]
    assert output.count("sum 2 right ccl") == 2


@pytest.mark.parametrize("is_forked", [False, True])
def test_ranks_run_with_the_preloaded_openmp_runtime(is_forked: bool, tmp_path: Path) -> None:
    """Forked ranks have the libraries of the fork server: it loads them first, because a running process cannot."""
    assert (PREFIX / "lib/libiomp5.so").is_file()
    gang = Gang(tmp_path, Path(sys.executable), 1, 2)
    module = tmp_path / "packages" / "openmp_rank.py"
    module.write_text(
        "import os, re, torch\n"
        "torch.ones(1 << 20).add_(1)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('runtime', 'libiomp5.so' in maps, os.environ['KMP_BLOCKTIME'], torch.get_num_threads())\n"
    )
    if not is_forked:
        (tmp_path / "kvs").symlink_to(module)
    ((code, output),) = gang.run(command=[sys.executable, "-m", "openmp_rank"] if is_forked else None)
    assert code == ExitCode.DONE, output[-3000:]
    (threads,) = {place.num_threads for place in place_ranks(read_machine(), PlacementRequest(2)).ranks}
    assert output.count(f"runtime True 1 {threads}") == 2, output[-3000:]
    assert "OpenMP runtime: libiomp5" in output
    assert "not forked" not in output
    assert "without the fork server" not in output
