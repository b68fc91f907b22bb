"""Pytest plugin: one S3 server per test run, and a separate bucket for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from testing.controlplane.build import S3_SERVER, ensure_programs
from testing.controlplane.process import Guard
from testing.objectstore import server
from testing.objectstore.server import ObjectStore


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Build the server before the first test, because the build may take longer than a test's timeout."""
    if session.config.option.collectonly:
        return
    if any("object_store" in getattr(item, "fixturenames", ()) for item in session.items):
        ensure_programs(modules=[S3_SERVER])


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The S3 server of this test run."""
    guard = Guard()
    try:
        yield server.start(tmp_path_factory.mktemp("s3"), guard)
    finally:
        guard.close()


@pytest.fixture
def bucket_url(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket; the environment of this process contains its keys."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    return object_store.make_bucket(f"test-{uuid.uuid4().hex[:8]}")
