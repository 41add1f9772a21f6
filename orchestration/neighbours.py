"""Results of the other studies below one output folder, by key: repeating or varying a study costs only what is new."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from statespan.config import Study
from statespan.orchestration.assemble import FACTS
from statespan.orchestration.files import read_json
from statespan.orchestration.ledger import Ledger


class OtherStudies:
    def __init__(self, study: Study, scope: str) -> None:
        self.own, self.output, self.scope = study.folder, study.output, scope
        self._known: list[tuple[pa.Table, dict[str, int]]] | None = None

    def find(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Key -> a whole ledger row, for those that some other study of the same model and numerics knows."""
        missing = set(keys)
        found: dict[str, dict[str, Any]] = {}
        for table, places in self._tables():
            here = missing & places.keys()
            if here:
                rows = table.take(pa.array([places[key] for key in sorted(here)])).to_pylist()
                found |= {row["key"]: row for row in rows}
                missing -= here
        return found

    def _tables(self) -> list[tuple[pa.Table, dict[str, int]]]:
        """Each other study's results, read once, with the place of every key."""
        if self._known is None:
            folders = (path.parent for path in sorted(self.output.glob(f"*/{FACTS}")))
            mine = [folder for folder in folders if folder != self.own and self._same_scope(folder)]
            tables = [Ledger(folder / "ledger").results(self.scope) for folder in mine]
            self._known = [(table, {key: i for i, key in enumerate(table["key"].to_pylist())}) for table in tables]
        return self._known

    def _same_scope(self, folder: Path) -> bool:
        facts = read_json(folder / FACTS)
        return isinstance(facts, dict) and facts.get("scope") == self.scope
