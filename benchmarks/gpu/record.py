"""The JSON file of a GPU run, to which every stage and every case adds."""

import json
from pathlib import Path

from benchmarks.common import results


class Record:
    """The JSON file: rewritten whole, and at once, with every entry."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.data = {"kind": "gpu", "machine": {}, "rehearsal": False, "stages": {}, "cut": [], "ceilings": [], "missing": {}}
        self.data["results"] = []
        if not fresh:
            self.data = json.loads(path.read_text())

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(results.as_text(self.data))
        partial.replace(self.path)
