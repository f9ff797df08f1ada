"""Fixtures that tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Machines here can turn slow for minutes, and first executions are slow anywhere: time says nothing of a property.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real Ray with two CPU slots, started once for all tests that ask for it.

    Two slots are all there are: a test gives its workers back (closes its grid) when it is done.
    """
    from trellis.grids.ray import start_ray, stop_ray

    started = start_ray(num_cpus=2, object_store_mb=200)
    yield
    if started:
        stop_ray()
