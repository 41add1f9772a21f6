"""Results of the other studies below one output folder, by key: repeating or varying a study costs only what is new."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from statespan.config import Study
from statespan.orchestration.assemble import FACTS
from statespan.orchestration.files import read_json
from statespan.orchestration.ledger import Ledger


class OtherStudies:
    def __init__(self, study: Study, scope: str) -> None:
        self.own, self.output, self.scope = study.folder, study.output, scope
        self._keys: dict[Path, set[str]] | None = None

    def find(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Key -> a whole ledger row, for those that some other study of the same model and numerics knows."""
        missing, found = set(keys), {}
        for folder, known in self._known().items():
            here = missing & known
            if here:
                found |= Ledger(folder).rows_of(here)
                missing -= here
        return found

    def _known(self) -> dict[Path, set[str]]:
        if self._keys is None:
            folders = (path.parent for path in sorted(self.output.glob(f"*/{FACTS}")))
            mine = [folder for folder in folders if folder != self.own and self._same_scope(folder)]
            self._keys = {folder / "ledger": set(Ledger(folder / "ledger").known(self.scope)) for folder in mine}
        return self._keys

    def _same_scope(self, folder: Path) -> bool:
        facts = read_json(folder / FACTS)
        return isinstance(facts, dict) and facts.get("scope") == self.scope
