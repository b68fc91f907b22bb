"""The GPU kit as `make gpu-kit` makes it: what it contains, its faults, and a complete trial on a bare machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from testing.gpu_kit.children import descendants
from tools import gpu_kit

ROOT = Path(__file__).parents[2]
MACHINE_HAS = ("torch", "transformers", "accelerate", "peft")
TRIAL = (
    *("job_killed", "jobs_compared", "sdxl_lora_1024", "sdxl_controlnet_512_plain", "checkpoint", "preset_8GB"),
    "adamw8bit",
)
"""One measurement of each kind."""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit with the wheels of this environment: a download would need a network."""
    folder = tmp_path_factory.mktemp("kit") / "gpu-kit"
    assert gpu_kit.main(["--out", str(folder), "--installed"]) == 0
    # Measurements add some.
    assert not list(folder.rglob("__pycache__"))
    return folder


def brought_by(names: Iterator[str] | tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """Return packages and all that they depend on."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = [Requirement(text) for text in found[name].requires or ()]
        todo += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a machine that has what the kit expects, and neither the project nor what the kit brings."""
    folder = tmp_path_factory.mktemp("machine")
    packages = folder / "packages"
    packages.mkdir()
    for name, package in brought_by(MACHINE_HAS).items():
        if name not in gpu_kit.WHEELS:
            for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(str(package.locate_file(top)))
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "machine.pth").write_text(f"{packages}\n", encoding="utf-8")
    return folder / "venv" / "bin" / "python"


def clean_environment() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }


def test_a_kit_has_the_source_and_the_wheels_and_is_small(kit: Path) -> None:
    assert sorted(path.name for path in kit.iterdir()) == ["kit.json", "measure.py", "source", "wheels"]
    names = {path.name.split("-")[0].replace("_", "-") for path in (kit / "wheels").glob("*.whl")}
    assert names == set(gpu_kit.WHEELS)
    assert not names & {"torch", *MACHINE_HAS}
    for module in ("trainer/finetune_trainer/rank.py", "operator/finetune_operator/cli/main.py", "bench/train.py"):
        assert (kit / "source" / module).is_file()
    assert gpu_kit.size_of(kit) <= gpu_kit.MAX_BYTES == 60 * 2**20


def test_every_wheel_is_locked_with_its_hashes() -> None:
    entries = gpu_kit.locked((ROOT / gpu_kit.LOCK).read_text(encoding="utf-8"), gpu_kit.WHEELS)
    pins = re.findall(r"^([\w.-]+)==[^ ]+", entries, re.M)
    assert pins == list(gpu_kit.WHEELS)
    assert entries.count("--hash=sha256:") >= len(pins)
    with pytest.raises(gpu_kit.KitError, match=r"requirements/dev.txt lacks nothing-such; correct the list"):
        gpu_kit.locked("rich==1.0 \\\n    --hash=sha256:0\n", ["rich", "nothing-such"])


def test_a_kit_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.whl").write_bytes(bytes(3 * 2**20))
    gpu_kit.check_size(tmp_path, 3 * 2**20)
    with pytest.raises(gpu_kit.KitError, match=r"has 3.0 MiB; at most 2 MiB .* The largest: large.whl \(3.0 MiB\)"):
        gpu_kit.check_size(tmp_path, 2 * 2**20)


def test_a_folder_that_is_not_a_kit_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work.txt").write_text("kept", encoding="utf-8")
    assert gpu_kit.main(["--out", str(tmp_path), "--installed"]) == 1
    assert "is not a kit; write another folder with --out" in capsys.readouterr().err
    assert (tmp_path / "work.txt").read_text(encoding="utf-8") == "kept"


def test_a_kit_for_another_python_says_so_in_its_result(tmp_path: Path) -> None:
    (tmp_path / "measure.py").write_bytes((ROOT / "bench" / "gpu_kit" / "measure.py").read_bytes())
    (tmp_path / "kit.json").write_text('{"python": "3.99"}', encoding="utf-8")
    ended = subprocess.run([sys.executable, tmp_path / "measure.py"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    reason = json.loads(ended.stdout.splitlines()[-1])["errors"]["setup"]
    assert "the kit is for Python 3.99" in reason
    assert "use python3.99" in reason


FAKE = """
import json, os, signal, subprocess, sys
order = json.loads(sys.argv[1])
def record(**line):
    with open(order["records"], "a") as file:
        file.write(json.dumps(line) + chr(10))
if order["function"] == "preset":
    # A process that leaves the group, as those of a job do.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    record(values={"estimate_gib": 1.0})
    signal.pause()
if order["function"] == "training":
    record(values={"case": order["arguments"]["case"], "images_per_second": 3.0})
    print("out of luck", file=open(order["log"], "w"))
    os.kill(os.getpid(), signal.SIGSEGV)
record(values={"stall_ratio": 0.5})
record(done=True)
"""
"""Stand-in for the measurements: presets that hang, trainings that crash, and others that succeed."""
DRIVER = """
import sys
from testing.gpu_kit import children
children.ZYGOTE = (sys.executable, "-c", "raise SystemExit('no torch here')")
children.SINGLE = (sys.executable, {fake!r})
from bench.gpu_kit import driver
code = driver.main({arguments!r})
left = children.descendants(__import__("os").getpid())
sys.exit(code if not left else f"left behind: {{left}}")
"""


def fake_driver(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the real driver with stand-ins for the measurements."""
    fake = folder / "fake.py"
    fake.write_text(FAKE, encoding="utf-8")
    program = DRIVER.format(fake=str(fake), arguments=["--device", "cpu", "--out", str(folder / "out"), *arguments])
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_measurement_that_hangs_or_crashes_affects_no_other(tmp_path: Path) -> None:
    names = ("sdxl_lora_1024", "checkpoint", "preset_8GB", "adamw8bit")
    driver = fake_driver(tmp_path, "--stretch", "0.5", "--seconds", "1e5", "--only", *names)
    output, _ = driver.communicate()
    assert driver.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert re.fullmatch(r"not finished after \d+ s", result["errors"]["preset_8GB"])
    assert result["errors"]["sdxl_lora_1024"] == "the process died: out of luck"
    assert "no torch here" in result["errors"]["setup"]
    # What was known before the fault is kept, and what follows is measured.
    assert result["presets"] == {"8GB": {"estimate_gib": 1.0}}
    assert result["measurements"]["sdxl_lora_1024"]["images_per_second"] == 3.0
    assert result["checkpoint_stall_ratio"] == 0.5
    assert "adamw8bit" not in result["errors"]
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["checkpoint_stall_ratio"] == 0.5


def test_a_stopped_kit_prints_what_it_knows(tmp_path: Path) -> None:
    driver = fake_driver(tmp_path, "--stretch", "100", "--only", "checkpoint", "preset_8GB")
    assert driver.stdout is not None
    lines = []
    for line in driver.stdout:
        lines.append(line)
        if "] preset_8GB (at most" in line:
            driver.send_signal(signal.SIGTERM)
    assert driver.wait() == 0, lines
    result = json.loads(lines[-1])
    assert result["errors"]["preset_8GB"] == "the kit was stopped"
    assert result["checkpoint_stall_ratio"] == 0.5


@pytest.mark.trainer
@pytest.mark.timeout(900)
def test_the_kit_measures_everything_on_a_bare_machine(kit: Path, bare_python: Path, tmp_path: Path) -> None:
    env = clean_environment()
    for module in ("diffusers", "pydantic", "finetune_trainer", "bench"):
        command = [str(bare_python), "-c", f"import {module}"]
        found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
        assert b"ModuleNotFoundError" in found.stderr, f"the machine is not bare: it has {module}"
    before = set(descendants(os.getpid()))
    options = ["--device", "cpu", "--tiny", "--stretch", "100", "--out", "out", "--only", *TRIAL]
    ended = subprocess.run(
        [bare_python, kit / "measure.py", *options],
        cwd=tmp_path,
        env={**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert result["errors"] == {
        "adamw8bit": "bitsandbytes is not installed on this machine, and the kit does not contain it"
    }
    assert result["tiny"] is True
    assert result["failure_to_first_step_seconds"] > 0
    assert set(result["restart_phases"]) == {"rank", "pod"}
    assert "restoring" in result["restart_phases"]["rank"]
    assert result["weights"]["fp32-killed"] == {
        "bit_identical": True,
        "largest_difference": 0.0,
        "within_tolerance": True,
    }
    assert result["checkpoint_stall_ratio"] is not None
    measured = result["measurements"]
    assert measured["sdxl_lora_1024"]["images_per_second"] > 0
    assert measured["sdxl_lora_1024"]["profile"]["top"]
    assert measured["sdxl_controlnet_512_plain"]["images_per_second"] > 0
    assert measured["checkpoint"]["accelerate_seconds"] > 0
    assert measured["preset_8GB"]["estimate_gib"] > 0
    assert measured["preset_8GB"]["peak_gib"] > 0
    assert (tmp_path / "out" / "profiles" / "sdxl_lora_1024.json.gz").stat().st_size > 0
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["weights"] == result["weights"]
    assert set(descendants(os.getpid())) <= before
