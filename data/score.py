#!/usr/bin/env python3
"""ROUGE of an accuracy run, as MLPerf computes it, from mlperf_log_accuracy.json."""

import argparse
import json

from drover_data import scoring
from drover_data.cli import DataError, read_json, run, write_text_atomically
from drover_data.dataset_file import Dataset
from drover_data.tokens import StoredTokenizer


def reference_limits(path):
    """Limits from another run's result.json or score.json."""
    found = read_json(path).get("rouge")
    if not isinstance(found, dict) or any(kind not in found for kind in scoring.KINDS):
        raise DataError(f"{path} has no rouge figures; score that run first")
    return scoring.limits_of({kind: float(found[kind]) for kind in scoring.KINDS}, path)


def score(args, samples):
    dataset = Dataset(args.dataset)
    samples = samples or len(dataset)
    if samples > len(dataset):
        raise DataError(f"{args.dataset} has {len(dataset)} samples, not {samples}")
    if not any(dataset.references):
        raise DataError(f"{args.dataset} has no reference answers, so there is nothing to score")
    table = StoredTokenizer.read(args.dataset).table
    log = scoring.read_log(args.log)
    scoring.check_complete(log, args.log, samples)
    scores = scoring.rouge_of(log, dataset.references, table)
    tokens = sum(len(ids) for ids in log.values())
    out = {"rouge": scoring.means(scores), "samples": samples, "output_tokens": tokens,
           "tokens_per_sample": round(tokens / samples, 4), "dataset": dataset.name}
    limits = None
    if args.limits:
        known = scoring.LIMITS[args.limits]
        limits = scoring.limits_of(known["rouge"], args.limits, known["tokens_per_sample"])
    elif args.reference:
        limits = reference_limits(args.reference)
    if limits:
        passes = scoring.judge(out["rouge"], out["tokens_per_sample"], limits)
        out |= {"limits": limits, "passes": passes}
    if args.compare:
        other = scoring.read_log(args.compare)
        scoring.check_complete(other, args.compare, samples)
        theirs = scoring.rouge_of(other, dataset.references, table)
        out["compare"] = {"log": args.compare, "rouge": scoring.means(theirs),
                          "ratio": scoring.bootstrap_ratio(scores, theirs)}
    return out


def table_of(found):
    columns = [("", *scoring.KINDS), ("this run", *found["rouge"].values())]
    if limits := found.get("limits"):
        columns += [("reference", *limits["reference"].values()),
                    ("99 % limit", *limits["99"].values()),
                    ("99.9 % limit", *limits["99.9"].values())]
    if compare := found.get("compare"):
        ratios = [f"{r['ratio']:.4f} [{r['low']:.4f}, {r['high']:.4f}]"
                  for r in compare["ratio"].values()]
        columns += [("compared", *compare["rouge"].values()), ("ratio, 95 %", *ratios)]
    lines = []
    for row in zip(*columns):
        cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row]
        lines.append(f"{cells[0]:8}" + "".join(f"{cell:>14}" if len(cell) < 14 else f"  {cell:>24}"
                                               for cell in cells[1:]))
    lines.append(f"{found['samples']} samples, {found['tokens_per_sample']} tokens a sample")
    if passes := found.get("passes"):
        lines.append("limits: " + ", ".join(f"{share} % {'met' if met else 'NOT met'}"
                                            for share, met in passes.items()))
    return "\n".join(lines)


def merge_into(path, found):
    """Adds `rouge` (figures, tokens a sample, limits, verdicts) to a result.json."""
    result = read_json(path)
    if not isinstance(result, dict):
        raise DataError(f"{path} is not a result.json")
    extra = {key: found[key] for key in ("samples", "tokens_per_sample", "limits", "passes")
             if key in found}
    result["rouge"] = found["rouge"] | extra
    write_text_atomically(path, json.dumps(result, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", help="mlperf_log_accuracy.json")
    parser.add_argument("--dataset", required=True, help="the dataset of the run")
    parser.add_argument("--samples", type=int, default=0, help="the run took the first N samples "
                        "of the dataset (default: all)")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--limits", choices=sorted(scoring.LIMITS), help="a benchmark's limits")
    limits.add_argument("--reference", help="limits from the rouge of this result.json or "
                        "score.json")
    parser.add_argument("--compare", help="another accuracy log of the same samples")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--result", help="add `rouge` to this result.json")
    args = parser.parse_args()
    found = score(args, args.samples)
    if args.out:
        write_text_atomically(args.out, json.dumps(found, indent=2) + "\n")
    if args.result:
        merge_into(args.result, found)
    print(table_of(found))


if __name__ == "__main__":
    run(main)
