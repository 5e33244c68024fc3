#!/usr/bin/env python3
"""What a trace of `drover --trace FILE` says: how busy each rank's GPU was, what stood around its
longest gaps, and where the time of a step went.

All of it is of the steady part: from the first decode step's begin to the last one's end. Rows of the
trace are told apart by their category: "step" (whole steps on the device), "kernel", "copy", "host".
"""

import argparse
import bisect
import collections
import json
import re
import sys

# The first that fits; the rest is "other".
CLASSES = [
    ("comm", r"nccl|peer_norm|all_?reduce|all_?gather|reduce_?scatter|send_|recv_|exchange|barrier|signal"),
    ("attention", r"attention|decode_kernel|prefill_kernel|rope"),
    ("norm", r"norm|add_kernel"),
    ("linear", r"linear|gemm|cublas|cutlass|nvjet|splitk|widen_e4m3"),
]
NAMES = [name for name, _ in CLASSES] + ["other"]


def class_of(kernel):
    for name, pattern in CLASSES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


class Rank:
    def __init__(self):
        self.name = ""
        self.rows = {}  # thread id -> name
        self.spans = collections.defaultdict(list)  # category -> spans by their begin
        self.dropped = 0


def read(file):
    """Rank -> Rank. Spans are dicts with begin and end in microseconds."""
    with open(file, encoding="utf-8") as f:
        events = json.load(f)["traceEvents"]
    ranks = collections.defaultdict(Rank)
    for e in events:
        rank = ranks[e["pid"]]
        if e["ph"] == "M" and e["name"] == "process_name":
            rank.name = e["args"]["name"]
        elif e["ph"] == "M" and e["name"] == "thread_name":
            rank.rows[e["tid"]] = e["args"]["name"]
        elif e["ph"] == "i" and e["name"] == "dropped":
            rank.dropped += e["args"]["events"]
        elif e["ph"] == "X":
            rank.spans[e["cat"]].append({"name": e["name"], "begin": e["ts"],
                                         "end": e["ts"] + e["dur"], "row": e["tid"],
                                         "args": e.get("args", {})})
    for rank in ranks.values():
        for spans in rank.spans.values():
            spans.sort(key=lambda s: s["begin"])
    return dict(sorted(ranks.items()))


def union(spans):
    """Busy intervals [begin, end, name of the first span, name of the last to end]."""
    out = []
    for s in spans:
        if out and s["begin"] <= out[-1][1]:
            if s["end"] > out[-1][1]:
                out[-1][1], out[-1][3] = s["end"], s["name"]
        else:
            out.append([s["begin"], s["end"], s["name"], s["name"]])
    return out


def clip(spans, begin, end):
    return [{**s, "begin": max(s["begin"], begin), "end": min(s["end"], end)}
            for s in spans if s["end"] > begin and s["begin"] < end]


def apart(kernels):
    """What each kernel adds to its stream: a kernel may be launched under the one before it, and waits
    in there for its end (programmatic dependent launch)."""
    ends = {}
    for k in sorted(kernels, key=lambda k: k["begin"]):
        last = ends.get(k["row"], k["begin"])
        ends[k["row"]] = max(last, k["end"])
        yield {**k, "begin": min(max(k["begin"], last), k["end"])}


def host_at(rank, at):
    """What the host's threads were in, the innermost span of each."""
    inner = {}
    for s in rank.spans["host"]:
        if s["begin"] > at:
            break
        if s["end"] > at:
            inner[s["row"]] = s["name"]
    return ", ".join(f"{rank.rows.get(row, row)}: {name}" for row, name in sorted(inner.items()))


def steady(rank):
    """(begin, end, steps): from the first decode step to the last. Without any: all there is."""
    steps = rank.spans["step"]
    decode = [s for s in steps if s["name"].startswith("decode")]
    if decode:
        begin, end = decode[0]["begin"], max(s["end"] for s in decode)
        return begin, end, [s for s in steps if s["begin"] >= begin and s["end"] <= end]
    device = rank.spans["kernel"] + rank.spans["copy"] + steps
    if not device:
        return 0, 0, []
    return min(s["begin"] for s in device), max(s["end"] for s in device), steps


def gaps_of(rank, busy, begin, end, most):
    gaps = []
    for (_, last, _, before), (first, _, after, _) in zip(busy, busy[1:]):
        gaps.append({"us": first - last, "at_us": last - begin, "after": before, "before": after,
                     "host": host_at(rank, (first + last) / 2)})
    if busy:
        gaps.append({"us": busy[0][0] - begin, "at_us": 0, "after": "(steady part begins)",
                     "before": busy[0][2], "host": ""})
        gaps.append({"us": end - busy[-1][1], "at_us": busy[-1][1] - begin, "after": busy[-1][3],
                     "before": "(steady part ends)", "host": ""})
    return sorted((g for g in gaps if g["us"] > 0), key=lambda g: -g["us"])[:most]


def steps_of(steps, kernels):
    """Kind of step -> count, mean length and mean time by class of kernels, microseconds. A kernel
    belongs to the step that its middle lies in."""
    begins = [s["begin"] for s in steps]
    kinds = {}
    for s in steps:
        kind = kinds.setdefault(s["name"], {"steps": 0, "us": 0.0, "classes": dict.fromkeys(NAMES, 0.0)})
        kind["steps"] += 1
        kind["us"] += s["end"] - s["begin"]
    for k in kernels:
        middle = (k["begin"] + k["end"]) / 2
        i = bisect.bisect_right(begins, middle) - 1
        if i >= 0 and middle < steps[i]["end"]:
            kinds[steps[i]["name"]]["classes"][class_of(k["name"])] += k["end"] - k["begin"]
    for kind in kinds.values():
        kind["us"] /= kind["steps"]
        kind["classes"] = {c: t / kind["steps"] for c, t in kind["classes"].items()}
        kind["no_kernel_us"] = max(kind["us"] - sum(kind["classes"].values()), 0.0)
    return kinds


def report(rank, most_gaps):
    begin, end, steps = steady(rank)
    kernels = list(apart(clip(rank.spans["kernel"], begin, end)))
    device = clip(rank.spans["kernel"], begin, end) + clip(rank.spans["copy"], begin, end)
    # Without CUPTI whole steps are all that is known of the device.
    source = "kernels and copies" if device else "steps"
    device = sorted(device or clip(rank.spans["step"], begin, end), key=lambda s: s["begin"])
    busy = union(device)
    busy_us = sum(b - a for a, b, _, _ in busy)
    table = {}
    for k in kernels:
        row = table.setdefault(k["name"], {"count": 0, "us": 0.0, "class": class_of(k["name"])})
        row["count"] += 1
        row["us"] += k["end"] - k["begin"]
    return {
        "name": rank.name,
        "dropped_events": rank.dropped,
        "steady_us": end - begin,
        "busy_of": source,
        "busy_share": busy_us / (end - begin) if end > begin else 0.0,
        "gaps": gaps_of(rank, busy, begin, end, most_gaps),
        "kernels": dict(sorted(table.items(), key=lambda kv: -kv[1]["us"])),
        "steps": steps_of(steps, kernels),
    }


def show(r):
    print(f"{r['name']}: steady part {r['steady_us'] / 1e3:.3f} ms, GPU busy "
          f"{r['busy_share']:.2%}, idle {1 - r['busy_share']:.2%} ({r['busy_of']})")
    if r["dropped_events"]:
        print(f"  THE TRACE WAS FULL: {r['dropped_events']} later events are not in it")
    for name, s in r["steps"].items():
        split = "  ".join(f"{c} {s['classes'][c]:.1f}" for c in NAMES)
        print(f"  {s['steps']} x {name}: {s['us']:.1f} us each = {split}  "
              f"no kernel {s['no_kernel_us']:.1f}")
    if r["gaps"]:
        print("  longest gaps, us:")
    for g in r["gaps"]:
        host = f"  [{g['host']}]" if g["host"] else ""
        print(f"    {g['us']:10.1f}  at {g['at_us'] / 1e3:.3f} ms: "
              f"{g['after'][:60]} .. {g['before'][:60]}{host}")
    if r["kernels"]:
        print(f"  {'ms':>12} {'share':>7} {'calls':>8} {'us each':>9}  kernel")
    total = sum(k["us"] for k in r["kernels"].values())
    for name, k in r["kernels"].items():
        print(f"  {k['us'] / 1e3:12.3f} {k['us'] / total:7.1%} {k['count']:8} "
              f"{k['us'] / k['count']:9.2f}  {name[:90]} ({k['class']})")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", help="the file that `--trace` wrote")
    parser.add_argument("--gaps", type=int, default=10, help="so many of the longest (10)")
    parser.add_argument("--rank", type=int, help="only this one")
    parser.add_argument("--json", action="store_true", help="as JSON, {rank: report}")
    options = parser.parse_args()
    try:
        ranks = read(options.trace)
    except (OSError, ValueError, KeyError, TypeError) as e:
        print(f"{options.trace}: not a trace that drover wrote: {e}", file=sys.stderr)
        return 3
    reports = {n: report(r, options.gaps) for n, r in ranks.items()
               if options.rank is None or n == options.rank}
    if options.json:
        json.dump(reports, sys.stdout, indent=1)
        print()
    else:
        for r in reports.values():
            show(r)
    return 0


if __name__ == "__main__":
    sys.exit(main())
