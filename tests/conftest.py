"""Every test runs on one thread, and leaves the global generators as it found them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long drawing an example takes says more about the machine's load than about the test.
settings.register_profile("nervure", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nervure")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
