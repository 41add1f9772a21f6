"""Where a model runs. `auto` is decided once, so that what is recorded is what ran."""

from __future__ import annotations

from statespan.errors import UserError, unknown

NAMES = ("auto", "cpu", "cuda")


def resolve_device(name: str) -> str:
    """cpu or cuda; `auto` is a GPU where there is one.

    Raises:
        UserError: no such device, or none on this machine.
    """
    import torch

    if name not in NAMES:
        raise unknown("device", name, NAMES)
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError(f"this machine has no CUDA device that torch {torch.__version__} can use; take cpu or auto")
    return "cuda" if found and name != "cpu" else "cpu"
