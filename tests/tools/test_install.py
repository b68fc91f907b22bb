"""The installer leaves an environment alone that its lock file describes; the environment of old releases is locked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).parents[2]
PROJECT_LOCK = install.PROJECT_LOCK
OLDEST = "requirements/readers-oldest.txt"


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / lock).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^ ;]+)", text, re.M))


def test_environment_with_the_stamp_of_its_lock_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / ".installed"
    mark.write_text(install.stamp((install.BOOTSTRAP, OLDEST)))
    install.main(tmp_path, OLDEST)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == [mark]
    mark.write_text(install.stamp((install.BOOTSTRAP, install.PROJECT_LOCK, install.PROJECT)))
    install.main(tmp_path)
    assert capsys.readouterr().out == ""


def test_stamp_depends_on_each_file() -> None:
    stamps = {install.stamp((install.BOOTSTRAP, lock)) for lock in (OLDEST, install.PROJECT_LOCK)}
    assert len(stamps) == 2


def test_old_releases_are_those_that_the_docs_name_and_use_the_torch_of_the_tests() -> None:
    locked = pins(OLDEST)
    series = {name: locked[name].rpartition(".")[0] for name in ("diffusers", "transformers", "peft")}
    assert series == {"diffusers": "0.30", "transformers": "4.44", "peft": "0.12"}
    assert locked["torch"] == pins(install.PROJECT_LOCK)["torch"]
    docs = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert re.search(r"diffusers 0\.30 with transformers 4\.44\s+and peft 0\.12", docs)


def test_the_environment_with_ipex_has_the_versions_of_its_image() -> None:
    locked, image, own = pins("requirements/intel.txt"), pins("requirements/trainer-intel.txt"), pins(PROJECT_LOCK)
    assert (locked["torch"], locked["intel-extension-for-pytorch"]) == ("2.8.0", "2.8.0")
    assert {name: version for name, version in locked.items() if image.get(name, version) != version} == {}
    for name in ("diffusers", "transformers", "peft", "accelerate", "pytest", "hypothesis"):
        assert locked[name] == own[name]
