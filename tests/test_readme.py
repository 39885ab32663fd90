"""The documents keep what they promise: snippets run, links lead somewhere, figures come from a committed run."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_readme_has_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs_by_itself(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_and_named_files_exist(document):
    path = ROOT / document
    text = path.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    named = re.findall(r"`((?:cpp|cuda|python|examples|benchmarks|tests)/[\w./]*)`", prose)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_benchmark_tables_are_those_of_the_newest_results():
    spec = importlib.util.spec_from_file_location("benchmark_table", ROOT / "benchmarks" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    newest = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*cpu*.json")):
        data = json.loads(path.read_text())
        threads = data["machine"]["threads"]
        if threads == 1 or isinstance(threads, list):  # a run of whole models holds all its thread counts
            newest[data.get("kind", "operators")] = data
    placed = {kind for kind, place in table.PLACES.items() if f"<!-- {place} -->" in README}
    assert newest.keys() == placed >= {"operators", "linear", "model"}
    for data in newest.values():
        assert table.with_tables(README, data) == README, "run: python benchmarks/table.py readme <results>"
