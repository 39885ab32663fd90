"""Results as JSON: one line each, so that a diff shows what changed; and what of pytest-benchmark's JSON is kept."""

import json

_MACHINE = ("cpu", "isa", "threads", "torch", "quant_ops")
_FIGURES = ("gops", "percent_of_peak", "gbs")


def as_text(data):
    rows = ",\n    ".join(json.dumps(row) for row in data["results"])
    before = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in data.items() if key != "results")
    return f'{{\n{before}  "results": [\n    {rows}\n  ]\n}}\n'


def compact(raw, cpu=None):
    """The machine and the kernels once, and per timing: stem, shape, contender, times in microseconds, GOP/s or GB/s."""
    infos = [b["extra_info"] for b in raw["benchmarks"]]
    machine = {key: infos[0][key] for key in _MACHINE} | {"date": raw["datetime"][:10]}
    machine["peak_gops"] = rounded(infos[0]["peak_gops"])
    machine["kernels"] = {info["stem"]: info["kernel"] for info in infos}
    if cpu:
        machine["cpu"] = cpu
    results = []
    for info, stats in zip(infos, (b["stats"] for b in raw["benchmarks"]), strict=True):
        row = {key: info[key] for key in ("stem", "set", "shape", "contender")}
        row |= {"min_us": rounded(stats["min"] * 1e6), "median_us": rounded(stats["median"] * 1e6), "rounds": stats["rounds"]}
        results.append(row | {key: rounded(info[key]) for key in _FIGURES if key in info})
    return {"machine": machine, "results": results}


def rounded(value, digits=4):
    return value if value is None else float(f"{value:.{digits}g}")
