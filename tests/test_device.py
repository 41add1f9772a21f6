import pytest
import torch

from statespan.errors import UserError
from statespan.models.device import resolve_device


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cuda"), resolve_device("cpu")) == ("cuda", "cuda", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cpu", "cpu")


@pytest.mark.parametrize(
    "name, says", [("cuda", "no CUDA device that torch .* take cpu or auto"), ("gpu", "no device named 'gpu'")]
)
def test_a_device_that_is_not_there_is_refused_with_the_way_out(name, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=says):
        resolve_device(name)
