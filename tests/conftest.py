"""Fixtures that all tests may use."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["testing.controlplane.fixtures", "testing.objectstore.fixtures"]

# How long an example takes, or is looked for, says more about the machine than about the code.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
