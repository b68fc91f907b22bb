"""The objects that the chart renders, and the values that it refuses."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.server.options import add_flags, read_options
from finetune_operator.settings import Settings
from testing.helm import CHART, HOME, NAME, RELEASE, Helm, HelmError, kinds, one, operator_args

ROOT = CHART.parents[1]
MONITORING = {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}}


def test_helm_lint_passes(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART))


def test_default_values_render_these_kinds(helm: Helm) -> None:
    objects = helm.render(crds=True)
    assert kinds(objects) == {
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "CustomResourceDefinition",
        "Deployment",
        "Lease",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Secret",
        "Service",
        "ServiceAccount",
    }
    assert one(objects, "Deployment")["spec"]["replicas"] == 2


def test_the_crd_equals_the_generated_file(helm: Helm) -> None:
    """Numbers keep their form, although Helm would print floats differently."""
    rendered = one(helm.render(crds=True), "CustomResourceDefinition")
    committed = yaml.safe_load((ROOT / "crds/finetune-operator.io_finetunejobs.yaml").read_text())
    assert rendered["spec"] == committed["spec"]
    assert rendered["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    deleted = one(helm.render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in (deleted["metadata"].get("annotations") or {})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"namespaces": ["team-a", "team-b"], "watchNodes": False},
        {"kueue": {"enabled": True, "priorityBoost": True}},
        {"gpuFaults": {"taintAfterJobs": 2}},
        {"gangs": {"enabled": True}, "disruptionBudgets": {"enabled": True}},
        {"evictionRequests": {"enabled": True}},
        {"topology": {"rackLabel": "example.com/rack"}, "kueue": {"enabled": True, "topology": True}},
        {"recovery": {"resizePods": True}, "trainer": {"userNamespaces": True}},
        {"coordinator": {"enabled": False}},
        {"coordinator": {"tls": {"mode": "secret", "secretName": "given"}}},
        {"coordinator": {"port": 9000, "tls": {"mode": "certManager", "issuerRef": {"name": "ca"}}}},
        {"trainer": {"cacheClaim": "shared", "coresPerRank": 2, "userId": 2000}, "flags": {"lease-seconds": 10}},
        {"logs": {"format": "text", "level": "debug"}, "flags": {"beat-seconds": 2.5, "num-workers": 4}},
    ],
    ids=str,
)
def test_the_operator_accepts_the_flags_of_the_chart(helm: Helm, values: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, {"FINETUNE_POD_IP": "10.0.0.1"})
    command, *flags = operator_args(helm.render(values))
    assert command == "run"
    options = read_options(parser, flags)
    assert list(options.operator.namespaces) == values.get("namespaces", [])
    assert options.operator.taint_after_jobs == values.get("gpuFaults", {}).get("taintAfterJobs", 0)
    assert options.settings.rack_label == values.get("topology", {}).get("rackLabel", "")
    assert options.settings.kueue_topology == values.get("kueue", {}).get("topology", False)
    assert options.settings.disruption_budgets == values.get("disruptionBudgets", {}).get("enabled", False)
    assert options.settings.eviction_requests == values.get("evictionRequests", {}).get("enabled", False)
    assert options.settings.gangs == values.get("gangs", {}).get("enabled", False)
    assert options.settings.resize_pods == values.get("recovery", {}).get("resizePods", False)
    assert options.settings.user_namespaces == values.get("trainer", {}).get("userNamespaces", False)
    trainer = values.get("trainer", {})
    assert options.settings.trainer_user_id == trainer.get("userId", 1000)
    assert options.settings.cache_claim == trainer.get("cacheClaim", "")
    coordinator = options.operator.coordinator
    if values.get("coordinator", {}).get("enabled", True):
        assert coordinator is not None
        assert coordinator.hosts == (f"{NAME}-coordinator.{HOME}.svc",)
        assert options.settings.coordinator_ca_in_run
        assert (coordinator.certificate is None) == bool(coordinator.secret)
    else:
        assert coordinator is None


@pytest.mark.parametrize("mode", ["secret", "certManager"])
def test_a_given_certificate_is_mounted(helm: Helm, mode: str) -> None:
    given: dict[str, dict[str, Any]] = {
        "secret": {"secretName": "given"},
        "certManager": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}},
    }
    objects = helm.render({"coordinator": {"tls": {"mode": mode, **given[mode]}}})
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    secret = next(volume for volume in pod["volumes"] if volume["name"] == "tls")["secret"]["secretName"]
    assert secret == ("given" if mode == "secret" else f"{NAME}-tls")
    assert "Secret" not in kinds(objects)
    assert all(rule["resources"] != ["secrets"] for rule in one(objects, "Role", NAME)["rules"])
    if mode == "certManager":
        certificate = one(objects, "Certificate")["spec"]
        assert certificate["secretName"] == secret
        assert certificate["dnsNames"] == [f"{NAME}-coordinator.{HOME}.svc"]


def test_an_image_digest_replaces_the_tag(helm: Helm) -> None:
    digest = "sha256:" + "0" * 64
    objects = helm.render({"image": {"repository": "registry:5000/op", "tag": "v9", "digest": digest}})
    images = {
        container["image"]
        for pod in (one(objects, "Deployment")["spec"]["template"], one(objects, "Pod"))
        for container in pod["spec"]["containers"]
    }
    assert images == {f"registry:5000/op@{digest}"}


def test_one_replica_has_no_disruption_budget(helm: Helm) -> None:
    assert "PodDisruptionBudget" not in kinds(helm.render({"replicas": 1}))


def test_services_select_only_pods_of_the_operator(helm: Helm) -> None:
    objects = helm.render()
    pod = one(objects, "Deployment")["spec"]["template"]
    selector = one(objects, "Service", f"{NAME}-metrics")["spec"]["selector"]
    assert selector.items() <= pod["metadata"]["labels"].items()
    assert not selector.items() <= one(objects, "Pod")["metadata"]["labels"].items()
    assert "selector" not in one(objects, "Service", f"{NAME}-coordinator")["spec"]


def test_claims_are_kept_unless_keep_is_false(helm: Helm) -> None:
    claims = [{"name": "a", "size": "1Gi", "storageClassName": "efs"}, {"name": "b", "size": "5Ti", "keep": False}]
    objects = helm.render({"storage": {"claims": claims}})
    kept, deleted = one(objects, "PersistentVolumeClaim", "a"), one(objects, "PersistentVolumeClaim", "b")
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert kept["spec"]["accessModes"] == ["ReadWriteMany"]
    assert "helm.sh/resource-policy" not in (deleted["metadata"].get("annotations") or {})


def metric_names() -> set[str]:
    """Return every metric name that the operator can expose."""
    text = (ROOT / "operator/finetune_operator/metrics.py").read_text()
    names = set(re.findall(r'"(finetune_\w+)"', text))
    return names | {name + suffix for name in names for suffix in ("_total", "_bucket", "_count", "_sum")}


def test_alerts_and_dashboard_query_existing_metrics(helm: Helm) -> None:
    objects = helm.render({"metrics": MONITORING})
    alerts = one(objects, "PrometheusRule")["spec"]["groups"][0]["rules"]
    dashboard = json.loads(one(objects, "ConfigMap", f"{NAME}-dashboard")["data"]["finetune-operator.json"])
    queries = [alert["expr"] for alert in alerts]
    queries += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in queries for name in re.findall(r"\bfinetune_\w+", expression)}
    assert used <= metric_names()
    assert len(used) > 10
    labels = one(objects, "Service", f"{NAME}-metrics")["metadata"]["labels"]
    wanted = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= labels.items()


def test_alerts_query_existing_phases(helm: Helm) -> None:
    alerts = one(helm.render({"metrics": MONITORING}), "PrometheusRule")["spec"]["groups"][0]["rules"]
    phases = {alert["alert"]: re.findall(r'phase=~?"([^"]+)"', alert["expr"]) for alert in alerts}
    assert {name for found in phases.values() for names in found for name in names.split("|")} <= set(Phase)


def test_alerts_cover_jobs_that_wait_or_are_silent_before_they_run(helm: Helm) -> None:
    """Such a job stays in Starting or Recovering, and others come and go in the same phase."""
    alerts = one(helm.render({"metrics": MONITORING}), "PrometheusRule")["spec"]["groups"][0]["rules"]
    rules = {alert["alert"]: (alert["expr"], alert["for"]) for alert in alerts if "for" in alert}
    expression, duration = rules["FinetuneJobsAreSilent"]
    assert re.fullmatch(r"max\(finetune_silent_jobs\{.*\}\) > 0", expression)
    assert duration == "5m"
    expression, duration = rules["FinetuneJobsWait"]
    assert re.fullmatch(r"max\(finetune_longest_wait_seconds\{.*\}\) > 1800", expression)
    assert duration == "1m"


def test_every_alert_links_to_its_section_in_the_documentation(helm: Helm) -> None:
    alerts = one(helm.render({"metrics": MONITORING}), "PrometheusRule")["spec"]["groups"][0]["rules"]
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert len(alerts) > 10
    for alert in alerts:
        assert f"### {alert['alert']}\n" in page
        assert alert["annotations"]["runbook_url"].endswith("#" + alert["alert"].lower())
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]


@pytest.mark.parametrize(
    ("alert", "counted", "excluded"),
    [
        ("FinetuneAttemptsFail", CountsAs.FAILURE, {Reason.DATA_ERROR, Reason.CONFIGURATION_ERROR}),
        ("FinetuneOutagesEndAttempts", CountsAs.OUTAGE, set()),
        ("FinetuneManyPreemptions", CountsAs.PREEMPTION, set()),
    ],
)
def test_an_alert_counts_all_reasons_of_its_kind(
    helm: Helm, alert: str, counted: CountsAs, excluded: set[Reason]
) -> None:
    """Except for the reasons that only the user can fix."""
    alerts = one(helm.render({"metrics": MONITORING}), "PrometheusRule")["spec"]["groups"][0]["rules"]
    (expression,) = (rule["expr"] for rule in alerts if rule["alert"] == alert)
    (pattern,) = re.findall(r'reason=~"([^"]+)"', expression)
    matched = {reason for reason in REASONS if re.fullmatch(pattern, reason.value)}
    assert matched == {reason for reason, doc in REASONS.items() if doc.counts_as is counted} - excluded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 0}, "/replicas"),
        ({"replica": 3}, "'replica' not allowed"),
        ({"coordinator": {"tls": {"mode": "none"}}}, "'own', 'certManager', 'secret'"),
        ({"coordinator": {"port": 0}}, "/coordinator/port"),
        ({"coordinator": {"tls": {"mode": "secret"}}}, "mode secret needs the name of a Secret"),
        ({"coordinator": {"tls": {"mode": "certManager"}}}, "mode certManager needs the name of an Issuer"),
        ({"namespaces": ["Team_A"]}, "/namespaces/0"),
        ({"image": {"repository": "a:b"}}, "/image/repository"),
        ({"image": {"digest": "abc"}}, "/image/digest"),
        ({"storage": {"claims": [{"name": "x"}]}}, "'size'"),
        ({"storage": {"claims": [{"name": "x", "size": "much"}]}}, "/storage/claims/0/size"),
        ({"serviceAccount": {"create": False}}, "set the name of the account to use"),
        ({"flags": {"coordinator-url": "http://x"}}, "the chart sets this flag from another value"),
        ({"flags": {"--lease-seconds": 3}}, "'--lease-seconds' not allowed"),
        ({"flags": {"foo": 1}}, "'foo' not allowed"),
        ({"flags": {"num-workers": 0}}, "/flags/num-workers"),
        ({"flags": {"num-workers": "many"}}, "/flags/num-workers"),
        ({"flags": {"lease-seconds": "soon"}}, "/flags/lease-seconds"),
        ({"flags": {"beat-timeout-seconds": 5}}, "set more than beat-seconds"),
        ({"flags": {"failure-backoff-seconds": 301}}, "set at least failure-backoff-seconds"),
        ({"flags": {"identity": "one"}}, "the chart sets this flag from another value"),
        ({"metrics": {"port": 8443}}, "metrics.port: 8443 is the port of the coordinator"),
        ({"coordinator": {"tls": {"secretName": "given"}}}, "only mode secret uses a given Secret"),
        ({"coordinator": {"tls": {"issuerRef": {"name": "ca"}}}}, "only mode certManager uses an issuer"),
        ({"coordinator": {"tls": {"duration": "90 days"}}}, "/coordinator/tls/duration"),
        ({"coordinator": {"tls": {"mode": "secret", "secretName": "My_Secret"}}}, "/coordinator/tls/secretName"),
        ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory"),
        ({"resources": {"limit": {"memory": "1Gi"}}}, "'limit' not allowed"),
        ({"resources": {"requests": {"cpu": -1}}}, "/resources/requests/cpu"),
        ({"nameOverride": "My Operator"}, "/nameOverride"),
        ({"fullnameOverride": "1op"}, "/fullnameOverride"),
        ({"imagePullSecrets": [{"name": "a b"}]}, "/imagePullSecrets/0/name"),
        ({"serviceAccount": {"name": "Team_A"}}, "/serviceAccount/name"),
        ({"serviceAccount": {"annotations": {"a b": "c"}}}, "invalid propertyName 'a b'"),
        ({"trainer": {"userId": 2**31}}, "/trainer/userId"),
        ({"trainer": {"coresPerRank": 5000}}, "/trainer/coresPerRank"),
        ({"trainer": {"cacheClaim": "The Cache"}}, "/trainer/cacheClaim"),
        ({"podLabels": {"team": "a b"}}, "/podLabels/team"),
        ({"podLabels": {"app.kubernetes.io/name": "other"}}, "the chart sets this label itself"),
        ({"podAnnotations": {"a b": "x"}}, "invalid propertyName 'a b'"),
        ({"nodeSelector": {"pool": "a/b"}}, "/nodeSelector/pool"),
        ({"tolerations": [{"key": "gpu", "effect": "NoRun"}]}, "/tolerations/0/effect"),
        ({"affinity": {"nodeAfinity": {}}}, "'nodeAfinity' not allowed"),
        ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "'topologyKey'"),
        ({"priorityClassName": "very high"}, "/priorityClassName"),
        ({"extraEnv": [{"name": "A", "value": 1}]}, "/extraEnv/0/value"),
        ({"extraEnv": [{"name": "FINETUNE_IDENTITY", "value": "one"}]}, "the chart sets FINETUNE_IDENTITY itself"),
        ({"networkPolicy": {"apiServerCidrs": ["here/8"]}}, "/networkPolicy/apiServerCidrs/0"),
        ({"networkPolicy": {"metricsFrom": [{"namespace": "x"}]}}, "'namespace' not allowed"),
        ({"metrics": {"prometheusRule": {"runbook": "the wiki"}}}, "/metrics/prometheusRule/runbook"),
        ({"metrics": {"prometheusRule": {"pendingMinutes": 10**9}}}, "/metrics/prometheusRule/pendingMinutes"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "/metrics/serviceMonitor/interval"),
        ({"storage": {"claims": [{"name": "x", "size": "1Gi", "storageClassName": "E F"}]}}, "/storageClassName"),
        ({"podDisruptionBudget": {"minAvailable": 2}}, "otherwise no node with an operator pod can be drained"),
        ({"disruptionBudgets": {"enabled": True}, "watchNodes": False}, "so that a node can be drained"),
        ({"metrics": {"prometheusRule": {"goodputRatio": 60}}}, "/metrics/prometheusRule/goodputRatio"),
        ({"trainer": {"images": {"gpu": "untagged"}}}, "/trainer/images/gpu"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_a_message(helm: Helm, values: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        helm.render(values)
    assert message in str(caught.value)


def test_numbers_keep_their_digits_and_texts_stay_texts(helm: Helm) -> None:
    """Templates print large numbers with an exponent, which the operator cannot read."""
    flags = {"max-connections": 1_000_000, "beat-seconds": 2.5, "lease-seconds": "10.5", "coordinator-audience": "a:b"}
    rendered = operator_args(helm.render({"trainer": {"userId": 1_000_700_000}, "flags": flags}))
    expected = {f"--{name}={value}" for name, value in flags.items()} | {"--trainer-user-id=1000700000"}
    assert expected <= set(rendered)
    parser = argparse.ArgumentParser()
    add_flags(parser, {"FINETUNE_POD_IP": "10.0.0.1"})
    assert read_options(parser, rendered[1:]).settings.beat_seconds == 2.5
    alerts = one(
        helm.render({"metrics": {"prometheusRule": {"enabled": True, "checkpointAgeSeconds": 10_000_000}}}),
        "PrometheusRule",
    )["spec"]["groups"][0]["rules"]
    assert any(alert["expr"].endswith("> 10000000") for alert in alerts)


def test_bounds_of_two_flags_agree_with_the_defaults_of_the_operator() -> None:
    """The chart compares a given flag with the default of the other one."""
    helpers = (CHART / "templates/_helpers.tpl").read_text()
    defaults = {name: float(number) for number, name in re.findall(r'default (\d+) \(get \$flag "([a-z-]+)"', helpers)}
    settings = Settings()
    assert defaults == {name: getattr(settings, name.replace("-", "_")) for name in defaults}
    assert len(defaults) == 4


def unbounded(schema: dict[str, Any], where: str) -> list[str]:
    """Return the places of a schema that accept any text, any number or any field."""
    if "enum" in schema or "$ref" in schema or schema == {}:
        return []
    found = []
    for part in schema.get("anyOf", []):
        found += unbounded(part, where)
    kind = schema.get("type")
    if kind == "string" and not {"pattern", "enum"} & set(schema):
        found.append(where)
    if kind in ("integer", "number") and not ({"minimum", "exclusiveMinimum"} & set(schema) and "maximum" in schema):
        found.append(where)
    if kind == "object" and "additionalProperties" not in schema:
        found.append(where)
    for name, part in schema.get("properties", {}).items():
        found += unbounded(part, f"{where}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            found += unbounded(schema[name], f"{where}[]")
    return found


def test_no_value_is_unbounded(helm: Helm) -> None:
    """Except for values that only the API server can check."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    found = unbounded(schema, "")
    for name, definition in schema["definitions"].items():
        found += unbounded(definition, name)
    assert sorted(found) == [
        ".affinity.nodeAffinity",
        ".affinity.podAffinity",
        ".affinity.podAntiAffinity",
        ".extraEnv[].value",
        ".extraEnv[].valueFrom",
        ".global",
        ".tolerations[].value",
        "annotations[]",
        "selector.matchExpressions[]",
    ]


def test_notes_name_a_managed_namespace(helm: Helm) -> None:
    def notes(values: dict[str, Any]) -> str:
        command = ("install", RELEASE, str(CHART), "--namespace", HOME, "--dry-run=client")
        return helm.run(*command, values=values).partition("NOTES:\n")[2]

    limited = notes({"namespaces": ["team-a", "team-b"]})
    assert "kubectl apply -n team-a -f examples/" in limited
    assert "kubectl get ftj -n team-a -w" in limited
    assert "No other namespace is managed" in limited
    everywhere = notes({})
    assert "kubectl apply -f examples/" in everywhere
    assert "No other namespace" not in everywhere


def test_every_value_is_in_the_schema(helm: Helm) -> None:
    """The chart refuses values that the schema does not contain."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert missing(values, schema, Path()) == []


def missing(values: dict[str, Any], schema: dict[str, Any], where: Path) -> list[str]:
    properties = schema.get("properties")
    if properties is None:
        return []
    absent = [str(where / name) for name in values if name not in properties]
    for name, value in values.items():
        if isinstance(value, dict) and name in properties:
            absent += missing(value, properties[name], where / name)
    return absent
