"""A kernel launched again takes the binary that Triton would take, and asks for it once."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.kernels import launch
from statespan.kernels.launch import Relaunched, kinds


class Kernel:
    """Stands for a kernel of triton.jit with two arguments and the constexprs A and B; notes who was launched how."""

    def __init__(self):
        self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in ("x", "n", "A", "B")]
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.asked.append((grid, arguments, named))
            return Binary(self, named)

        return run


class Binary:
    def __init__(self, kernel, named):
        self.kernel, self.named = kernel, named

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments, self.named))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def aligned(dtype=torch.float32, offset=0):
    held = torch.zeros(64, dtype=dtype)
    begin = -held.data_ptr() % 16 // held.element_size()
    return held[begin + offset :]


def test_the_second_launch_goes_by_the_binary_with_its_constants_in_the_kernels_order(kernel):
    again, x, y = Relaunched(kernel), aligned(), aligned()
    again[(3, 2)](x, 5, B=7, A=True, num_warps=4)
    assert kernel.asked == [((3, 2), (x, 5), {"B": 7, "A": True, "num_warps": 4})] and not kernel.launched
    again[(4,)](y, 5, B=7, A=True, num_warps=4)
    ((grid, arguments, _),) = kernel.launched
    assert len(kernel.asked) == 1 and grid == (4, 1, 1)
    assert arguments[0] is y and arguments[1:] == (5, True, 7)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: (aligned(torch.bfloat16), 5, {}), id="dtype"),
        pytest.param(lambda: (aligned(offset=1), 5, {}), id="alignment"),
        pytest.param(lambda: (aligned(), 16, {}), id="integer"),
        pytest.param(lambda: (aligned(), True, {}), id="boolean"),
        pytest.param(lambda: (aligned(), 5.0, {}), id="float"),
        pytest.param(lambda: (None, 5, {}), id="none"),
        pytest.param(lambda: (aligned(), 5, {"A": 2}), id="constant"),
        pytest.param(lambda: (aligned(), 5, {"A": 2, "B": 1}), id="constants_exchanged"),
        pytest.param(lambda: (aligned(), 5, {"num_warps": 8}), id="option"),
    ],
)
def test_whatever_may_change_the_binary_asks_triton_again(kernel, other):
    again, usual = Relaunched(kernel), {"A": 1, "B": 2, "num_warps": 4}
    again[(1, 1, 1)](aligned(), 5, **usual)
    x, n, named = other()
    again[(1, 1, 1)](x, n, **usual | named)
    assert len(kernel.asked) == 2 and not kernel.launched


def test_each_device_has_its_own_binary(kernel, monkeypatch):
    again = Relaunched(kernel)
    again[(1, 1, 1)](aligned(), 5, A=1, B=2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    again[(1, 1, 1)](aligned(), 5, A=1, B=2)
    assert len(kernel.asked) == 2


def test_names_that_trade_places_are_told_apart(kernel):
    again = Relaunched(kernel)
    again[(1, 1, 1)](aligned(), 5, A=1, B=2)
    again[(1, 1, 1)](aligned(), 5, B=1, A=2)
    assert len(kernel.asked) == 2


def test_no_tensor_is_kept_and_the_binaries_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "KEPT", 3)
    again, x = Relaunched(kernel), aligned()
    gone = weakref.ref(x)
    for n in range(8):
        again[(1, 1, 1)](x, n, A=1, B=2)
    kernel.asked.clear()
    del x
    assert gone() is None and len(again._known) <= 3


def test_what_triton_does_not_take_is_refused(kernel):
    with pytest.raises(TypeError, match="got a str"):
        Relaunched(kernel)[(1, 1, 1)](aligned(), "five", A=1, B=2)


def test_whatever_triton_compiles_apart_has_another_key():
    backend = make_backend(GPUTarget("cuda", 90, 32))
    arguments = [aligned(dtype, offset) for dtype in (torch.float32, torch.bfloat16) for offset in (0, 1)]
    arguments += [0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**40, -1, -16, True, False, 1.0, 0.0, 2.5, None]
    blocks = (torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64))
    arguments += [TensorDescriptor(v, [64, 64], [64, 1], [rows, 32]) for v in blocks for rows in (16, 32)]
    seen = [(native_specialize_impl(type(backend), a, False, True, True), kinds((a,))[0]) for a in arguments]
    for (theirs, ours), (other, our_other) in itertools.combinations(seen, 2):
        assert theirs == other or ours != our_other, f"{theirs} and {other}"
