"""DeciMamba: some layers keep only the prefix tokens with the largest steps; the rest vanish for all later layers.

    score_t = norm over channels of softplus(dt_t + dt_bias)                      L2 in the paper's code
    K_s = int(max(min(P, L_base β^s), min_tokens))        P = length - tail, s = the layer's place in the list
    kept = the K_s prefix positions with the largest score, in reading order, and the tail

Source: DeciMamba, arXiv:2406.14528, section 4; get_non_decimated_indices in assafbk/DeciMamba@6290e95. Prefill only:
decoding goes on as plain Mamba from the states of the survivors.

Ours differs: K is never more than the prefix (there a prefix shorter than min_tokens, or a K of one, fails); rows of a
batch choose by their own lengths; Mamba-2 chooses by its heads; other norms and a longer tail can be asked for.
`behaviour: as_published` fails where the published code does, and has no options beyond its own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.kernels.token_importance import token_importance
from statespan.methods.base import ConfiguredMethod, ModelFacts
from statespan.methods.decimamba_params import DeciMambaParams
from statespan.models.hook import ScanInputs, Span


class DeciMamba(ConfiguredMethod):
    name: ClassVar[str] = "decimamba"
    params_class = DeciMambaParams

    def __init__(self, params: DeciMambaParams, facts: ModelFacts) -> None:
        if max(params.listed) >= facts.n_layer:
            raise params.refuse("layers", f"lie in 0 … {facts.n_layer - 1}, the model's layers", list(params.listed))
        base = params.base_tokens or facts.train_length
        if base is None:
            raise UserError("decimamba.base_tokens must be given: the checkpoint does not say its training length")
        self.params = params
        self.caps = {layer: base * params.beta**place for place, layer in enumerate(params.listed)}

    def kept_of(self, layer: int, length: int, tail: int) -> int:
        """Prefix tokens that a layer keeps of a row of `length` tokens entering it."""
        prefix = length - min(tail, length)
        if layer not in self.caps or prefix == 0:
            return prefix
        budget = int(max(min(prefix, self.caps[layer]), self.params.min_tokens))
        if self.params.behaviour == "as_published" and (budget > prefix or budget == 1):
            raise UserError(
                f"decimamba as published fails where {budget} of {prefix} prefix tokens are to be kept; "
                "use behaviour: clean, or longer prompts"
            )
        return min(budget, prefix)

    def first_layer_changed(self, length: int) -> int | None:
        tail = 1 + self.params.extra_tail
        prefix = length - min(tail, length)
        return next((layer for layer in sorted(self.caps) if self.kept_of(layer, length, tail) < prefix), None)

    def _budgets(self, layer: int, span: Span) -> list[tuple[int, int]] | None:
        """(prefix tokens kept, tail) of each row; None where no row drops any."""
        if layer not in self.caps:
            return None
        tails = [min(span.tail + self.params.extra_tail, own) for own in span.lengths]
        rows = [(self.kept_of(layer, own, tail), tail) for own, tail in zip(span.lengths, tails, strict=True)]
        drops = any(kept + tail < own for (kept, tail), own in zip(rows, span.lengths, strict=True))
        return rows if drops else None

    def looks_ahead(self, layer: int, span: Span) -> bool:
        return self._budgets(layer, span) is not None

    def survey(self, layer: int, inputs: ScanInputs) -> Tensor:
        if inputs.dt_limit is not None:  # the clamp comes before the norm
            order = {"l2": 2.0, "l1": 1.0, "max": float("inf")}[self.params.norm]
            scores: Tensor = torch.linalg.vector_norm(inputs.step_sizes().detach(), order, dim=-1)
            return scores[..., None]
        return token_importance(inputs.dt.detach(), inputs.dt_bias.detach(), norm=self.params.norm)[..., None]

    def before_scan(self, layer: int, inputs: ScanInputs, seen: Tensor | None = None) -> ScanInputs:
        budgets = self._budgets(layer, inputs.span)
        if budgets is None or seen is None:
            return inputs
        rows = [
            keep_largest(seen[row, inputs.span.length - own :, 0], kept, tail) + (inputs.span.length - own)
            for row, (own, (kept, tail)) in enumerate(zip(inputs.span.lengths, budgets, strict=True))
        ]
        lengths = tuple(len(row) for row in rows)
        kept = torch.full((len(rows), max(lengths)), -1, dtype=torch.int64, device=seen.device)
        for own, row in zip(kept, rows, strict=True):
            own[len(own) - len(row) :] = row
        return inputs.select(kept, lengths)


def keep_largest(scores: Tensor, kept: int, tail: int) -> Tensor:
    """(length,) -> positions of the `kept` largest scores before the tail and of the tail, increasing"""
    prefix = len(scores) - tail
    chosen = scores[:prefix].topk(kept, sorted=False).indices.sort().values
    return torch.cat((chosen, torch.arange(prefix, len(scores), device=scores.device)))
