"""Fixtures: the tiny base of the trainer's tests."""

from tests.trainer.conftest import base

__all__ = ["base"]
