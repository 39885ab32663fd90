"""Tables of the operators' results: a row per shape, a column per contender."""

from benchmarks.common import table

# The tables that documents show: the products, and the tensors of torch_quant_ext's table.
SHOWN = {
    "int8_linear": "`int8_linear` M x N x K",
    "int8_gemm": "`int8_gemm` M x N x K, weight not packed",
    "int8_conv2d": "`int8_conv2d` NxCxHxW_O_kernel_padding",
    "quant_tensor_forward": "`quant_tensor_forward`",
}


def show(data):
    """Every operator and shape."""
    stems = dict.fromkeys(r["stem"] for r in data["results"])
    return "\n\n".join([table.heading(data["machine"]), *(_table(data["results"], stem, stem) for stem in stems)])


def document(data):
    results = [r for r in data["results"] if r["set"] != "tiny"]
    return "\n\n".join([table.heading(data["machine"]), *(_table(results, stem, title) for stem, title in SHOWN.items())])


def _table(results, stem, title):
    """Minima in microseconds, our share of the peak, and the time of the fastest other contender over ours. Ours is the fastest
    that needs no calibration: static contenders do not count."""
    rows = table.grouped(results, "set", "shape", stem=stem)
    names = table.contenders(rows)
    has_peak = any("percent_of_peak" in r for row in rows.values() for r in row.values())
    head, lines = [title, *names, *(["% of peak"] if has_peak else []), "best other / ours"], []
    for (group, shape), row in rows.items():
        ours = table.fastest(r for name, r in row.items() if table.is_ours(name) and "static" not in name)
        other = table.fastest(r for name, r in row.items() if not table.is_ours(name))
        peak = [f"{ours['percent_of_peak']:.0f}"] if has_peak else []
        lines.append([f"{group} {shape}", *table.times(row, names), *peak, f"{other['min_us'] / ours['min_us']:.2f}"])
    return table.markdown(head, lines)
