"""Settings every test shares: no telemetry, no network, one thread, Triton's interpreter where there is no GPU, NaN in
scratch memory where a test asks for it, and one local Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

# A study's own Ray has its token on. Here it is off, because what the tests of `submit`, `doctor` and `serve` say about
# tokens begins from an environment without one; the engine's tests with Ray also pass with
# RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…, and `make chaos` runs with it.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from statespan.orchestration.ray_session import quiet

quiet()
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def nan_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN, so a kernel that leaves one output element unwritten fails its test."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*size, **options):  # type: ignore[no-untyped-def]
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    def poisoned_like(other, **options):  # type: ignore[no-untyped-def]
        out = empty_like(other, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The session's one Ray, on this machine only. Actors of a test should ask for no more than 0.1 CPU each."""
    import ray

    from statespan.config import Cluster
    from statespan.orchestration.ray_session import join, leave

    join(Cluster())
    ray.cloudpickle.register_pickle_by_value(_fake_engine())
    yield
    leave()


def _fake_engine():  # type: ignore[no-untyped-def]
    from tests import fake_engine

    return fake_engine
