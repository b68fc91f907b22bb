"""Division of a pod's cores among its ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.supervisor.cores import CoreShare, ccl_environment, cgroup_quota, share_cores


@pytest.mark.parametrize(
    ("cores", "quota", "num_ranks", "expected"),
    [
        ({0, 1, 2, 3}, None, 2, [CoreShare(2, frozenset({0, 1})), CoreShare(2, frozenset({2, 3}))]),
        ({4, 5, 6}, None, 2, [CoreShare(1, frozenset({4})), CoreShare(1, frozenset({5}))]),
        ({0, 1, 2, 3}, 2.0, 2, [CoreShare(1, None), CoreShare(1, None)]),
        ({0}, None, 2, [CoreShare(1, None), CoreShare(1, None)]),
        ({0, 1}, 0.5, 1, [CoreShare(1, None)]),
        ({0, 1}, 4.0, 1, [CoreShare(2, frozenset({0, 1}))]),
    ],
)
def test_share_cores(cores: set[int], quota: float | None, num_ranks: int, expected: list[CoreShare]) -> None:
    assert share_cores(frozenset(cores), quota, num_ranks) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (
            CoreShare(4, frozenset({4, 5, 6, 7})),
            {"CCL_LOCAL_RANK": "1", "CCL_WORKER_AFFINITY": "7", "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"},
        ),
        (CoreShare(1, frozenset({3})), {"CCL_LOCAL_RANK": "1"}),
        (CoreShare(2, None), {"CCL_LOCAL_RANK": "1"}),
    ],
)
def test_oneccl_gets_a_core_without_compute_threads(share: CoreShare, expected: dict[str, str]) -> None:
    assert ccl_environment(share, 1) == expected


def test_cgroup_quota_of_both_versions(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    assert cgroup_quota(tmp_path) == 2.0
