"""Fixtures that all tests may use."""

pytest_plugins = ["tests.controlplane.fixtures", "tests.objectstore.fixtures"]
