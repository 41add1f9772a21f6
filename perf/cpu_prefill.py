"""How fast the CPU reads a prompt: statespan beside transformers and mambapy, one process, the same weights.

    python perf/cpu_prefill.py [--tokens 4096] [--rounds 5] [--threads 2]

Each reads the prompt in float32 and gives the last position's logits. They take turns, so that a busy machine is busy
for all of them; the best round counts. No speed is printed for a model whose logits differ from ours. Needs the
packages of the `dev` extra.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from statespan.models.checkpoint import load_model
from statespan.models.config import ModelConfig
from statespan.models.lm import MambaLM
from statespan.models.runner import Runner, Tokens

REL = 1e-3  # of the largest logit: float32 through 8 layers, sums in three different orders
Read = Callable[[Tensor], Tensor]


def ours(model: MambaLM) -> Read:
    runner = Runner(model)
    return lambda ids: model.logits(runner.prefill(Tokens(ids, (ids.shape[1],))).hidden)[0, -1]


def transformers_peer(model: MambaLM) -> Read:
    from transformers import MambaConfig, MambaForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it says for each function that it runs in torch
    c = model.config
    config = MambaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, num_hidden_layers=c.n_layer, state_size=c.d_state,
        conv_kernel=c.d_conv, time_step_rank=c.dt_rank, layer_norm_epsilon=c.norm_eps,
    )  # fmt: skip
    peer = MambaForCausalLM(config).eval()
    names = {"embedding.weight": "backbone.embeddings.weight", "lm_head.weight": "lm_head.weight"}
    peer.load_state_dict({names.get(k, f"backbone.{k}"): v for k, v in model.state_dict().items()})
    return lambda ids: peer(ids, use_cache=True, logits_to_keep=1).logits[0, -1]


def mambapy_peer(model: MambaLM) -> Read:
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm  # its own LM class wants einops, which it does not install

    c = model.config
    config = MambaConfig(
        d_model=c.d_model, n_layers=c.n_layer, dt_rank=c.dt_rank, d_state=c.d_state, d_conv=c.d_conv,
        rms_norm_eps=c.norm_eps,
    )  # fmt: skip
    layers, norm = Mamba(config).eval(), RMSNorm(c.d_model, c.norm_eps)
    weights = model.state_dict()
    layers.load_state_dict({k: v for k, v in weights.items() if k.startswith("layers.")})
    norm.load_state_dict({"weight": weights["norm_f.weight"]})
    embedding, head = weights["embedding.weight"], weights["lm_head.weight"]
    return lambda ids: norm(layers(torch.nn.functional.embedding(ids, embedding))[:, -1])[0] @ head.T


def measure(readers: dict[str, Read], ids: Tensor, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each reader's best round, and how far its logits are from the first reader's."""
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    logits: dict[str, Tensor] = {}
    for read in readers.values():
        read(ids[:, :64])  # warm
    for _ in range(rounds):
        for name, read in readers.items():
            started = time.perf_counter()
            logits[name] = read(ids)
            seconds[name].append(time.perf_counter() - started)
    want = next(iter(logits.values()))
    off = {name: ((v - want).abs().max() / want.abs().max()).item() for name, v in logits.items()}
    return {name: min(values) for name, values in seconds.items()}, off


def facts(config: ModelConfig, tokens: int, threads: int) -> str:
    machine = platform.processor() or platform.machine()
    return (
        f"Mamba-1 d_model {config.d_model}, {config.n_layer} layers, d_state {config.d_state}, vocabulary "
        f"{config.vocab_size}; {tokens} tokens, float32, {threads} threads, {machine}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="times each model reads it; the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads for all")
    parser.add_argument("--model", default="mamba1-5m", help="a shipped Mamba-1 or a folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model).model
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        readers = {"statespan": ours(model), "mambapy": mambapy_peer(model), "transformers": transformers_peer(model)}
        seconds, off = measure(readers, ids, args.rounds)
    print(facts(model.config, args.tokens, args.threads))
    print(f"{'':14}{'seconds':>9}{'tokens/s':>10}{'statespan is':>14}{'logits off by':>15}")
    for name, value in seconds.items():
        if not off[name] <= REL:
            raise SystemExit(f"{name}: logits off by {off[name]:.1e} of the largest; no speed for another result")
        ratio = f"{value / seconds['statespan']:.1f}x as fast"
        print(f"{name:14}{value:>9.3f}{args.tokens / value:>10,.0f}{ratio:>14}{off[name]:>15.1e}")


if __name__ == "__main__":
    main()
