"""Benchmarks by name: what a study file's `benchmark:` may say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statespan.benchmarks.babilong import BabiLong
from statespan.benchmarks.base import Benchmark
from statespan.benchmarks.document_retrieval import DocumentRetrieval
from statespan.benchmarks.leval import LEval
from statespan.benchmarks.longbench import LongBench
from statespan.benchmarks.mqar import MQAR
from statespan.benchmarks.passkey import Passkey
from statespan.benchmarks.perplexity import Perplexity
from statespan.benchmarks.ruler import Ruler
from statespan.benchmarks.settings import Settings
from statespan.benchmarks.short_context import ShortContext
from statespan.errors import unknown

BENCHMARKS: dict[str, type[Settings]] = {
    cls.name: cls
    for cls in (BabiLong, DocumentRetrieval, LEval, LongBench, MQAR, Passkey, Perplexity, Ruler, ShortContext)
}


def build_benchmark(name: str, settings: Mapping[str, Any] | None = None) -> Benchmark:
    """The benchmark with these settings. A UserError names what is unknown or out of range."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name].build(dict(settings or {}))
