"""The command line: flags, environment variables and refused combinations; and the log lines."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import pytest

from finetune_operator.server.flag import Flag
from finetune_operator.server.kill_switch import KillSwitch
from finetune_operator.server.logs import JsonFormatter, TextFormatter
from finetune_operator.server.options import GROUPS, SETTINGS, RunOptions, add_flags, read_options
from finetune_operator.settings import Settings

NOT_FLAGS = {"trainer_command", "export_command", "require_storage", "outputs_on_volumes", "coordinator_ca_in_run"}
"""Settings that the image, the cluster type or other flags determine."""


def parse(*arguments: str, **environment: str) -> RunOptions:
    parser = argparse.ArgumentParser(prog="finetune-operator")
    add_flags(parser, environment)
    return read_options(parser, arguments)


def test_settings_have_their_defaults_without_flags() -> None:
    options = parse()
    assert options.settings == Settings()
    assert options.operator.namespaces == ()
    assert options.operator.lease is not None
    assert options.operator.coordinator is not None


def test_every_setting_is_a_flag_and_every_flag_is_in_the_help() -> None:
    flags = [flag for group in GROUPS.values() for flag in group]
    assert SETTINGS - {flag.name.replace("-", "_") for flag in flags} == NOT_FLAGS
    parser = argparse.ArgumentParser()
    add_flags(parser, {})
    text = " ".join(parser.format_help().split())
    for flag in flags:
        assert f"--{flag.name}" in text
        assert flag.variable in text
    assert "--watch-nodes true|false" in text
    assert "--token-seconds SECONDS" in text
    assert "--num-workers N" in text


def test_flags_override_the_environment_and_the_environment_the_defaults() -> None:
    assert parse(FINETUNE_NUM_WORKERS="7").operator.num_workers == 7
    assert parse("--num-workers=3", FINETUNE_NUM_WORKERS="7").operator.num_workers == 3
    assert parse("--namespaces=a, b,").operator.namespaces == ("a", "b")
    assert parse("--leader-election=false").operator.lease is None
    assert parse("--coordinator=false").operator.coordinator is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--coordinator-tls-cert=x",), "set both"),
        (("--coordinator-service=x",), "--pod-ip"),
        (("--coordinator-tls-secret=x", "--coordinator-tls-cert=y", "--coordinator-tls-key=z"), "set only one"),
        (("--coordinator-tls-secret=x",), "--coordinator-url"),
        (("--coordinator-ca=x", "--coordinator-ca-config=y"), "remove it"),
        (("--disruption-budgets=true", "--watch-nodes=false"), "--watch-nodes=true"),
        (("--num-workers=0",), "a whole number from 1 to 1000"),
        (("--num-workers=many",), "a whole number from 1 to 1000"),
        (("--lease-seconds=nan",), "a number from 1 to 3600"),
        (("--beat-seconds=0",), "a number from 0.1 to 3600"),
        (("--beat-timeout-seconds=5",), "more than --beat-seconds"),
        (("--failure-backoff-seconds=400",), "at least --failure-backoff-seconds"),
        (("--coordinator-port=8080",), "another port than --coordinator-port"),
        (("--coordinator-url=finetune:8443",), "write https://host:port"),
        (("--namespaces=team-a,Team_B",), "'Team_B'"),
        (("--lease-name=The Lease",), "'The Lease'"),
        (("--rack-label=the rack",), "write its name, for example example.com/rack"),
        (("--leader-election=perhaps",), "write true or false"),
        (("--log-format=xml",), "--log-format"),
    ],
)
def test_invalid_combination_is_refused(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert expected in capsys.readouterr().err


def record(**fields: object) -> logging.LogRecord:
    made = logging.LogRecord("finetune", logging.WARNING, str(Path(__file__)), 1, "it %s", ("broke",), None)
    made.__dict__.update(fields)
    return made


def test_json_lines_contain_the_job_the_attempt_and_the_rank() -> None:
    line = json.loads(JsonFormatter().format(record(job="team/circles", attempt=2, rank=0)))
    assert (line["level"], line["message"]) == ("warning", "it broke")
    assert (line["job"], line["attempt"], line["rank"]) == ("team/circles", 2, 0)


def test_text_lines_contain_the_fields_before_the_traceback() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        broken = record(job="team/circles")
        broken.exc_info = sys.exc_info()
    head, *trace = TextFormatter().format(broken).splitlines()
    assert head.endswith("it broke job=team/circles")
    assert trace[-1] == "ValueError: why"


@pytest.mark.parametrize("flag", [flag for group in GROUPS.values() for flag in group], ids=lambda flag: flag.name)
def test_every_number_has_bounds_that_contain_its_default(flag: Flag) -> None:
    assert (flag.between is not None) == (flag.read in (int, float))
    if flag.between is not None:
        lowest, highest = flag.between
        for number in (lowest, flag.default, highest):
            assert flag.parse(str(number)) == number
        for outside in (lowest - 1, highest + 1):
            with pytest.raises(argparse.ArgumentTypeError):
                flag.parse(str(outside))


@pytest.mark.parametrize("where", ["", "before", "before:0", "during:1"])
def test_invalid_kill_switch_is_refused(where: str) -> None:
    with pytest.raises(ValueError):
        KillSwitch(where)
