"""The decode step's products on the CPU: the float64 definition's values, and for each row the bits it has alone."""

import pytest
import torch

from statespan.kernels.step_linear import Conv, Norm, step_linear, step_linear_ref
from statespan.models.fused_step import rows_apart
from statespan.models.runner import Cache, Runner, Tokens
from tests.close import assert_close
from tests.test_step_linear_triton import doubled
from tests.tiny import tiny_model

REL = 2e-6  # float32 sums of a few dozen products


def drawn(rows, width, outs, conv_width, first, *, norm, bias, residual):
    random = torch.Generator().manual_seed(rows + width)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    before = Norm(draw(width), 1e-5) if norm else None
    conv = None
    if conv_width:
        conv = Conv(draw(rows, 3, conv_width), draw(conv_width, 4), draw(conv_width) if bias else None, first)
    parts = {"norm": before, "conv": conv, "residual": draw(rows, outs) if residual else None}
    return draw(rows, 2 * width)[:, width:], draw(outs, width), draw(outs) if bias else None, parts


CASES = [
    pytest.param(3, 37, 29, 11, 7, {"norm": True, "bias": True, "residual": True}, id="no_power_of_two"),
    pytest.param(5, 24, 150, 90, 50, {"norm": True, "bias": True, "residual": False}, id="conv_over_three_blocks"),
    pytest.param(2, 16, 64, 64, 0, {"norm": False, "bias": False, "residual": True}, id="one_block"),
    pytest.param(1, 9, 3, 0, 0, {"norm": False, "bias": False, "residual": False}, id="fewer_than_go_together"),
]


@pytest.mark.parametrize("rows, width, outs, conv_width, first, with_parts", CASES)
def test_a_product_with_all_around_it(rows, width, outs, conv_width, first, with_parts):
    x, weight, bias, parts = drawn(rows, width, outs, conv_width, first, **with_parts)
    exact = {name: doubled(part) if name != "residual" else part for name, part in parts.items()}
    for _ in range(2):  # the conv's state moves on
        got = step_linear(x, weight, bias, **parts)
        wide = None if bias is None else bias.double()
        wanted = exact | {"residual": None if exact["residual"] is None else exact["residual"].double()}
        assert_close(got, step_linear_ref(x.double(), weight.double(), wide, **wanted), REL, "y")
        if parts["conv"] is not None:
            assert_close(parts["conv"].state, exact["conv"].state, REL, "conv state")


@pytest.mark.parametrize("rows, width, outs, conv_width, first, with_parts", CASES[:3])
def test_a_row_has_the_bits_it_has_alone(rows, width, outs, conv_width, first, with_parts):
    x, weight, bias, parts = drawn(rows, width, outs, conv_width, first, **with_parts)
    norm, conv, residual = parts["norm"], parts["conv"], parts["residual"]
    apart = []
    for row in range(rows):
        at = slice(row, row + 1)
        own_conv = conv and conv._replace(state=conv.state[at].clone())
        own_residual = None if residual is None else residual[at]
        apart.append(step_linear(x[at], weight, bias, norm=norm, conv=own_conv, residual=own_residual))
    assert torch.equal(step_linear(x, weight, bias, **parts), torch.cat(apart))


def test_other_dtypes_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"float32; got torch\.bfloat16"):
        step_linear(torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8).bfloat16())


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_steps_of_many_rows_are_the_plain_ones_and_each_rows_own(kind):
    narrow, wide = (Runner(tiny_model(kind, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert rows_apart(narrow.model) and not rows_apart(wide.model)
    prompts = [[1 + row, 2, 3, 4, 5 + row] for row in range(5)]
    alone = [narrow.prefill(Tokens.pad([prompt])).cache for prompt in prompts]
    together = Cache.join([cache.clone() for cache in alone])
    exact = wide.prefill(Tokens.pad(prompts)).cache
    for token in range(3):
        ids = torch.arange(5) + 7 * token
        got, want = narrow.step(together, ids), wide.step(exact, ids)
        assert_close(got, want, 2e-5, "logits")  # float32 through three layers
        each = torch.cat([narrow.step(cache, ids[row : row + 1]) for row, cache in enumerate(alone)])
        assert torch.equal(got, each)
