"""The check of images for bytecode, and the places where it runs."""

from __future__ import annotations

import compileall
import importlib.util
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[2] / "images"
SPEC = importlib.util.spec_from_file_location("check_bytecode", IMAGES / "check_bytecode.py")
assert SPEC is not None
assert SPEC.loader is not None
check_bytecode = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_bytecode)


def test_modules_without_bytecode_fail_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "package"
    (package / "tests").mkdir(parents=True)
    for name in ("a.py", "b.py", "tests/c.py"):
        (package / name).write_text("x = 1\n")
    assert check_bytecode.main([str(package)]) == 1
    assert f"not compiled: {package / 'a.py'}" in capsys.readouterr().err
    compileall.compile_dir(package, quiet=1)
    assert check_bytecode.main([str(package)]) == 0
    (package / "d.py").write_text("y = 1\n")
    assert check_bytecode.main([str(package)]) == 1
    assert check_bytecode.main([str(tmp_path / "missing")]) == 1


@pytest.mark.parametrize("image", sorted(IMAGES.glob("trainer-*.Dockerfile")), ids=lambda path: path.name)
def test_every_install_of_a_trainer_image_compiles_and_is_checked(image: Path) -> None:
    text = image.read_text("utf-8")
    installs = text.replace("\\\n", " ").split("uv pip install")[1:]
    assert installs
    assert all("--compile-bytecode" in install.split("&&")[0].split(";")[0] for install in installs)
    assert "python -m compileall" in text
    assert "python images/check_bytecode.py" in text
