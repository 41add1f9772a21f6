"""Rows of the ledger: who asked (trial, sample, rung) beside what came of it, computed or taken from elsewhere."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from statespan.orchestration.items import SampleOutcome
from statespan.orchestration.ledger import Known, params_text
from statespan.orchestration.plan import Candidate, Plan
from statespan.orchestration.samples import Entry


def identity_columns(candidate: Candidate, entry: Entry, rung: int) -> dict[str, Any]:
    return {
        "trial_id": candidate.trial_id,
        "method": candidate.setting.method,
        "params": params_text(candidate.identity.params),
        "task": entry.task,
        "sample_id": entry.id,
        "document": entry.document,
        "split": entry.split,
        "rung": rung if entry.split == "search" else -1,
        "length": entry.length,
        "depth": entry.depth,
        "tokens_prompt": entry.prompt_tokens,
    }


def reused_columns(known: Known, origin: Literal["vanilla", "twin"], key: str, scope: str) -> dict[str, Any]:
    return {
        "key": key,
        "scope": scope,
        "origin": origin,
        "status": "done",
        "score": known.score,
        "layer_tokens": 0,
        "layer_tokens_shared": known.layer_tokens,
        "finished_at": datetime.now(UTC),
    }


def computed_row(
    plan: Plan, candidate: Candidate, entry: Entry, rung: int, outcome: SampleOutcome, worker: str
) -> dict[str, Any]:
    return identity_columns(candidate, entry, rung) | {
        "key": outcome.key,
        "scope": plan.scope,
        "origin": "computed",
        "status": outcome.status,
        "score": outcome.score,
        "error": outcome.error or None,
        "text": outcome.text,
        "ids": list(outcome.ids),
        "logprobs": list(outcome.logprobs),
        "target_tokens": list(outcome.target_tokens),
        "greedy": list(outcome.greedy),
        "tokens_new": outcome.tokens_new,
        "prefill_seconds": outcome.prefill_seconds,
        "decode_seconds": outcome.decode_seconds,
        "peak_bytes": outcome.peak_bytes,
        "layer_tokens": outcome.layer_tokens,
        "layer_tokens_shared": outcome.layer_tokens_shared,
        "worker": worker,
        "finished_at": datetime.now(UTC),
    }
