"""How near two tensors are, as one number, and the numeric cases of the reference implementations."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

PARITY = Path(__file__).parent / "parity"


def assert_close(got: Tensor, want: Tensor, rel: float, what: str = "") -> None:
    """The largest deviation is at most `rel` of the largest wanted magnitude; shapes agree and nothing is NaN."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    off = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
    assert math.isfinite(off) and off <= rel, f"{what}: off by {off:.2e} of the largest value, allowed {rel:.0e}"


def parity_case(group: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of one stored case."""
    description = json.loads((PARITY / group / f"{name}.json").read_text())
    return description, load_file(PARITY / group / f"{name}.safetensors")


def parity_names(group: str, prefix: str) -> list[str]:
    """Cases of a group whose name begins with `prefix`."""
    return sorted(path.stem for path in (PARITY / group).glob(f"{prefix}*.json"))
