"""What tests of deployments compare with."""

from __future__ import annotations

import pytest

from deployment import SCENARIO
from federations import sha


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Final weights in one process; LocalGrid and RayGrid agree (``test_bits.py``)."""
    return sha(tmp_path_factory.mktemp("simulated"), text=SCENARIO)
