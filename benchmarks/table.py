"""Tables of results, for the screen and for docs/benchmarks.md; and the small results file of a run of the operators.

python -m benchmarks.table compact out.json benchmarks/results/2026-11-cpu-zen5-1-thread.json
python -m benchmarks.table show benchmarks/results/2026-11-cpu-zen5-1-thread.json              all shapes
python -m benchmarks.table document benchmarks/results/2026-11-cpu-zen5-1-thread.json          into docs/benchmarks.md

Read next: common/table.py, operators/table.py, packages/table.py, gpu/table.py.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common import results
from benchmarks.gpu.table import gpu
from benchmarks.operators import table as operators
from benchmarks.packages.table import accuracy, conv2d, generation, linear, model, networks, weight_only

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
SHOW = {
    "operators": operators.show,
    "linear": linear,
    "weight_only": weight_only,
    "conv2d": conv2d,
    "networks": networks,
    "model": model,
    "generation": generation,
    "accuracy": accuracy,
    "gpu": gpu,
}


def kind(data):
    return data.get("kind", "operators")


def marks(data):
    """The lines between which the document has the tables of this kind of results."""
    return f"<!-- {kind(data)} table -->", f"<!-- end of {kind(data)} table -->"


def show(data):
    return SHOW[kind(data)](data)


def with_tables(document, data):
    """The document with the tables between their marks."""
    begin, end = marks(data)
    if begin not in document or end not in document:
        raise SystemExit(f"expected the lines {begin} and {end} in {DOCUMENT}")
    before, rest = document.split(begin)
    tables = operators.document(data) if kind(data) == "operators" else show(data)
    return f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compact", "show", "document"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="of compact")
    parser.add_argument("--cpu", help="of compact: a better name for the processor")
    options = parser.parse_args()
    data = json.loads(options.source.read_text())
    if options.command == "compact":
        options.target.write_text(results.as_text(results.compact(data, options.cpu)))
    elif options.command == "document":
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), data))
    else:
        print(show(data))


if __name__ == "__main__":
    main()
