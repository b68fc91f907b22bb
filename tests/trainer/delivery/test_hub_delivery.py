"""Outputs in a repository of the hub, on a stand-in: one commit, permissions, rate limits, kills."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_contract import environment
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import Method
from finetune_trainer.delivery.hub_target import find_missing_permission
from finetune_trainer.delivery.open import DeliveryPlace
from finetune_trainer.delivery.target import ExportStage
from finetune_trainer.errors import ConfigError, NetworkError
from finetune_trainer.export.outputs import Export, check_targets, deliver_outputs
from testing import hub
from testing.hub import HubServer
from testing.hub_uploads import HubToken
from testing.trainer import killed_exports
from testing.trainer.killed_exports import FILES, contents, write_files

pytestmark = pytest.mark.trainer
TOKEN = "hf_writer"
OUTPUT = {"format": "diffusers", "to": "hub://me/lora"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a user and a token."""
    with hub.serve(tmp_path / "hub") as running:
        running.uploads.tokens[TOKEN] = HubToken("me")
        # The library reads its settings when it is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", running.url + template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def check(output: dict[str, Any], tmp_path: Path) -> None:
    check_targets([OutputSpec.model_validate(output)], DeliveryPlace(tmp_path, secrets=tmp_path / "secrets"))


def deliver(tmp_path: Path, source: str = "step-00000006-a1") -> None:
    def write(_: OutputSpec, folder: Path) -> Iterable[Path]:
        return write_files(folder)

    deliver_outputs(write, [OutputSpec.model_validate(OUTPUT)], Export(DeliveryPlace(tmp_path / "job"), "u", source))


def assert_complete(server: HubServer) -> None:
    commit = server.commit_of("models", "me/lora", "main")
    assert commit is not None
    folder = server.folder / "models" / "me/lora" / commit
    assert {name: (folder / name).read_bytes() for name in FILES} == {name: contents(name) for name in FILES}


def test_one_private_commit_contains_all_files(server: HubServer, tmp_path: Path) -> None:
    check(OUTPUT, tmp_path)
    assert server.commit_of("models", "me/lora", "main") is None, "the check creates nothing"
    deliver(tmp_path)
    assert server.uploads.private == {"me/lora"}
    assert server.uploads.commits == {"me/lora": ["diffusers of default/job (step-00000006-a1)"]}
    assert_complete(server)
    deliver(tmp_path)
    assert len(server.uploads.commits["me/lora"]) == 1, "a finished export is not repeated"


def test_a_kill_at_every_point_repeats_no_upload_and_no_commit(server: HubServer, tmp_path: Path) -> None:
    variables = {**server.environment, "HF_TOKEN": TOKEN}
    with killed_exports.start(tmp_path / "job", [OUTPUT], variables) as exports:
        for stage in (
            ExportStage.WRITE,
            ExportStage.RECORDED,
            ExportStage.UPLOAD,
            ExportStage.UPLOADED,
            ExportStage.PUBLISH,
        ):
            assert not server.uploads.commits
            assert exports.run(stage) == -signal.SIGKILL
        assert exports.run() == 0
        assert exports.num_writes == 1
    assert len(server.uploads.commits["me/lora"]) == 1
    assert server.uploads.num_uploads == sum(size >= 1000 for size in FILES.values())
    assert_complete(server)


def test_rate_limits_and_failures_are_waited_out(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def pause(seconds: float) -> bool:
        waits.append(seconds)
        return False

    monkeypatch.setattr("finetune_trainer.patience._PROCESS.pause", pause)
    for fault, part in (
        (hub.too_many_requests(0), "/repos/create"),
        (hub.RESET, "/lfs/"),
        (hub.UNAVAILABLE, "/info/lfs/"),
        (hub.CUT, "/commit/"),
    ):
        server.fail_next(fault, only=part)
    deliver(tmp_path)
    assert waits, "the client's own retries do not cover all of them"
    assert_complete(server)
    assert len(server.uploads.commits["me/lora"]) == 1


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        (HubToken("me", role="read"), "hub://me/lora", r"the token 'tests' can only read"),
        (HubToken("me"), "hub://others/lora", r"the token belongs to me, who is no member of others"),
        (HubToken("me", is_revoked=True), "hub://me/lora", r"does not accept the token .*: it is wrong, expired or"),
    ],
)
def test_tokens_that_cannot_write_are_refused_before_training(
    server: HubServer, tmp_path: Path, token: HubToken, to: str, message: str
) -> None:
    server.uploads.tokens[TOKEN] = token
    with pytest.raises(ConfigError, match=rf"^outputs\[0\]\.to: .*{message}.*HF_TOKEN in the Secret of outputs"):
        check({**OUTPUT, "to": to}, tmp_path)


def test_members_of_an_organization_may_write(server: HubServer, tmp_path: Path) -> None:
    server.uploads.tokens[TOKEN] = HubToken("me", orgs=("others",))
    check({**OUTPUT, "to": "hub://others/lora"}, tmp_path)


def test_the_token_of_the_outputs_secret_is_used(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    (tmp_path / "secrets" / "writer").mkdir(parents=True)
    (tmp_path / "secrets" / "writer" / "HF_TOKEN").write_text(f"{TOKEN}\n")
    check({**OUTPUT, "secret": {"name": "writer"}}, tmp_path)
    with pytest.raises(ConfigError, match="does not accept the token"):
        check(OUTPUT, tmp_path)


def test_a_token_that_is_revoked_during_training_ends_the_job(server: HubServer, tmp_path: Path) -> None:
    check(OUTPUT, tmp_path)
    server.uploads.tokens[TOKEN].is_revoked = True
    with pytest.raises(ConfigError, match="wrong, expired or revoked"):
        deliver(tmp_path)
    server.uploads.tokens[TOKEN].is_revoked = False
    deliver(tmp_path)
    assert_complete(server)


def test_an_outage_of_the_hub_is_no_refusal(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.RETRY_SECONDS, "0")
    server.fail_always(hub.UNAVAILABLE, only="whoami")
    with pytest.raises(NetworkError):
        check(OUTPUT, tmp_path)


def test_fine_grained_tokens() -> None:
    def about(*permissions: str, name: str = "me") -> dict[str, Any]:
        scoped = [{"entity": {"name": name}, "permissions": list(permissions)}]
        return {"name": "me", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}}

    assert find_missing_permission(about("repo.write"), "me/lora") == ""
    assert find_missing_permission(about("repo.write", name="me/lora"), "me/lora") == ""
    assert "may not write to the repositories of me" in find_missing_permission(about("repo.content.read"), "me/lora")
    assert "may not write" in find_missing_permission(about("repo.write", name="me/other"), "me/lora")
    # Of a hub that does not describe its tokens, nothing is known.
    assert find_missing_permission({"name": "me"}, "me/lora") == ""


def test_a_model_of_another_job_is_not_replaced(server: HubServer, tmp_path: Path) -> None:
    def write(_: OutputSpec, folder: Path) -> Iterable[Path]:
        manifest = folder / "finetune-job.json"
        manifest.write_text('{"namespace": "default", "job": "other"}')
        return [manifest]

    output = OutputSpec.model_validate(OUTPUT)
    other = DeliveryPlace(tmp_path / "other", job="other")
    check(OUTPUT, tmp_path)
    deliver_outputs(write, [output], Export(other, "o", "step-1-a1"))
    message = r"outputs\[0\]\.to: hub://me/lora holds an output of another job, default/other, .*; write another name"
    with pytest.raises(ConfigError, match=message):
        check(OUTPUT, tmp_path)
    with pytest.raises(ConfigError, match=message):
        deliver(tmp_path)
    assert len(server.uploads.commits["me/lora"]) == 1
    check_targets([output], other, Method.LORA)
    # Next to it, a file that is named after its job replaces nothing.
    check_targets([OutputSpec.model_validate({**OUTPUT, "format": "kohya"})], DeliveryPlace(tmp_path), Method.LORA)
