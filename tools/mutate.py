"""Remove one element of a decision table at a time and check that a test fails.

The tables decide what the operator does: policies (decide, wake, act), causes of an attempt's end, rules of the spec
(CEL and Python), rules of edits, and unsupported combinations. An element that can be removed without a failing test
is not tested. Usage:

    python -m tools.mutate [--sample N] [--only TABLE] [--workers N]

Each removal runs in a separate process, which applies it before pytest collects. The last line is JSON:
{"removed": number of removals, "unnoticed": number of removals that no test noticed}. Exit code 1 if any is unnoticed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.rules import edits, spec, supported
from finetune_operator.plan import registry
from finetune_operator.plan.model import causes

ROOT = Path(__file__).resolve().parents[1]
API_TESTS = ("tests/api/test_validate.py", "tests/api/test_edits.py", "tests/api/test_advice.py")
PLAN_TESTS = ("tests/plan",)
NOTICED, UNNOTICED = 1, 0
"""Exit codes of pytest: some tests failed; all passed."""


@dataclass(frozen=True)
class Removal:
    """One element that can be removed."""

    table: str
    name: str
    apply: Callable[[], None]
    tests: Sequence[str]

    @property
    def label(self) -> str:
        """Name of the removal in the output, e.g. 'policies: capacity.wake'."""
        return f"{self.table}: {self.name}"


def removals() -> list[Removal]:
    """Return every possible removal, table by table."""
    return [
        *_policy_parts(),
        *_elements("causes", causes.TABLE, lambda row: "consequence" if row.consequence else "cause", PLAN_TESTS),
        *_elements("rules", spec.RULES, lambda rule: f"{rule.path} {rule.cel}"[:90], API_TESTS),
        *_elements("edits", edits.FIXED, lambda fixed: fixed.path, API_TESTS),
        *_elements("unsupported", supported.MISSING, lambda missing: missing.field, (*API_TESTS, *PLAN_TESTS)),
    ]


def _policy_parts() -> Iterator[Removal]:
    """Yield each part of each policy: its decision, its wake-up time, its actions."""
    for policy in registry.POLICIES:
        for field in dataclasses.fields(policy):
            if field.default is dataclasses.MISSING or getattr(policy, field.name) == field.default:
                continue
            without = dataclasses.replace(policy, **{field.name: field.default})
            changed = tuple(without if other is policy else other for other in registry.POLICIES)
            apply = _replacing(registry.POLICIES, changed)
            yield Removal("policies", f"{policy.name}.{field.name}", apply, _plan_tests(policy.name))


def _plan_tests(policy: str) -> tuple[str, ...]:
    """Return the tests of the plan, those of the policy first: the first failure ends a run."""
    own = f"tests/plan/policies/test_{policy}.py"
    return (own, *PLAN_TESTS) if (ROOT / own).exists() else PLAN_TESTS


def _elements(table: str, rows: tuple[Any, ...], name: Callable[[Any], str], tests: Sequence[str]) -> Iterator[Removal]:
    for index, row in enumerate(rows):
        apply = _replacing(rows, rows[:index] + rows[index + 1 :])
        yield Removal(table, f"{index} {name(row)}", apply, tests)


def _replacing(old: tuple[Any, ...], new: tuple[Any, ...]) -> Callable[[], None]:
    """Return a function that replaces a table in every module that refers to it."""

    def apply() -> None:
        replaced = 0
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("finetune_operator."):
                for attribute, value in list(vars(module).items()):
                    if value is old:
                        setattr(module, attribute, new)
                        replaced += 1
        assert replaced, "no module refers to this table"

    return apply


def spread(found: list[Removal], sample: int | None) -> list[Removal]:
    """Return `sample` removals at equal distances, or all."""
    if sample is None or sample >= len(found):
        return found
    return [found[position * len(found) // sample] for position in range(sample)]


def run_one(index: int) -> int:
    """Apply a removal in this process and run its tests; return pytest's exit code."""
    removal = removals()[index]
    removal.apply()
    return int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not cluster", *removal.tests]))


def check(index: int) -> tuple[int, str, float]:
    """Run one removal in a separate process; return the exit code, the test that noticed it, and the seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tools.mutate", "--run", str(index)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if result.returncode not in (NOTICED, UNNOTICED) and not failed:
        sys.exit(f"pytest ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result.returncode, failed[0].split(" - ")[0] if failed else "", time.monotonic() - started


def check_all(chosen: Sequence[tuple[int, Removal]], num_workers: int) -> list[Removal]:
    """Run the removals and print progress; return those that no test noticed."""
    unnoticed = []
    with ThreadPoolExecutor(num_workers) as pool:
        results = pool.map(lambda item: check(item[0]), chosen)
        for number, ((_, removal), (code, test, seconds)) in enumerate(zip(chosen, results, strict=True), start=1):
            verdict = test or "NO TEST FAILED"
            print(f"[{number}/{len(chosen)}] {removal.label}: {verdict} ({seconds:.0f} s)", flush=True)
            if code == UNNOTICED:
                unnoticed.append(removal)
    return unnoticed


def print_table(chosen: Sequence[tuple[int, Removal]], unnoticed: Sequence[Removal]) -> None:
    """Print the numbers of each table."""
    print(f"\n{'table':<14}{'removed':>8}{'unnoticed':>11}")
    for table in dict.fromkeys(removal.table for _, removal in chosen):
        removed = sum(removal.table == table for _, removal in chosen)
        missed = sum(removal.table == table for removal in unnoticed)
        print(f"{table:<14}{removed:>8}{missed:>11}")
    for removal in unnoticed:
        print(f"no test fails without {removal.label}: add one")


def main() -> int:
    """Check the removals; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="number of removals, spread over all tables; default: all")
    parser.add_argument("--only", metavar="TABLE", help="only the removals whose label contains this text")
    parser.add_argument("--workers", type=int, default=2, help="number of removals at the same time")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        return run_one(options.run)
    found = removals()
    wanted = [removal for removal in found if options.only is None or options.only in removal.label]
    chosen = [(found.index(removal), removal) for removal in spread(wanted, options.sample)]
    tests = sorted({test for _, removal in chosen for test in removal.tests})
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not cluster", *tests]
    baseline = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if baseline.returncode != 0:
        sys.exit(f"the tests fail without any removal:\n{baseline.stdout[-4000:]}")
    unnoticed = check_all(chosen, options.workers)
    print_table(chosen, unnoticed)
    print(json.dumps({"removed": len(chosen), "unnoticed": len(unnoticed)}))
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
