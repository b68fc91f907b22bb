"""Writes to streams that the reader may close, as in `finetune run job.yaml | head`. The job must continue then."""

from __future__ import annotations

import os
from typing import TextIO


def write_flushed(stream: TextIO, text: str) -> None:
    """Write and flush. If the reader has closed the pipe, redirect the stream to /dev/null."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)
