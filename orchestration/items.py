"""What travels between driver and workers: small, frozen, picklable, the same in a test and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from statespan.orchestration.vitals import Vitals

Status = Literal["done", "failed", "oom", "timeout"]
BASELINE = "vanilla"
"""Id of the unmodified model's trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A method with its parameters, as a worker builds it."""

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Artifact -> sha256, which the worker's own files must have."""


VANILLA_SETTING = Setting(method="vanilla")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkItem:
    """Some samples of one task and about one length, under one setting: what a worker does in one go."""

    id: str
    trial_id: str
    setting: Setting
    task: str
    rung: int
    """The last one of its samples'."""

    split: Literal["search", "heldout"]
    rows: tuple[int, ...]
    """Rows of the sample table."""

    keys: tuple[str, ...]
    length: int
    """Longest prompt, tokens: what the batch limit and the cost model go by."""

    tokens: int
    """Prompt tokens of all samples."""

    layers: int
    """Layers that this setting computes when it finds everything it can share in the store."""

    shared_layers: int = 0
    """Layers that it finds there only on the worker that had the item before it."""

    pack: str
    """Items of one pack have the same samples; one worker runs them one after the other, to share their streams."""

    alone: bool = False
    """Run sample by sample and share nothing: what a measurement of seconds needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOutcome:
    """What one sample came to, ready for the ledger."""

    row: int
    key: str
    status: Status
    score: float
    """NaN unless done."""

    error: str = ""
    text: str | None = None
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of each target of a likelihood sample: summed nats."""

    target_tokens: tuple[int, ...] = ()
    greedy: tuple[bool, ...] = ()
    tokens_new: int = 0
    prefill_seconds: float = float("nan")
    decode_seconds: float = float("nan")
    peak_bytes: int | None = None
    layer_tokens: int = 0
    layer_tokens_shared: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkResult:
    item_id: str
    outcomes: tuple[SampleOutcome, ...]
    seconds: float
    worker: str
    batch: int
    """Samples that ran together at the end: less than asked for where memory ran out."""

    ran_out: bool = False
    """True where memory ran out on the way, so that the driver remembers the smaller batch."""

    vitals: Vitals | None = None
