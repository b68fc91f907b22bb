"""The summary of a validation's result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_operator.cli.output.validation_summary import describe_validation


def test_summary_names_losses_and_picture(tmp_path: Path) -> None:
    (tmp_path / "losses.json").write_text(json.dumps([{"step": 0, "loss": 0.2}, {"step": 50, "loss": 0.1}]))
    (tmp_path / "before-after.png").write_bytes(b"picture")
    assert list(describe_validation(tmp_path)) == [
        "held-out loss 0.2000 at step 0, 0.1000 at step 50 (-50%)",
        f"pictures before and after: {tmp_path}/before-after.png",
    ]


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[1]", '[{"step": 0}]', '[{"step": 0, "loss": 0.0}]'])
def test_summary_skips_invalid_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "losses.json").write_text(text)
    assert list(describe_validation(tmp_path)) == []


def test_summary_is_empty_without_validation(tmp_path: Path) -> None:
    assert list(describe_validation(tmp_path / "nowhere")) == []
