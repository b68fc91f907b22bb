"""What is said of a validation's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_operator.cli.output.validation_summary import looks


def test_losses_and_picture_are_told(tmp_path: Path) -> None:
    (tmp_path / "losses.json").write_text(json.dumps([{"step": 0, "loss": 0.2}, {"step": 50, "loss": 0.1}]))
    (tmp_path / "before-after.png").write_bytes(b"picture")
    assert list(looks(tmp_path)) == [
        "held-out loss 0.2000 at step 0, 0.1000 at step 50 (-50%)",
        f"pictures before and after: {tmp_path}/before-after.png",
    ]


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[1]", '[{"step": 0}]', '[{"step": 0, "loss": 0.0}]'])
def test_files_that_say_nothing_are_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "losses.json").write_text(text)
    assert list(looks(tmp_path)) == []


def test_a_job_without_validation_has_none(tmp_path: Path) -> None:
    assert list(looks(tmp_path / "nowhere")) == []
