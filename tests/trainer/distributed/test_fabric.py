"""The warning about network adapters that NCCL cannot use."""

from __future__ import annotations

import pytest

from finetune_trainer.distributed.fabric import PLUGIN, missing_plugin

EFA = {"FI_PROVIDER": "efa"}


def test_adapters_without_their_library_are_reported() -> None:
    """This machine has no plugin of NCCL."""
    warning = missing_plugin(EFA)
    assert warning is not None
    assert warning.startswith("topology.resources: the pods request vpc.amazonaws.com/efa")
    assert PLUGIN in warning and "--build-arg EFA=1" in warning


@pytest.mark.parametrize("env", [{}, {"FI_PROVIDER": "tcp"}, {**EFA, "NCCL_NET_PLUGIN": "mine"}])
def test_nothing_is_loaded_without_adapters_or_with_a_plugin_of_the_users_choice(env: dict[str, str]) -> None:
    loaded: list[str] = []
    assert missing_plugin(env, loaded.append) is None
    assert loaded == []


def test_the_library_is_loaded_as_nccl_does() -> None:
    loaded: list[str] = []
    assert missing_plugin(EFA, loaded.append) is None
    assert loaded == [PLUGIN]
