"""The recipes of CONTRIBUTING.md: forgetting one of their steps fails here with a message that names the step."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import finetune_operator.plan.policies as policy_package
from finetune_contract.methods import METHODS
from finetune_contract.spec import Method
from finetune_operator.api.reasons import REASONS, Reason
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.registry import POLICIES

ROOT = Path(__file__).resolve().parents[2]
METHODS_PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")


def policy_modules() -> dict[str, list[Policy]]:
    """Return the modules of plan/policies that define policies, and these."""
    found = {}
    for module_info in pkgutil.walk_packages(policy_package.__path__, f"{policy_package.__name__}."):
        module = importlib.import_module(module_info.name)
        policies = [value for value in vars(module).values() if isinstance(value, Policy)]
        if policies:
            found[module_info.name] = policies
    return found


MODULES = policy_modules()


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name.rpartition(".")[2])
def test_a_policy_is_registered_and_tested(module: str) -> None:
    for policy in MODULES[module]:
        assert sum(policy is other for other in POLICIES) == 1, (
            f"list the policy {policy.name} of {module} once in plan/registry.py"
        )
    *_, package, name = module.split(".")
    tests = [ROOT / f"tests/plan/policies/test_{part}.py" for part in (name, package)]
    assert any(test.exists() for test in tests), f"add {tests[0].relative_to(ROOT)}"


def test_policies_have_unique_names() -> None:
    assert len({policy.name for policy in POLICIES}) == len(POLICIES)


@pytest.mark.parametrize("method", Method)
def test_a_method_has_every_part(method: Method) -> None:
    assert method in METHODS, f"add a row for {method} to METHODS in trainer/finetune_contract/methods.py"
    registry = (ROOT / "trainer/finetune_trainer/methods/registry.py").read_text(encoding="utf-8")
    assert f"MethodName.{method.name}:" in registry, f"add a row for {method} to methods/registry.py"
    settings = (ROOT / "testing/trainer/methods.py").read_text(encoding="utf-8")
    assert f'"method": "{method}"' in settings, f"add settings for {method} to testing/trainer/methods.py"
    assert f"| `{method}` |" in METHODS_PAGE, f"add a row for {method} to the first table of docs/methods.md"
    manifest = re.search(rf"^\*\*{method}\*\*", METHODS_PAGE, re.MULTILINE)
    assert manifest is not None, f"add a manifest of {method} to docs/methods.md"


def families() -> list[str]:
    """Return the pipelines in the table of families. Read from the source, because importing it needs torch."""
    tree = ast.parse((ROOT / "trainer/finetune_trainer/models/base.py").read_text(encoding="utf-8"))
    assignments = (node for node in tree.body if isinstance(node, ast.AnnAssign))
    (table,) = (node.value for node in assignments if ast.unparse(node.target) == "FAMILIES")
    assert isinstance(table, ast.Dict)
    return [ast.literal_eval(key) for key in table.keys if key is not None]


def test_every_family_has_a_tiny_base_and_documentation() -> None:
    tiny = (ROOT / "testing/trainer/tiny.py").read_text(encoding="utf-8")
    paragraph = re.search(r"^Families: .*?\n\n", METHODS_PAGE, re.MULTILINE | re.DOTALL)
    assert paragraph is not None, "docs/methods.md lists the families in a paragraph that starts with 'Families:'"
    found = families()
    assert found
    for pipeline in found:
        assert pipeline in tiny, f"add a tiny base for {pipeline} to testing/trainer/tiny.py"
        assert f"`{pipeline}`" in paragraph[0], f"add {pipeline} to the families in docs/methods.md"


def test_every_reason_is_used() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "operator/finetune_operator").rglob("*.py")]
    text = "\n".join(source for source in sources if "class Reason(StrEnum)" not in source)
    unused = [reason.name for reason in Reason if f"Reason.{reason.name}" not in text]
    assert not unused, f"no policy, cause or event uses {unused}: use them or remove them"
    assert set(REASONS) == set(Reason), "add a row with meaning and remedy to REASONS in api/reasons.py"
