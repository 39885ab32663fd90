"""Times a Linear in quant_ops and in every other package that is installed, in turns, in one process; writes JSON, prints a table.

python benchmarks/linear.py                                   all shapes, one thread: minutes, most of them compilation for torchao
python benchmarks/linear.py --threads 8 --out linear-8.json
python benchmarks/linear.py --shapes smoke --seconds 0
"""

import argparse
from pathlib import Path

import peers
import shapes
import table
import torch


def measure(name, shape, machine, options):
    """The rows of one shape, and why contenders are missing."""
    problem = peers.Problem(shape, machine["threads"])
    calls, distances, missing = peers.prepare(peers.CONTENDERS, problem, reference=problem.reference)
    rows = peers.timed(calls, distances, options, stem="linear", set=name, shape=str(shape))
    limit = peers.limit_us(shape.macs, shape.N * shape.K, machine["threads"], machine["peak_gops"])
    if limit:
        for row in rows:
            row |= {"limit_us": float(f"{limit:.4g}"), "percent_of_limit": round(100 * limit / row["min_us"], 1)}
    return rows, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", choices=["smoke", "default"], default="default")
    parser.add_argument("--seconds", type=float, default=5, help="per shape (default 5)")
    parser.add_argument("--rounds", type=int, default=8, help="at least, per shape (default 8)")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--cpu", help="a better name for the processor")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = {"kind": "linear", "machine": peers.machine(options.cpu), "missing": {}, "results": []}
    for name, group in shapes.PEERS.items():
        if options.shapes == "default" or name in shapes.SMOKE:
            for shape in group:
                rows, missing = measure(name, shape, data["machine"], options)
                data["results"] += rows
                for contender, reason in missing.items():
                    data["missing"].setdefault(contender, {})[str(shape)] = reason
    if options.out:
        options.out.write_text(table.text(data))
    print(table.show(data))


if __name__ == "__main__":
    main()
