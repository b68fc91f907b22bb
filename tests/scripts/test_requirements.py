"""Requirements of a script: installed once, for all ranks and attempts."""

from __future__ import annotations

import importlib.util
import subprocess
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.script import requirements
from finetune_trainer.script.requirements import FOLDER, folder_name, install

INFO = "tinypackage-1.0.dist-info"


@pytest.fixture(name="wheel")
def _wheel(tmp_path: Path) -> str:
    """Return the path of a package that pip installs without a network."""
    path = tmp_path / "tinypackage-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinypackage.py", "VALUE = 7\n")
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tinypackage\nVersion: 1.0\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return str(path)


def test_requirements_are_installed_once(wheel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    run = requirements._run_pip

    def counted(names: Sequence[str], folder: Path) -> None:
        calls.append(folder)
        run(names, folder)

    monkeypatch.setattr(requirements, "_run_pip", counted)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(lambda _: install([wheel], tmp_path / "cache"), range(2)))
    (folder,) = folders
    assert folder == tmp_path / "cache" / FOLDER / folder_name([wheel])
    assert (folder / "tinypackage.py").read_text(encoding="utf-8") == "VALUE = 7\n"
    assert len(calls) == 1


def test_an_installation_that_was_killed_is_repeated(wheel: str, tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / folder_name([wheel])
    folder.mkdir(parents=True)
    (folder / "part.py").touch()
    assert install([wheel], tmp_path) == folder
    assert not (folder / "part.py").exists()


def test_packages_of_the_image_are_not_installed_again(tmp_path: Path) -> None:
    folder = install(["pydantic"], tmp_path)
    assert folder is not None
    assert [path.name for path in folder.iterdir()] == [".installed"]


def test_the_pip_of_python_replaces_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    command = requirements.pip_command()
    assert Path(command[1]).parent.name.startswith("pip-")
    assert subprocess.run([*command, "--version"], capture_output=True, check=True).stdout.startswith(b"pip ")


def test_other_requirements_have_another_folder() -> None:
    assert folder_name(["a==1"]) != folder_name(["a==2"])


def test_no_requirements() -> None:
    assert install([], Path("/no/such/folder")) is None


def test_a_requirement_that_does_not_exist_is_an_error_of_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.script\.requirements: .*no-such"):
        install([str(tmp_path / "no-such-1.0-py3-none-any.whl")], tmp_path)


def test_an_index_that_cannot_be_reached_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(NetworkError, match="PIP_INDEX_URL in env names a mirror"):
        install(["some-package-that-needs-an-index==1.0"], tmp_path)
