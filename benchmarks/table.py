"""From pytest-benchmark's JSON to a small results file, and from that, or from a file of one of the scripts, to tables.

python benchmarks/table.py compact out.json benchmarks/results/2026-11-cpu-zen5-1-thread.json
python benchmarks/table.py show benchmarks/results/2026-11-cpu-zen5-1-thread.json              all shapes
python benchmarks/table.py readme benchmarks/results/2026-11-cpu-zen5-1-thread.json            into the README's marked place
"""

import argparse
import json
import statistics
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
PLACES = {  # of the README, by kind of results
    "operators": "benchmark table",
    "linear": "peers table",
    "model": "model table",
    "conv2d": "conv2d table",
    "networks": "networks table",
    "gpu": "gpu table",
}

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


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _is_peer(name):
    return not name.startswith("ours")


def peers(data):
    """linear.py's table: minima in microseconds; our share of the limit and the best other contender are those of ours dynamic."""
    machine, rows, ratios = data["machine"], {}, []
    for r in data["results"]:
        rows.setdefault((r["set"], r["shape"]), {})[r["contender"]] = r
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = ["Linear M x N x K", *names, "% of limit", "best other", "best other / ours"]
    lines = [_line(head), "|---" + "|--:" * (len(head) - 1) + "|"]
    for (group, shape), row in rows.items():
        ours, best = row["ours dynamic"], min((r for name, r in row.items() if _is_peer(name)), key=lambda r: r["min_us"])
        ratios.append(best["min_us"] / ours["min_us"])
        limit = f"{ours['percent_of_limit']:.0f}" if "percent_of_limit" in ours else ""
        times = [_time(row[name]["min_us"]) if name in row else "" for name in names]
        lines.append(_line([f"{group} {shape}", *times, limit, best["contender"], f"{ratios[-1]:.2f}"]))
    packages = "".join(f", {name} {version}" for name, version in machine["packages"].items() if version and name != "transformers")
    return "\n".join(
        [
            heading(machine | {"torch": machine["torch"] + packages}),
            "",
            *lines,
            "",
            f"Geometric mean of the last column: {statistics.geometric_mean(ratios):.2f}; {sum(r < 1 for r in ratios)} of "
            f"{len(ratios)} below 1. The limit is the larger of all products at the peak and one read of the int8 weight at the "
            "bandwidth measured in the same process for its size.",
            *_missing(data),
        ]
    )


def model(data):
    """bench_model.py's tables, one per model: minima in milliseconds."""
    machine = data["machine"]
    parts = [
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}, transformers {machine['packages']['transformers']}, "
        f"{machine['date']}. Times are minima in milliseconds, of the whole encoder. A figure below 1 is a loss."
    ]
    for stem, title in (("bert", None), ("minilm", "all-MiniLM-L6-v2 with its trained weights, on real sentences:")):
        rows = {}
        for r in data["results"]:
            if r["stem"] == stem:
                rows.setdefault((r["threads"], r["shape"]), {})[r["contender"]] = r
        if rows:
            parts += [*([title] if title else []), *_model(rows)]
    return "\n".join(["\n\n".join(parts), *_missing(data)])


def _model(rows):
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = ["threads", "batch x tokens", *names, "fp32 / ours", "bf16 / ours", "best torch.ao / ours"]
    lines = [_line(head), "|--:" * len(head) + "|"]
    for (threads, shape), row in rows.items():
        milliseconds = {name: r["min_us"] / 1e3 for name, r in row.items()}
        ours = milliseconds["ours dynamic"]
        others = [milliseconds.get("fp32"), milliseconds.get("bf16")]
        others.append(min((ms for name, ms in milliseconds.items() if name.startswith("torch.ao")), default=None))
        times = [f"{milliseconds[name]:.1f}" if name in row else "" for name in names]
        lines.append(_line([str(threads), shape, *times, *(f"{other / ours:.2f}" if other else "" for other in others)]))
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    if any("least_cosine" in r for r in last.values()):
        cosines = ", ".join(f"{name} {r['least_cosine']:.4f}" for name, r in last.items() if name != "fp32")
        return ["\n".join(lines), f"Least cosine similarity of an embedding with that of fp32: {cosines}."]
    distances = ", ".join(f"{name} {r['sqnr_db']:.0f}" for name, r in first.items() if name != "fp32")
    return ["\n".join(lines), f"Signal to noise of the last hidden state against fp32, in dB: {distances}."]


def _ratio(others, ours):
    return f"{min(others) / ours:.2f}" if others else ""


def networks(data):
    """networks.py's table: minima in milliseconds."""
    machine, rows = data["machine"], {}
    for r in data["results"]:
        rows.setdefault((r["stem"], r["threads"], r["shape"]), {})[r["contender"]] = r
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    ratios = ["fp32 / ours dynamic", "bf16 / ours dynamic", "best int8 other / best ours static"]
    head = ["network", "threads", "batch", *names, *ratios]
    lines = [_line(head), "|---" + "|--:" * (len(head) - 1) + "|"]
    for (network, threads, shape), row in rows.items():
        ms = {name: r["min_us"] / 1e3 for name, r in row.items()}
        dynamic, static = ms["ours dynamic"], min(ms["ours static"], ms["ours static chained"])
        int8 = [time for name, time in ms.items() if name.startswith(("torch.ao", "ONNX"))]
        cells = [network, str(threads), shape, *(f"{ms[name]:.1f}" if name in ms else "" for name in names)]
        lines.append(_line([*cells, f"{ms['fp32'] / dynamic:.2f}", _ratio([ms["bf16"]], dynamic), _ratio(int8, static)]))
    distances = []
    for network in dict.fromkeys(network for network, *_ in rows):
        first = next(row for key, row in rows.items() if key[0] == network)
        each = ", ".join(f"{name} {r['sqnr_db']:.0f}" for name, r in first.items() if name != "fp32")
        distances.append(f"Signal to noise of the output of {network} against fp32, in dB: {each}.")
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}{_packages(machine, 'onnxruntime')}, {machine['date']}. "
            "Times are minima in milliseconds, from float image to float result. A figure below 1 is a loss.",
            "",
            *lines,
            "",
            *distances,
            *_missing(data),
        ]
    )


def _packages(machine, *names):
    return "".join(f", {name} {machine['packages'][name]}" for name in names if machine["packages"][name])


def _missing(data):
    """A line per contender that was not timed everywhere."""
    lines = []
    for contender, reasons in data["missing"].items():
        for reason in dict.fromkeys(reasons.values()):
            lines.append(f"* Not timed: {contender} on {', '.join(s for s, r in reasons.items() if r == reason)}: {reason}")
    return ["", *lines] if lines else []


def conv2d(data):
    """conv2d.py's tables: minima in microseconds, from float to float and from codes to codes."""
    machine = data["machine"]
    parts = [heading(machine | {"torch": machine["torch"] + _packages(machine, "onnxruntime")})]
    for stem, title, own in (
        ("conv2d", "float32 to float32", "ours dynamic"),
        ("conv2d int8", "int8 to int8", "ours"),
    ):
        rows, ratios = {}, []
        for r in data["results"]:
            if r["stem"] == stem:
                rows.setdefault((r["set"], r["shape"]), {})[r["contender"]] = r
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        head = [f"Conv2d, {title}", *names, "% of limit", "best other", f"best other / {own}"]
        lines = [_line(head), "|---" + "|--:" * (len(head) - 1) + "|"]
        for (group, shape), row in rows.items():
            ours, others = row[own], [r for name, r in row.items() if _is_peer(name)]
            best = min(others, key=lambda r: r["min_us"]) if others else {"contender": ""}
            ratios += [best["min_us"] / ours["min_us"]] if others else []
            limit = f"{ours['percent_of_limit']:.0f}" if "percent_of_limit" in ours else ""
            times = [_time(row[name]["min_us"]) if name in row else "" for name in names]
            ratio = f"{ratios[-1]:.2f}" if others else ""
            lines.append(_line([f"{group} {shape}", *times, limit, best["contender"], ratio]))
        if ratios:
            mean = f"{statistics.geometric_mean(ratios):.2f}; {sum(r < 1 for r in ratios)} of {len(ratios)} below 1."
            lines += ["", f"Geometric mean of the last column: {mean}"]
        parts.append("\n".join(lines))
    parts.append(
        "The limit is the larger of all products at the peak and one pass over input, int8 weight and result at the bandwidth with "
        "which the same process reads as many bytes."
    )
    return "\n".join(["\n\n".join(parts), *_missing(data)])


def operators(data):
    results = data["results"]
    stems = dict.fromkeys(r["stem"] for r in results)
    return "\n\n".join([heading(data["machine"]), *(table(results, stem) for stem in stems)])


def gpu(data):
    """gpu_bench.py's tables: medians in microseconds, ours against the floor of the case and the best other contender."""
    machine, worst = data["machine"], []
    parts = [
        f"{machine['gpu'] or 'rehearsal on the CPU'}, torch {machine['torch']}, {machine['date']}. Times are medians in us. "
        "The floor is the largest of one launch, all bytes once at the measured copy rate, and all operations at the vendor's peak "
        "for int8. A last column below 1 is a loss.",
        "\n".join(["| ceiling | us | rate |", "|---|--:|--:|", *map(_ceiling, data["ceilings"])]),
    ]
    for stem in dict.fromkeys(r["stem"] for r in data["results"]):
        rows = {}
        for r in data["results"]:
            if r["stem"] == stem:
                rows.setdefault((r["set"], r["shape"], r["dtype"]), {})[r["contender"]] = r
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        chosen = ["kernel"] if any(r["kernel"] for row in rows.values() for r in row.values()) else []
        head = [stem, *names, "floor", "ours / floor", "rate", "best other / ours", *chosen]
        lines = [_line(head), "|---" + "|--:" * (len(head) - 1) + "|"]
        for key, row in rows.items():
            label, times = " ".join(key), {name: r["median_us"] for name, r in row.items()}
            own = [us for name, us in times.items() if not _is_peer(name) and "static" not in name]
            others, any_row = [us for name, us in times.items() if _is_peer(name)], next(iter(row.values()))
            cells = [label, *(_time(times[name]) if name in times else "" for name in names), _time(any_row["floor_us"])]
            ours = min(own, default=None)
            if ours:
                worst.append((ours / max(any_row["floor_us"], 1e-9), f"{stem} {label}"))
                rate = f"{any_row['ops'] / ours / 1e6:.0f} TOP/s" if any_row["ops"] else f"{any_row['bytes'] / ours / 1e3:.0f} GB/s"
                cells += [f"{worst[-1][0]:.2f}", rate, _ratio(others, ours)]
            else:
                cells += ["", "", ""]
            lines.append(_line([*cells, *([any_row["kernel"]] if chosen else [])]))
        parts.append("\n".join(lines))
    if worst:
        parts.append(
            "\n".join(["Furthest from the floor:", "", *(f"* {r:.2f} {label}" for r, label in sorted(worst, reverse=True)[:10])])
        )
    parts += [f"Left out: {cut}" for cut in data["cut"]]
    return "\n".join(["\n\n".join(parts), *_missing(data)])


def _ceiling(c):
    rate = f"{c['gb_s']:.0f} GB/s" if "gb_s" in c else f"{c['tera_ops']:.0f} TOP/s" if "tera_ops" in c else ""
    return _line([c["what"], f"{c['us']:.2f}", rate])


def _kind(data):
    return data.get("kind", "operators")


def show(data):
    shown = {"operators": operators, "linear": peers, "model": model, "conv2d": conv2d, "networks": networks, "gpu": gpu}
    return shown[_kind(data)](data)


def readme(data):
    """The README's part. Of the operators: the products, and the tensors of torch_quant_ext's table."""
    if _kind(data) != "operators":
        return show(data)
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
    begin, end = f"<!-- {PLACES[_kind(data)]} -->", f"<!-- end of {PLACES[_kind(data)]} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"expected the lines {begin} and {end} in {README}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{readme(data)}\n{end}{rest.split(end)[1]}"


def text(data):
    """Results as JSON, one line each: readable, and a diff shows what changed."""
    rows = ",\n    ".join(json.dumps(row) for row in data["results"])
    before = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items() if key != "results")
    return f'{{\n{before}  "results": [\n    {rows}\n  ]\n}}\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compact", "show", "readme"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", help="of compact")
    parser.add_argument("--cpu", help="of compact: a better name for the processor")
    options = parser.parse_args()
    data = json.loads(options.source.read_text())
    if options.command == "compact":
        options.target.write_text(text(compact(data, options.cpu)))
    elif options.command == "readme":
        README.write_text(with_tables(README.read_text(), data))
    else:
        print(show(data))


if __name__ == "__main__":
    main()
