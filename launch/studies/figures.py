"""The numbers of one run, of repeated ones, and whether a difference is more than noise."""

import math
import statistics

from . import files

# Two-sided 95 % of Student's t, by degrees of freedom.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
       2.052, 2.048, 2.045, 2.042]
PHASES = ("ramp", "steady", "drain")
PARTS = ("compute", "communication", "bubble", "host", "device")


def t95(freedom):
    if freedom < 1:
        return math.inf
    return T95[math.ceil(freedom) - 1] if freedom <= len(T95) else 1.96


def row_of(job, outcome, folder):
    """One run as a flat row; what it does not tell is None."""
    grid = {k: job.options.get(k) for k in ("tp", "pp", "dp")}
    row = {"run": job.name, "config": job.config, "label": job.label, "ranks": job.ranks,
           "repeat": job.repeat, **grid, "copies": job.options.get("copies", 1), **job.tags,
           "exit_code": outcome.code, "message": outcome.message, "run_seconds": outcome.seconds}
    if not outcome.complete:
        return row | {"valid": None}
    result = files.read_json(folder / "result.json") or {}
    speed = result.get("passes", {}).get("performance", result)
    row |= {"valid": speed.get("valid"), "verdict": speed.get("verdict"),
            "reasons": "; ".join(speed.get("reasons", [])),
            "backend": result.get("backend"), "kv": result.get("kv"),
            "activations": result.get("activations")}
    for key in ("output_tokens_per_second", "samples_per_second", "duration_s", "samples",
                "output_tokens", "preemptions"):
        row[key] = speed.get(key)
    for kind in ("ttft_ms", "tpot_ms"):
        for at in ("p50", "p90", "p99"):
            row[f"{kind[:-3]}_{at}_ms"] = (speed.get(kind) or {}).get(at)
    phases = speed.get("phases") or {}
    row["peak_running"] = phases.get("peak_running")
    for phase in PHASES:
        found = phases.get(phase) or {}
        row[f"{phase}_s"] = found.get("seconds")
        row[f"{phase}_tokens_per_second"] = found.get("tokens_per_second")
    times = speed.get("step_time") or {}
    mean = times.get("mean_ms") or {}
    row["steps"] = times.get("steps")
    row["step_ms"] = mean.get("step")
    for part in PARTS:
        row[f"step_{part}_ms"] = mean.get(part)
    for kind in ("rouge1", "rouge2", "rougeL"):
        row[kind] = (result.get("rouge") or {}).get(kind)
    environment = files.read_json(folder / "environment.json") or {}
    versions = environment.get("versions", {})
    row |= {"host": environment.get("host"), "cpu": environment.get("cpu"),
            "usable_cores": environment.get("usable_cores"), "time": environment.get("time"),
            "drover": versions.get("drover"), "commit": versions.get("commit")}
    return row


class Repeated:
    """A figure over repeated runs."""

    def __init__(self, values):
        self.values = [v for v in values if v is not None]

    def __bool__(self):
        return bool(self.values)

    @property
    def mean(self):
        return statistics.fmean(self.values) if self.values else None

    @property
    def low(self):
        return min(self.values)

    @property
    def high(self):
        return max(self.values)

    @property
    def deviation(self):
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self):
        if not self.values:
            return "not measured"
        spread = f" ± {(self.high - self.low) / 2:,.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:,.1f}{spread}"


def ratio_interval(ours, theirs):
    """Ratio of two means of repeated runs with its 95 % interval (Welch's t on the logarithms).

    None where a single run gives no idea of the noise."""
    if min(len(ours.values), len(theirs.values)) < 2 or min(ours.values + theirs.values) <= 0:
        return None
    a, b = [[math.log(v) for v in x.values] for x in (ours, theirs)]
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    middle = statistics.fmean(a) - statistics.fmean(b)
    if va + vb == 0:
        return math.exp(middle), math.exp(middle), math.exp(middle)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = t95(math.floor(freedom)) * math.sqrt(va + vb)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


UP, SAME, DOWN, UNKNOWN = "⬆️", "➡️", "⬇️", "?"


def arrow(interval, least=0.0):
    """Up or down only where the whole interval is on that side of 1, by more than `least`."""
    if interval is None:
        return UNKNOWN
    _, low, high = interval
    if low > 1 + least:
        return UP
    return DOWN if high < 1 - least else SAME


def by_config(rows):
    """[(first row, all rows)] of each configuration, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(row["config"], []).append(row)
    return [(group[0], group) for group in groups.values()]


def over(rows, key):
    return Repeated([row.get(key) for row in rows])
