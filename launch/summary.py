#!/usr/bin/env python3
"""A run's result.json as a table: LoadGen's verdict, speed, latencies, ROUGE, and where the files are."""

import argparse
import json
import pathlib
import sys

KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def number(value, unit="", digits=1):
    return "not measured" if value is None else f"{value:,.{digits}f}{unit}"


def latency(figures):
    figures = figures or {}
    return f"p50 {number(figures.get('p50'), ' ms')}, p99 {number(figures.get('p99'), ' ms')}"


def head_lines(result):
    passes = result.get("passes", {})
    speed = passes.get("performance", result)
    scenario = result.get("scenario", "?")
    rows = [("LoadGen's verdict", result.get("verdict", "none"))]
    rows += [("", reason) for reason in result.get("reasons", [])]
    if "accuracy" in passes:
        rows.append(("accuracy run", passes["accuracy"].get("verdict", "none")))
    if resumed := passes.get("accuracy", {}).get("resumed"):
        rows.append(("", f"resumed: {resumed['samples_taken_over']:,} samples from {resumed['from']}, "
                         f"{resumed['samples_run']:,} run here"))
    if go_on := result.get("go_on"):
        rows.append(("to go on", go_on))
    rows += [
        ("scenario, grid", f"{scenario}, {result.get('grid', '?')}"),
        ("numbers", f"activations {result.get('activations', '?')}, KV {result.get('kv', '?')}, "
                    f"backend {result.get('backend', '?')}"),
        ("samples", f"{speed.get('samples', 0):,} ({speed.get('output_tokens', 0):,} output tokens "
                    f"in {number(speed.get('duration_s'), ' s')})"),
        ("output tokens/s", number(speed.get("output_tokens_per_second"))),
        ("time to first token", latency(speed.get("ttft_ms"))),
        ("time per output token", latency(speed.get("tpot_ms"))),
    ]
    if energy := speed.get("energy"):
        each = energy.get("joules_per_output_token")
        rows.insert(-2, ("energy", f"{number(energy['joules'], ' J')}, {number(energy['mean_watts'], ' W')}"
                         + (f", {number(each, ' J', 3)} an output token" if each else "")))
    if scenario.lower() == "offline":
        rows.append(("", "(latencies are drover's own: Offline has no limit on them)"))
    if "unverified" in result:
        rows.append(("", f"unverified: {result['unverified']}"))
    return rows


def rouge_lines(rouge, reference):
    limits = rouge.get("limits", {})
    lines = [f"  {'':10}{'this run':>12}{'unquantized':>14}{'99 % limit':>13}{'99.9 % limit':>14}"]
    for kind, name in KINDS.items():
        cells = [rouge.get(kind), (reference or limits.get("reference", {})).get(kind),
                 limits.get("99", {}).get(kind), limits.get("99.9", {}).get(kind)]
        widths = (12, 14, 13, 14)
        lines.append(f"  {name:10}" + "".join(
            f"{'-' if cell is None else format(cell, '.4f'):>{width}}"
            for cell, width in zip(cells, widths)))
    if passes := rouge.get("passes"):
        lines.append("  " + ", ".join(f"{share} % limit {'met' if met else 'NOT met'}"
                                      for share, met in passes.items()) +
                     f"; {number(rouge.get('tokens_per_sample'), digits=2)} tokens a sample")
    return lines


def file_lines(folder):
    wanted = ["result.json", "environment.json", "performance/run_1/mlperf_log_summary.txt",
              "performance/run_1/mlperf_log_detail.txt", "accuracy/mlperf_log_accuracy.json", "logs"]
    return [f"  {folder / name}" for name in wanted if (folder / name).exists()]


def read(folder):
    try:
        return json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        print(f"summary.py: {folder / 'result.json'} cannot be read: {error}", file=sys.stderr)
        sys.exit(3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="what --out of drover run named")
    parser.add_argument("--reference", type=pathlib.Path, help="the folder of the unquantized run")
    args = parser.parse_args()
    result = read(args.folder)
    reference = read(args.reference).get("rouge") if args.reference else None
    rows = head_lines(result)
    width = max(len(name) for name, _ in rows) + 2
    print("\n".join(f"  {name:{width}}{value}" for name, value in rows))
    if rouge := result.get("rouge"):
        print("\n" + "\n".join(rouge_lines(rouge, reference)))
    print("\n" + "\n".join(file_lines(args.folder)))


if __name__ == "__main__":
    main()
