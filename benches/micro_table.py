#!/usr/bin/env python3
"""Prints what `cargo bench --bench micro` has left in the target directory as a table in Markdown, for benches/README.md.

Medians, with criterion's 95% confidence interval of the median; and what that is for each element or byte.
"""
import json
import os
import pathlib
import subprocess
import sys


def target_directory():
    root = pathlib.Path(__file__).resolve().parent.parent
    out = subprocess.run(["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=root, check=True,
                         stdout=subprocess.PIPE).stdout
    return pathlib.Path(json.loads(out)["target_directory"])


def scaled(value, step, units):
    for unit in units:
        if value < step or unit == units[-1]:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
        value /= step


def time(nanoseconds):
    return scaled(nanoseconds, 1000, ["ns", "µs", "ms", "s"])


def rate(throughput, nanoseconds):
    """Per second where bytes go through, per element where there are several."""
    if amount := (throughput or {}).get("Bytes"):
        return scaled(amount / nanoseconds * 1e9, 1024, ["B", "KiB", "MiB", "GiB"]) + "/s"
    if amount := (throughput or {}).get("Elements"):
        return time(nanoseconds / amount) + " each"
    return ""


def main():
    results = target_directory() / "criterion"
    found = sorted(results.glob("**/new/benchmark.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"micro_table.py: nothing measured in {results}; run cargo bench --bench micro first")
    print("| group | case | median (95% confidence) | rate |\n| --- | --- | --- | --- |")
    for path in found:
        case = json.loads(path.read_text())
        median = json.loads((path.parent / "estimates.json").read_text())["median"]
        interval, value = median["confidence_interval"], median["point_estimate"]
        low, high = time(interval["lower_bound"]), time(interval["upper_bound"])
        name = case["function_id"] or case["value_str"] or ""
        print(f"| {case['group_id']} | {name} | {time(value)} ({low}–{high}) | {rate(case['throughput'], value)} |")
    load = os.getloadavg()[0]
    print(f"micro_table.py: {len(found)} cases; the load is {load:.1f} on {os.cpu_count()} processors", file=sys.stderr)


if __name__ == "__main__":
    main()
