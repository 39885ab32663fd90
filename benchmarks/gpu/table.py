"""Tables of bench.py: medians in microseconds, ours against the floor of the case and against the best other contender."""

from benchmarks.common import table

FURTHEST = 10


def gpu(data):
    machine, furthest = data["machine"], []
    parts = [
        f"{machine['gpu'] or 'rehearsal on the CPU'}, torch {machine['torch']}, {machine['date']}. Times are medians in us. "
        "The floor is the largest of one launch, all bytes once at the measured copy rate, and all operations at the vendor's peak "
        "for int8. A last column below 1 is a loss.",
        table.markdown(["ceiling", "us", "rate"], map(_ceiling, data["ceilings"])),
    ]
    if "note" in data:
        parts.insert(1, f"Note: {data['note']}.")
    for stem in dict.fromkeys(r["stem"] for r in data["results"]):
        lines, distances = _stem(data["results"], stem)
        parts.append(lines)
        furthest += distances
    if data.get("models"):
        parts.append(_models(data["models"]))
    if furthest:
        worst = sorted(furthest, reverse=True)[:FURTHEST]
        parts.append("\n".join(["Furthest from the floor:", "", *(f"* {r:.2f} {label}" for r, label in worst)]))
    parts += [f"Left out: {cut}" for cut in data["cut"]]
    return "\n".join(["\n\n".join(parts), *table.missing(data)])


def _stem(results, stem):
    """(a table with a row per case, the distance of each from its floor)"""
    rows = table.grouped(results, "set", "shape", "dtype", stem=stem)
    names, lines, distances = table.contenders(rows), [], []
    chosen = ["kernel"] if any(r["kernel"] for row in rows.values() for r in row.values()) else []
    head = [stem, *names, "floor", "ours / floor", "rate", "best other / ours", *chosen]
    for key, row in rows.items():
        label, case = " ".join(key), next(iter(row.values()))
        cells = [label, *table.times(row, names, "median_us"), table.time(case["floor_us"])]
        ours = min((r["median_us"] for name, r in row.items() if table.is_ours(name) and "static" not in name), default=None)
        others = [r["median_us"] for name, r in row.items() if not table.is_ours(name)]
        if ours:
            distances.append((ours / max(case["floor_us"], 1e-9), f"{stem} {label}"))
            cells += [f"{distances[-1][0]:.2f}", _rate(case, ours), table.ratio(others, ours)]
        else:
            cells += ["", "", ""]
        lines.append([*cells, *([case["kernel"]] if chosen else [])])
    return table.markdown(head, lines), distances


def _models(rows):
    """Milliseconds of whole models, eager and by the replay of a graph, beside the bfloat16 model's."""
    base = {(r["model"], r["input"]): r for r in rows if r["contender"] == "bf16"}
    head = ["model", "input", "kind", "eager, ms", "graph, ms", "bf16 / this, eager", "bf16 / this, graph", "SQNR, dB"]
    lines = []
    for r in rows:
        ratios = [f"{base[r['model'], r['input']][f'{how}_ms'] / r[f'{how}_ms']:.2f}" for how in ("eager", "graph")]
        sqnr = "" if r["contender"] == "bf16" else f"{r['sqnr']:.1f}"
        lines.append([r["model"], r["input"], r["contender"], f"{r['eager_ms']:.2f}", f"{r['graph_ms']:.2f}", *ratios, sqnr])
    return table.markdown(head, lines)


def _rate(case, us):
    return f"{case['ops'] / us / 1e6:.0f} TOP/s" if case["ops"] else f"{case['bytes'] / us / 1e3:.0f} GB/s"


def _ceiling(c):
    rate = f"{c['gb_s']:.0f} GB/s" if "gb_s" in c else f"{c['tera_ops']:.0f} TOP/s" if "tera_ops" in c else ""
    return [c["what"], f"{c['us']:.2f}", rate]
