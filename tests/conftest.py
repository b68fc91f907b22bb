"""Fixtures and the report of skipped tests, for all tests."""

import re

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["testing.controlplane.fixtures", "testing.objectstore.fixtures"]

# The duration of an example depends more on the machine than on the code.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

REMEDIES = {
    r"root|another user|small disk": "run the tests as root",
    r"real nodes|buildah|debootstrap|iptables|lua": "on Debian, run `make system-packages` as root",
    r"g\+\+": "install a C++ compiler, e.g. the package g++",
    r"IPEX": "run `make test-intel`",
    r"OpenVINO": "run `make test-export`",
    r"Kueue": "run `make test-queue`",
    r"core": "use a machine with at least two cores",
    r"glibc|C library": "use a system with glibc",
}
"""How to enable skipped tests, by a pattern of the reason for skipping them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests with the longest time limits first, so that the last minutes do not wait for one long test."""
    items.sort(key=_time_limit, reverse=True)


def _time_limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker and marker.args else 0.0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was skipped and how to enable it, as the last lines."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} tests were skipped on this machine")
    for report in skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        remedies = [remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, reason)]
        terminalreporter.write_line(f"{report.nodeid}: {reason}; to enable: {remedies[0] if remedies else reason}")
