"""The documents keep what they promise: links lead somewhere, figures come from a committed run. Their code: test_docs.py."""

import json
import re
from pathlib import Path

import pytest

import quant_ops as qo
from benchmarks import table

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
FOLDERS = "cpp|cuda|python|examples|benchmarks|tests|docs"


def anchors(path):
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_place_has_the_same_version():
    """pyproject.toml, from which the package takes it, the changes, and the citation."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert qo.__version__ == version


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document):
    path = ROOT / document
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        if not (path.parent / target).exists() or (anchor and anchor not in anchors(path.parent / target if target else path)):
            missing.append(link)
    named = re.findall(rf"`((?:{FOLDERS})/[\w./]*)`", prose)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_commands_exist(document):
    """`python -m benchmarks.x` names a module, `make x` a target."""
    text = (ROOT / document).read_text()
    modules = re.findall(r"python -m (benchmarks\.[\w.]+)", text)
    assert not [m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_benchmark_tables_are_those_of_the_newest_results():
    document, newest = table.DOCUMENT.read_text(), {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        data = json.loads(path.read_text())
        threads = data["machine"].get("threads")
        if threads in (None, 1) or isinstance(threads, list):  # a run of whole models holds all its thread counts
            newest[table.kind(data)] = data
    assert newest.keys() == {kind for kind in table.SHOW if f"<!-- {kind} table -->" in document}
    assert newest.keys() >= {"operators", "linear", "model"}
    for data in newest.values():
        assert table.with_tables(document, data) == document, "run: python -m benchmarks.table document <results>"


def test_figures_of_the_readme_are_those_of_the_results():
    """Each row of the table of speeds, except for the mean: ours, float, the fastest other int8 package if any, the last ratio."""
    expected = []
    for file, stem, shape, ours, floating, unit in (
        ("linear-cpu-zen4-1-thread", "linear", "128x3072x768", "ours dynamic", "fp32", 1),
        ("linear-cpu-zen4-1-thread", "linear", "1x4096x4096", "ours dynamic", "fp32", 1),
        ("model-cpu-zen4", "bert", "1x128", "ours fused", "fp32", 1e3),
        ("networks-cpu-zen4", "resnet-50", "1x3x224x224", "ours static chained, int8 sums", "fp32", 1e3),
        ("h200-gpu", "linear", "4096x4096x4096", "ours dynamic", "bf16", 1),
        ("h200-gpu", "conv2d", "2x640x32x32_640_k3_p1", "ours static", "bf16", 1),
    ):
        data = json.loads((ROOT / "benchmarks" / "results" / f"2026-11-{file}.json").read_text())
        rows = [r for r in data["results"] if (r["stem"], r["shape"], r.get("threads", 1)) == (stem, shape, 1)]
        times = {r["contender"]: r["median_us" if table.kind(data) == "gpu" else "min_us"] / unit for r in rows}
        int8 = [t for name, t in times.items() if not name.startswith(("ours", "fp32", "fp16", "bf16"))]
        figures = [times[ours], times[floating], *([min(int8)] if int8 else [])]
        digits = 0 if unit == 1 and times[ours] >= 100 else 1
        ratio = [f"{min(int8) / times[ours]:.2f}"] if int8 else []
        expected.append([*(f"{figure:.{digits}f}" for figure in figures), *ratio])
    models = {r["contender"]: r["graph_ms"] for r in data["models"] if r["model"] == "SD-1.5 U-Net"}
    expected.append([f"{models[kind]:.2f}" for kind in ("int8 static", "bf16")])
    section = (ROOT / "README.md").read_text().split("## Speed")[1].split("## Support")[0]
    lines = [line for line in section.splitlines() if re.search(r"\d (us|ms) \|", line)]
    assert [re.findall(r"\| ([\d.]+)", line) for line in lines] == expected
