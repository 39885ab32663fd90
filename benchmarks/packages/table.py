"""Tables of the scripts that compare with other packages."""

from benchmarks.common import table


def linear(data):
    """Minima in microseconds; our share of the limit and the best other contender are those of ours dynamic."""
    lines, ratios = _layers(data, "linear", "Linear M x N x K", "ours dynamic", "best other / ours")
    return "\n".join(
        [
            table.heading(data["machine"], "torchao", "onnxruntime", "onnx"),
            "",
            lines,
            "",
            f"{table.summary(ratios)} The limit is the larger of all products at the peak and one read of the int8 weight at the "
            "bandwidth measured in the same process for its size.",
            *table.missing(data),
        ]
    )


def weight_only(data):
    """Minima in microseconds. The best other contender is compared with the best of ours."""
    parts = [table.heading(data["machine"], "torchao", "onnxruntime", "onnx")]
    for bits in dict.fromkeys(r["stem"] for r in data["results"]):
        rows = table.grouped(data["results"], "set", "shape", stem=bits)
        names = table.contenders(rows)
        own = [name for name in names if table.is_ours(name)]
        lines, ratios = [], []
        for (group, shape), row in rows.items():
            limits = [f"{row[name]['percent_of_limit']:.0f}" if "percent_of_limit" in row[name] else "" for name in own]
            ours = table.fastest(row[name] for name in own)
            other = table.fastest(r for name, r in row.items() if not table.is_ours(name))
            ratios.append(other["min_us"] / ours["min_us"])
            lines.append([f"{group} {shape}", *table.times(row, names), *limits, other["contender"], f"{ratios[-1]:.2f}"])
        head = [f"{bits}, M x N x K", *names, *(f"{name}: % of limit" for name in own), "best other", "best other / best ours"]
        parts += [table.markdown(head, lines), table.summary(ratios)]
    parts.append(
        "The limit is the larger of all products at the peak (of int8 for A8, of torch's float32 or bfloat16 product for A16) and "
        "one read of the weight at the bandwidth measured in the same process for its size."
    )
    return "\n".join(["\n\n".join(parts), *table.missing(data)])


def conv2d(data):
    """Minima in microseconds, from float to float and from codes to codes."""
    parts = [table.heading(data["machine"], "onnxruntime")]
    for stem, title, own in (("conv2d", "float32 to float32", "ours dynamic"), ("conv2d int8", "int8 to int8", "ours")):
        lines, ratios = _layers(data, stem, f"Conv2d, {title}", own, f"best other / {own}")
        parts += [lines, table.summary(ratios)] if ratios else [lines]
    parts.append(
        "The limit is the larger of all products at the peak and one pass over input, int8 weight and result at the bandwidth with "
        "which the same process reads as many bytes."
    )
    return "\n".join(["\n\n".join(parts), *table.missing(data)])


def _layers(data, stem, title, own, last):
    """(a table with a row per shape, its last column)"""
    rows = table.grouped(data["results"], "set", "shape", stem=stem)
    names, lines, ratios = table.contenders(rows), [], []
    for (group, shape), row in rows.items():
        ours, others = row[own], [r for name, r in row.items() if not table.is_ours(name)]
        best = table.fastest(others) if others else {"contender": ""}
        ratios += [best["min_us"] / ours["min_us"]] if others else []
        limit = f"{ours['percent_of_limit']:.0f}" if "percent_of_limit" in ours else ""
        share = f"{ratios[-1]:.2f}" if others else ""
        lines.append([f"{group} {shape}", *table.times(row, names), limit, best["contender"], share])
    return table.markdown([title, *names, "% of limit", "best other", last], lines), ratios


def networks(data):
    """Minima in milliseconds."""
    rows = table.grouped(data["results"], "stem", "threads", "shape")
    names, lines = table.contenders(rows), []
    head = ["network", "threads", "batch", *names]
    head += ["fp32 / ours dynamic", "bf16 / ours dynamic", "best int8 other / best ours static"]
    for (network, threads, shape), row in rows.items():
        ms = _milliseconds(row)
        dynamic, static = ms["ours dynamic"], min(time for name, time in ms.items() if name.startswith("ours static"))
        int8 = [time for name, time in ms.items() if name.startswith(("torch.ao", "ONNX", "OpenVINO"))]
        cells = [network, str(threads), shape, *(f"{ms[name]:.1f}" if name in ms else "" for name in names)]
        lines.append([*cells, table.ratio([ms["fp32"]], dynamic), table.ratio([ms["bf16"]], dynamic), table.ratio(int8, static)])
    first = {}  # the smallest batch
    for (network, *_), row in rows.items():
        first.setdefault(network, row)
    return "\n".join(
        [
            f"{table.whose(data['machine'], 'onnxruntime')}. "
            "Times are minima in milliseconds, from float image to float result. A figure below 1 is a loss.",
            "",
            table.markdown(head, lines),
            "",
            *(f"Signal to noise of the output of {network} against fp32, in dB: {_sqnr(row)}." for network, row in first.items()),
            *table.missing(data),
        ]
    )


def model(data):
    """One table per model, of minima in milliseconds."""
    parts = [
        f"{table.whose(data['machine'], 'transformers')}. "
        "Times are minima in milliseconds, of the whole encoder. A figure below 1 is a loss."
    ]
    for stem, title in (("bert", []), ("minilm", ["all-MiniLM-L6-v2 with its trained weights, on real sentences:"])):
        rows = table.grouped(data["results"], "threads", "shape", stem=stem)
        if rows:
            parts += [*title, _encoder(rows), _closeness(list(rows.values()))]
    return "\n".join(["\n\n".join(parts), *table.missing(data)])


def _encoder(rows):
    names, lines = table.contenders(rows), []
    head = ["threads", "batch x tokens", *names, "fp32 / best ours", "bf16 / best ours", "best torch.ao / best ours"]
    for (threads, shape), row in rows.items():
        ms = _milliseconds(row)
        ours = min(ms[name] for name in ("ours fused", "ours dynamic") if name in ms)
        others = [[ms[name]] if name in ms else [] for name in ("fp32", "bf16")]
        others.append([time for name, time in ms.items() if name.startswith("torch.ao")])
        times = [f"{ms[name]:.1f}" if name in ms else "" for name in names]
        lines.append([str(threads), shape, *times, *(table.ratio(other, ours) for other in others)])
    return table.markdown(head, lines, text_columns=0)


def _closeness(rows):
    if any("least_cosine" in r for r in rows[-1].values()):
        cosines = ", ".join(f"{name} {r['least_cosine']:.4f}" for name, r in rows[-1].items() if name != "fp32")
        return f"Least cosine similarity of an embedding with that of fp32: {cosines}."
    return f"Signal to noise of the last hidden state against fp32, in dB: {_sqnr(rows[0])}."


def generation(data):
    """A row per contender: bytes, tokens a second of prompts and of what follows them, milliseconds of the Linear layers."""
    rows = table.grouped(data["results"], "threads", "stem", "shape")
    head, cells = ["", "MB", "dB"], {name: [] for name in table.contenders(rows)}
    for (threads, stem, shape), row in rows.items():
        length = shape.split("+")[0]
        title = {"prompt": f"prompt of {length}", "decode": f"after {length}", "layers": "Linear layers, ms"}[stem]
        head.append(f"{title}, {threads} thread(s)")
        for name, line in cells.items():
            if name not in row:
                line.append("")
            elif stem == "layers":
                line.append(f"{row[name]['min_us'] / 1e3:.2f}")
            else:
                line.append(f"{1e6 * row[name]['tokens'] / row[name]['min_us']:.1f}")
    decoded = next(row for (_, stem, _), row in rows.items() if stem == "decode")
    lines = [
        [name, f"{decoded[name]['bytes'] / 1e6:.0f}", f"{decoded[name]['sqnr_db']:.0f}", *line]
        for name, line in cells.items()
        if name in decoded
    ]
    return "\n".join(
        [
            f"{table.whose(data['machine'], 'transformers', 'torchao', 'llama_cpp_python')}. Tokens a second, at their best: of a "
            "prompt, and one by one after it. MB are those of the weights, dB is the signal to noise of the logits against fp32.",
            "",
            table.markdown(head, lines),
            *table.missing(data),
        ]
    )


def accuracy(data):
    """A row per contender: how close embeddings are to those of float32."""
    head = ["", "MB", "mean cosine", "least cosine", "same neighbour", "seconds"]
    lines = [
        [
            r["contender"],
            f"{r['bytes'] / 1e6:.0f}",
            f"{r['cosine']:.4f}",
            f"{r['least_cosine']:.4f}",
            f"{r['neighbours']:.1%}",
            f"{r['seconds']:.0f}",
        ]
        for r in data["results"]
    ]
    return "\n".join(
        [
            f"{table.whose(data['machine'], 'transformers')}; {data['results'][0]['shape']}. MB are those of the whole encoder, of "
            "which the embeddings stay float; seconds are those of the quantization.",
            "",
            table.markdown(head, lines),
        ]
    )


def _milliseconds(row):
    return {name: r["min_us"] / 1e3 for name, r in row.items()}


def _sqnr(row):
    return ", ".join(f"{name} {r['sqnr_db']:.0f}" for name, r in row.items() if name != "fp32")
