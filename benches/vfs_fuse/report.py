"""Turns samples into the tables of benches/README.md."""

import statistics

from .rows import OVERLAY


def spread(values, show):
    low, high, middle = min(values), max(values), statistics.median(values)
    return show(middle) if show(low) == show(high) else f"{show(middle)} ({show(low)}–{show(high)})"


def number(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def seconds(value):
    if value == 0:
        return "0"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{number(value * factor)} {unit}"


def size(value):
    for factor, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 1 << factor:
            return f"{number(value / (1 << factor))} {unit}"
    return f"{value} B"


def compared(samples, side, base):
    """Ratios of the two within the rounds that both have; none if one of them is not there or failed."""
    ours, theirs = (samples.get(name, {"failed": ""}) for name in (side, base))
    if "failed" in ours or "failed" in theirs:
        return []
    return [ours[turn]["seconds"] / theirs[turn]["seconds"] for turn in sorted(set(ours) & set(theirs))]


def cell(samples, side, base):
    if "failed" in samples.get(side, {}):
        return "failed"
    values = compared(samples, side, base)
    return spread(values, number) if values else "–"


def fastest(samples, peers):
    done = [peer for peer in peers if peer in samples and "failed" not in samples[peer]]
    middle = lambda peer: statistics.median(sample["seconds"] for sample in samples[peer].values())
    return min(done, key=middle, default=None)


def line(*cells):
    return f"| {' | '.join(cells)} |"


def head(*cells):
    return [line(*cells), line(*["---"] * len(cells))]


def times(rows, results, sides, peers, own):
    others = [side for side in sides if side != "native"]
    versus = [f"{own} ÷ fastest fuse-overlayfs", f"{own} ÷ overlay"] if own in sides else []
    lines = head("row", "native", *others, *versus, "wanted")
    for row in rows:
        samples = results[row.name]
        native = samples.get("native", {})
        taken = [sample["seconds"] for sample in native.values()] if native and "failed" not in native else []
        cells = [row.name, spread(taken, seconds) if taken else "–"]
        cells += [cell(samples, side, "native") for side in others]
        if versus:
            cells += [cell(samples, own, fastest(samples, peers)), cell(samples, own, "overlay")]
        lines.append(line(*cells, row.wanted))
    return lines


def extras(rows, results, sides, key, show):
    """A table of something else that was taken with the rows: only rows and sides that have it."""
    found = {}
    for row in rows:
        done = {side: taken for side, taken in results[row.name].items() if "failed" not in taken}
        found[row.name] = {
            side: [sample[key] for sample in taken.values() if key in sample] for side, taken in done.items()
        }
    having = [side for side in sides if any(values.get(side) for values in found.values())]
    lines = head("row", *having)
    for name, values in found.items():
        if any(values.values()):
            lines.append(line(name, *[spread(values[side], show) if values.get(side) else "–" for side in having]))
    return lines if having else []


def misses(rows, results, peers, own):
    """Where the issue's bounds are not kept, by the medians."""
    found = []
    for row in rows:
        samples = results[row.name]
        peer = fastest(samples, peers)
        bounds = [(peer, 0.5 if row.metadata else 1.0)]
        if row.wanted == OVERLAY:
            bounds.append(("overlay", 1.1))
        elif row.wanted.replace(".", "").isdigit():
            bounds.append(("native", float(row.wanted)))
        for base, bound in bounds:
            values = compared(samples, own, base)
            if values and statistics.median(values) > bound:
                found.append(f"* `{row.name}`: {number(statistics.median(values))} of {base}, wanted at most {bound}")
    return found


def whole(facts, rows, results, sides, peers, own):
    """All of it as markdown."""
    parts = [[f"{name}: {value}" for name, value in facts.items()]]
    parts[0] = [f"* {entry}" for entry in parts[0]]
    parts.append(["Multiples of native, median (minimum–maximum) of the ratios within each round; below 1 is faster.",
                  "Native is absolute: the whole work, or one operation where the row says \"each\" or moves data."])
    parts.append(times(rows, results, sides, peers, own))
    for title, key, show in (("CPU time of the daemon, in the unit of the row", "cpu", seconds),
                             ("Time of the rows whose writing was counted", "time", seconds),
                             ("Bytes written to the device, a sync included", "device", size),
                             ("Private anonymous memory of the daemon after the walk", "anonymous", size),
                             ("Growth of it for each inode walked, bytes", "per_inode", number),
                             ("Growth of its Pss for each inode walked, bytes", "pss_per_inode", number)):
        table = extras(rows, results, sides, key, show)
        if table:
            parts += [[f"{title}:"], table]
    parts.append([f"* `{row.name}` ({row.state}): {row.what}" for row in rows])
    missed = misses(rows, results, peers, own)
    if missed:
        parts.append([f"{own} misses what is wanted:", "", *missed])
    failures = [f"* **failed** {name}, {side}: {samples['failed']}"
                for name, per_side in results.items() for side, samples in per_side.items() if "failed" in samples]
    return "\n\n".join("\n".join(part) for part in [*parts, failures] if part) + "\n"
