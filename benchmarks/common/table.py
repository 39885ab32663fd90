"""The parts that all tables of results are made of."""

import statistics

MOST_LISTED = 8  # cases of one reason that are named one by one


def is_ours(name):
    return name.startswith("ours")


def grouped(results, *keys, stem=None):
    """From each combination of the keys' values to its rows by contender; only those of `stem`, if it is given."""
    rows = {}
    for r in results:
        if stem in (None, r["stem"]):
            rows.setdefault(tuple(r[key] for key in keys), {})[r["contender"]] = r
    return rows


def contenders(rows):
    """The names of all columns, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def markdown(head, rows, text_columns=1):
    """Lines of a table; numbers are set to the right."""
    rule = "|" + "---|" * text_columns + "--:|" * (len(head) - text_columns)
    return "\n".join([line(head), rule, *map(line, rows)])


def line(cells):
    return "| " + " | ".join(cells) + " |"


def time(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(row, names, key="min_us"):
    return [time(row[name][key]) if name in row else "" for name in names]


def fastest(rows):
    return min(rows, key=lambda r: r["min_us"])


def ratio(others, ours):
    return f"{min(others) / ours:.2f}" if others else ""


def heading(machine, *packages):
    """Whose times these are, for tables in microseconds."""
    peak = f"; int8 peak {machine['peak_gops']:.0f} GOP/s, measured in the same process" if machine["peak_gops"] else ""
    described = whose(machine, *packages, threads=f", {machine['threads']} thread(s)")
    return f"{described}{peak}. Times are minima in microseconds. A last column below 1 is a loss."


def whose(machine, *packages, threads=""):
    """Processor, instruction set, the versions of torch and of those packages that are installed, and the date."""
    versions = "".join(f", {name} {machine['packages'][name]}" for name in packages if machine["packages"][name])
    return f"{machine['cpu']}, {machine['isa']}{threads}, torch {machine['torch']}{versions}, {machine['date']}"


def summary(ratios):
    below = f"{sum(r < 1 for r in ratios)} of {len(ratios)} below 1."
    return f"Geometric mean of the last column: {statistics.geometric_mean(ratios):.2f}; {below}"


def missing(data):
    """A line for each contender that was not timed everywhere, preceded by an empty line; or nothing."""
    lines = []
    for contender, reasons in data["missing"].items():
        for reason in dict.fromkeys(reasons.values()):
            cases = [case for case, why in reasons.items() if why == reason]
            listed = ", ".join(cases) if len(cases) <= MOST_LISTED else f"{len(cases)} cases"
            lines.append(f"* Not timed: {contender} on {listed}: {reason}")
    return ["", *lines] if lines else []
