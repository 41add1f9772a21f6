"""Machine code of CPU kernels: cached for all processes, whole or not at all, and run on any thread."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from statespan.kernels import native
from statespan.kernels.fast_math import Int, Real, exp, exp2, log1p, silu, softplus
from statespan.kernels.native import Kernel
from statespan.kernels.token_importance import token_importance, token_importance_ref
from tests.close import assert_close


def _functions(x: Real, out: Real, count: Int, scratch: Real, first: Int, last: Int) -> None:
    for i in range(count):
        out[i] = exp2(x[i])
        out[count + i] = exp(x[i])
        out[2 * count + i] = softplus(x[i])
        out[3 * count + i] = silu(x[i])
        out[4 * count + i] = log1p(exp2(-abs(x[i])))


choose_cache_folder = native.cache_folder.__wrapped__


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    kernel = Kernel(_functions)
    with pytest.MonkeyPatch.context() as patch:  # a cache of its own: the shared one does not know this file's content
        folder = tmp_path_factory.mktemp("kernels")
        patch.setattr(native, "cache_folder", lambda: folder)
        for dtype in native.REALS:
            kernel.entry(dtype)
    return kernel


@pytest.mark.parametrize("dtype, rel", [(torch.float32, 3e-7), (torch.float64, 1e-14)], ids=["float32", "float64"])
def test_elementary_functions_are_good_to_the_last_digits(functions: Kernel, dtype: torch.dtype, rel: float) -> None:
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.logspace(-9, 0, 1000), torch.tensor([0.0, -0.0])]).to(dtype)
    out = torch.empty(5, len(x), dtype=dtype)
    functions(dtype, 1, 0, 1, x.data_ptr(), out.data_ptr(), len(x))
    v = x.double()
    want = [
        v.exp2(),
        v.exp(),
        torch.nn.functional.softplus(v),
        torch.nn.functional.silu(v),
        v.abs().neg().exp2().log1p(),
    ]
    for got, exact in zip(out.double(), want, strict=True):
        off = ((got - exact).abs() / exact.abs().clamp_min(1e-30)).max().item()
        assert off < rel  # of each value, not of the largest
    assert (out[0][x == 0] == 1).all()


def test_extremes_stay_finite_and_nan_stays_nan(functions: Kernel) -> None:
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan])
    out = torch.empty(5, 5)
    functions(torch.float32, 1, 0, 1, x.data_ptr(), out.data_ptr(), 5)
    assert out[:2, :4].isfinite().all()
    assert out[2, 0] == x[0]
    assert out[2, 1] < 1e-37
    assert out[2:4, 4].isnan().all()


def test_a_damaged_file_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    x, out = torch.tensor([1.0]), torch.empty(5, 1)
    for damage in (None, b"", b"half a file"):
        for path in tmp_path.glob("*.o"):
            if damage is not None:
                path.write_bytes(damage)
        Kernel(_functions)(torch.float32, 1, 0, 1, x.data_ptr(), out.data_ptr(), 1)
        assert out[0, 0] == 2
        (path,) = tmp_path.glob("*.o")
        assert native._read(path)


def test_a_read_only_home_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert os.access(choose_cache_folder(), os.W_OK)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert choose_cache_folder().is_relative_to(tmp_path)


def test_a_second_process_needs_no_compiler() -> None:
    dt = torch.zeros(1, 2, 3)
    token_importance(dt, dt[0, 0])  # in the cache from here on
    code = (
        "import sys, torch; from statespan.kernels.token_importance import token_importance as f; "
        "print(f(torch.zeros(1, 2, 3), torch.zeros(3)).tolist(), 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_many_threads_call_at_once() -> None:
    dt, bias = torch.randn(4, 500, 96), torch.randn(96)
    want = token_importance_ref(dt, bias)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: token_importance(dt, bias), range(64)):
            assert_close(got, want, 2e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    threads = torch.get_num_threads()
    dt, bias = torch.randn(2, 500, 96), torch.randn(96)
    entry = token_importance(dt, bias)
    try:
        torch.set_num_threads(2)
        token_importance(dt, bias)  # the parent's threads exist
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(token_importance(dt, bias), entry) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
