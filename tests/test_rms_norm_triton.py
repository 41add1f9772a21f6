"""The fused norms in Triton against the float64 definitions, and those against the model's own layers."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel module is imported
pytest.importorskip("triton")

from statespan.kernels import rms_norm as definition
from statespan.kernels import rms_norm_triton
from statespan.models.norm import GatedRMSNorm
from tests.close import assert_close
from tests.gpu import DEVICE, draw, poisoned_buffers

__all__ = ["poisoned_buffers"]
REL = 2e-6  # float32 sums of squares
EPS = 1e-5


@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 64), (2, 0, 8)])
@pytest.mark.parametrize("added", [False, True])
def test_residual_and_norm(shape, added):
    rows, weight = draw(*shape), draw(shape[-1])
    residual = draw(*shape) if added else None
    got, stream = rms_norm_triton.rms_norm(rows, weight, EPS, residual=residual)
    wide = None if residual is None else residual.double()
    want, sums = definition.rms_norm_ref(rows.double(), weight.double(), EPS, residual=wide)
    assert_close(got, want, REL, "norm")
    assert_close(stream, sums, REL, "stream")


@pytest.mark.parametrize("groups, norm_before_gate", [(1, False), (3, False), (1, True), (3, True)])
def test_gated_norm_of_slices(groups, norm_before_gate):
    both, weight = draw(2, 5, 96), draw(48)
    y, z = both.chunk(2, dim=-1)
    got = rms_norm_triton.gated_rms_norm(y, z, weight, EPS, groups=groups, norm_before_gate=norm_before_gate)
    layer = GatedRMSNorm(48, EPS, groups, norm_before_gate).to(DEVICE).double()
    layer.weight.data = weight.double()
    assert_close(got, layer(y.double(), z.double()), REL)


def test_the_stream_keeps_its_own_dtype_and_the_norm_takes_the_weights():
    rows, residual, weight = draw(4, 32).bfloat16(), draw(4, 32), torch.ones(32, dtype=torch.bfloat16, device=DEVICE)
    normed, stream = rms_norm_triton.rms_norm(rows, weight, EPS, residual=residual)
    assert (normed.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(stream, residual + rows.float())


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="divide the width 10; got 3"):
        definition.gated_rms_norm(draw(1, 10), draw(1, 10), draw(10), EPS, groups=3)
