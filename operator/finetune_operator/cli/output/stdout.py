"""Writing to people who may have left, as in `finetune run job.yaml | head`: no reason to leave the job alone."""

from __future__ import annotations

import os
from typing import TextIO


def tell(stream: TextIO, text: str) -> None:
    """Write and flush; once the reader has left, write to nowhere."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
