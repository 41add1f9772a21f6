"""ReMamba: read the prompt once, replace a window of it by the K vectors that matter most, read the result again.

    h = norm_f(backbone(X))                      stage 1, the unmodified model
    c_i = cos(Key(h_i), Query(h_{P-1}))          i in [S, E), S = int(s P), E = S + W, W = max(1, ceil(P p))
    X' = X[:S], Value(h_j) …, X[E:]              j: the K = ceil(W ρ) largest c, in text order
    Δ_j = softplus(ReLU(c_j) r_j + Θ + b)        stage 2, in every layer; all other tokens as ever

Source: ReMamba, arXiv:2408.15496, section 3; lblankl/ReMamba@cb127bc. Selection, rounding and ablations are the code's.
Training is statespan/training/remamba.py; decoding goes on from stage 2 as plain Mamba.

Ours differs: windows, scores and K by each row's own prompt; scores in float32; K = 0 cuts the window out (the
truncation control), p = 0 is vanilla; vectors of the ablations can enter in text order (theirs enter reversed);
gradients are exact through both passes (`score_grad: times_score` is the paper's rescaling); random draws follow the
prompt's tokens and a seed. Not here: vectors placed behind the prompt (the paper's "special", its worst variant).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from statespan.errors import UserError
from statespan.methods import artifacts as files
from statespan.methods.adapter import Adapter, Selection, from_artifact
from statespan.methods.base import ConfiguredMethod, ModelFacts
from statespan.methods.insertion import Inserted, Window, insertions, window_of
from statespan.methods.remamba_params import ReMambaParams
from statespan.methods.splice import Adapted, spliced, vector_columns
from statespan.models.hook import VANILLA, Method
from statespan.models.runner import Prefilled, Runner, Tokens

TRAIN = "`statespan train --method remamba`"


class ReMamba(ConfiguredMethod):
    name: ClassVar[str] = "remamba"
    params_class = ReMambaParams

    def __init__(self, params: ReMambaParams, facts: ModelFacts, adapter: Adapter | None) -> None:
        if params.inserts and (adapter is None or adapter.selection is None):
            raise UserError(f"remamba.adapter {params.adapter!r} holds no Query, Key and Value; {TRAIN} makes one")
        self.params, self.adapter = params, adapter
        self.artifacts = {} if adapter is None else {"adapter": adapter.digest}

    @classmethod
    def build(cls, params: ReMambaParams, facts: ModelFacts, artifacts: Mapping[str, Any]) -> Self:
        given = artifacts.get("adapter", params.adapter)
        if given is None or isinstance(given, Adapter):
            return cls(params, facts, given)
        name = str(given)
        path = files.place_of(facts, name, f"train one with {TRAIN}")
        return cls(params, facts, from_artifact(files.read(path, facts, TRAIN), facts))

    def first_layer_changed(self, length: int) -> int | None:
        whole = self.params.selector == "none" or self._window(length).size == 0
        rewrites = self.adapter is not None and bool(self.adapter.changes)
        return None if whole and not rewrites else 0

    def runner(self, runner: Runner) -> Runner:
        if self.adapter is None or not self.adapter.changes or runner.name == self.adapter.digest:
            return runner
        return runner.derive(self.adapter.digest, self.adapter.changed)

    def _window(self, prompt_length: int) -> Window:
        params = self.params
        if params.selector == "none" or prompt_length < params.min_length:
            return Window(0, 0, 0)
        return window_of(prompt_length, params.start, params.window, params.ratio, params.kept, params.min_tail)

    def prefill(self, runner: Runner, prompt: Tokens, tail: int = 1) -> Prefilled:
        runner = self.runner(runner)
        # what follows the prompt (tail - 1 tokens of an answer) is neither compressed nor asked
        windows = [self._window(own - tail + 1) for own in prompt.lengths]
        if not any(window.size for window in windows):
            return runner.prefill(prompt, tail=tail)
        rows = self.insertions(runner, prompt, windows, tail)
        stream, alpha, mask = spliced(runner, prompt, windows, rows)
        method: Method = VANILLA
        if alpha is not None:
            if self.params.score_grad == "times_score" and alpha.requires_grad:
                alpha.register_hook(lambda grad: grad * alpha.detach())
            reach = vector_columns(stream.span.lengths, windows, rows)
            method = Adapted(self._selection(alpha.device), alpha, mask, self.params.delta_rule, reach)
        chunk = runner.even_chunk(stream.span.length)
        return runner.finish(runner.run(stream, method, 0, runner.n_layer, tail, chunk=chunk), tail)

    def insertions(self, runner: Runner, prompt: Tokens, windows: Sequence[Window], tail: int) -> list[Inserted]:
        """Stage 1, and what it leaves of each row's window."""
        keep_graph = torch.is_grad_enabled() and not self.params.detach_stage1
        # kernels that keep no graph take rows as wide as their weights
        narrow = keep_graph and torch.is_autocast_enabled(prompt.ids.device.type)
        with torch.set_grad_enabled(keep_graph), torch.autocast(prompt.ids.device.type, enabled=narrow):
            hidden = runner.vanilla(prompt, runner.n_layer).hidden if self.params.inserts else None
        alike: dict[tuple[int, Window], list[int]] = {}
        for row, (own, window) in enumerate(zip(prompt.lengths, windows, strict=True)):
            alike.setdefault((own, window), []).append(row)
        found: dict[int, Inserted] = {}
        for (own, window), rows in alike.items():
            first = prompt.ids.shape[1] - own
            at: Any = rows if len(alike) > 1 else slice(None)
            ids = prompt.ids[at, first : first + own - tail + 1]
            if window.kept == 0 or hidden is None:
                made = [Inserted.nothing(runner.model.config.d_model, ids.device)] * len(rows)
            else:
                # one more than the window: the fixed selector takes the token behind it
                upto = min(window.start + window.size + 1, ids.shape[1])
                states = runner.model.norm_f(hidden[at, first + window.start : first + upto])
                query = runner.model.norm_f(hidden[at, first + ids.shape[1] - 1])
                made = insertions(self.params, self._selection(ids.device), states, query, window, ids)
            found |= dict(zip(rows, made, strict=True))
        return [found[row] for row in range(len(windows))]

    def _selection(self, device: torch.device) -> Selection:
        assert self.adapter is not None and self.adapter.selection is not None
        return self.adapter.selection.to(device)  # in place, once: the model does not move
