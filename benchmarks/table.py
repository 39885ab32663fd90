"""From pytest-benchmark's JSON to a small results file, and from that to Markdown tables.

python benchmarks/table.py compact out.json benchmarks/results/2026-11-cpu-zen5-1-thread.json
python benchmarks/table.py show benchmarks/results/2026-11-cpu-zen5-1-thread.json              all shapes
python benchmarks/table.py readme benchmarks/results/2026-11-cpu-zen5-1-thread.json            into the README's marked place
"""

import argparse
import json
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark table -->", "<!-- end of benchmark table -->"

_MACHINE = ("cpu", "isa", "threads", "torch", "quant_ops")
_FIGURES = ("gops", "percent_of_peak", "gbs")


def compact(raw, cpu=None):
    """The machine and the kernels once, and per timing: stem, shape, contender, times in microseconds, GOP/s or GB/s."""
    infos = [b["extra_info"] for b in raw["benchmarks"]]
    machine = {key: infos[0][key] for key in _MACHINE} | {"date": raw["datetime"][:10]}
    machine["peak_gops"] = _round(infos[0]["peak_gops"])
    machine["kernels"] = {info["stem"]: info["kernel"] for info in infos}
    if cpu:
        machine["cpu"] = cpu
    results = []
    for info, stats in zip(infos, (b["stats"] for b in raw["benchmarks"]), strict=True):
        row = {key: info[key] for key in ("stem", "set", "shape", "contender")}
        row |= {"min_us": _round(stats["min"] * 1e6), "median_us": _round(stats["median"] * 1e6), "rounds": stats["rounds"]}
        results.append(row | {key: _round(info[key]) for key in _FIGURES if key in info})
    return {"machine": machine, "results": results}


def _round(value):
    return value if value is None else float(f"{value:.4g}")


def _time(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(results, stem, title=None):
    """One Markdown table: a row per shape, a column per contender (minimum in microseconds), our share of the peak, and the time of
    the fastest other contender over ours. Ours is the fastest that needs no calibration: static contenders do not count."""
    rows = {}
    for r in results:
        if r["stem"] == stem:
            rows.setdefault((r["set"], r["shape"]), {})[r["contender"]] = r
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    has_peak = any("percent_of_peak" in r for row in rows.values() for r in row.values())
    head = [title or stem, *names, *(["% of peak"] if has_peak else []), "best other / ours"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for (group, shape), row in rows.items():
        ours = min((r for name, r in row.items() if name.startswith("ours") and "static" not in name), key=lambda r: r["min_us"])
        other = min(r["min_us"] for name, r in row.items() if not name.startswith("ours"))
        cells = [f"{group} {shape}", *(_time(row[name]["min_us"]) if name in row else "" for name in names)]
        cells += [f"{ours['percent_of_peak']:.0f}"] if has_peak else []
        lines.append("| " + " | ".join([*cells, f"{other / ours['min_us']:.2f}"]) + " |")
    return "\n".join(lines)


def heading(machine):
    peak = f"; int8 peak {machine['peak_gops']:.0f} GOP/s, measured in the same process" if machine["peak_gops"] else ""
    return (
        f"{machine['cpu']}, {machine['isa']}, {machine['threads']} thread(s), torch {machine['torch']}, {machine['date']}{peak}. "
        "Times are minima in microseconds. A last column below 1 is a loss."
    )


def show(data):
    results = data["results"]
    stems = dict.fromkeys(r["stem"] for r in results)
    return "\n\n".join([heading(data["machine"]), *(table(results, stem) for stem in stems)])


def readme(data):
    """The README's part: the products, and the tensors of torch_quant_ext's table."""
    results = [r for r in data["results"] if r["set"] != "tiny"]
    parts = [
        heading(data["machine"]),
        table(results, "int8_linear", "`int8_linear` M x N x K"),
        table(results, "int8_gemm", "`int8_gemm` M x N x K, weight not packed"),
        table(results, "int8_conv2d", "`int8_conv2d` NxCxHxW_O_kernel_padding"),
        table(results, "quant_tensor_forward", "`quant_tensor_forward`"),
    ]
    return "\n\n".join(parts)


def with_tables(text, data):
    """The README's text with its marked place filled."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{readme(data)}\n{END}{rest.split(END)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compact", "show", "readme"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="of compact")
    parser.add_argument("--cpu", help="of compact: a better name for the processor")
    options = parser.parse_args()
    data = json.loads(options.source.read_text())
    if options.command == "compact":
        data = compact(data, options.cpu)
        rows = ",\n    ".join(json.dumps(row) for row in data["results"])  # one line each: readable, and a diff shows what changed
        machine = json.dumps(data["machine"])
        options.target.write_text(f'{{\n  "machine": {machine},\n  "results": [\n    {rows}\n  ]\n}}\n')
    elif options.command == "readme":
        README.write_text(with_tables(README.read_text(), data))
    else:
        print(show(data))


if __name__ == "__main__":
    main()
