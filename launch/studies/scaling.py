"""study.py scaling: throughput over ranks, strong or weak, with everything that explains it."""

from . import files, figures, grids, page, plots, program
from .errors import ENVIRONMENT, USAGE, StudyError
from .figures import over
from .folder import Study, duration, say, today
from .jobs import Job
from .simulator import Simulator, largest_miss
from .tables import write_runs

HELP = "throughput over ranks or GPUs: runs, CSV, JSON, and a report with plots"


def add_arguments(parser):
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks, with commas "
                        "(default %(default)s)")
    parser.add_argument("--grids", default="auto", help="auto: for each number of ranks replicas "
                        "alone, stages alone, tensor slots alone and the widest mix; all; or names "
                        "such as tp2pp1dp1 with commas")
    parser.add_argument("--kind", choices=("strong", "weak"), default="strong", help="strong: the "
                        "same work for all; weak: as many copies of the samples as ranks")
    parser.add_argument("--topology", help="machine description for the simulator (default: made by "
                        "drover topology --detect)")
    parser.add_argument("--calibrate", help="bench files for the simulator, with commas (default: made "
                        "before the runs, on one rank and one pair)")
    parser.add_argument("--no-simulate", action="store_true", help="no simulator, no calibration")


def numbers(text, option="--ranks"):
    words = text.split(",")
    if not all(w.isdigit() and int(w) > 0 for w in words):
        raise StudyError(USAGE, f"{option} {text}: expected numbers with commas, such as 1,2,4,8")
    return sorted({int(w) for w in words})


def jobs_of(args, chosen):
    """Repetition by repetition, so that a machine that drifts does so over all of them."""
    if "threads" not in args.common and args.common.get("backend", "auto") != "cuda":
        # The same for every number of ranks, or the ranks would not be comparable. (A GPU rank has
        # no use for it.)
        args.common["threads"] = max(1, program.cores() // max(g.ranks for g in chosen))
    jobs = []
    for repeat in range(1, args.repeat + 1):
        for grid in chosen:
            copies = {"copies": grid.ranks} if args.kind == "weak" else {}
            own = args.common | {"tp": grid.tp, "pp": grid.pp, "dp": grid.dp} | copies
            jobs.append(Job(grid.label, grid.ranks, own, repeat,
                            {"kind": args.kind, "grid": str(grid)}))
    return jobs


def main(args):
    plots.library()  # told now, not after an hour of runs
    ranks = numbers(args.ranks)
    if args.kind == "weak" and not args.common.get("demo"):
        raise StudyError(USAGE, "--kind weak takes whole copies of the samples, which a run of "
                         "MLPerf's length does not; leave --mlperf-length out")
    if args.kind == "weak" and args.common["scenario"] != "offline":
        raise StudyError(USAGE, "--kind weak is for --scenario offline")
    chosen = grids.choose(args.grids, ranks, **args.shape)
    jobs = jobs_of(args, chosen)
    with Study(args, args.command_line) as study:
        simulator = Simulator(args, study)
        simulator.calibrate()
        outcomes = study.finish(jobs)
        rows = [figures.row_of(job, outcomes[job], study.runner.runs / job.name)
                for job in jobs if job in outcomes]
        rows = once_where_it_does_not_fit(rows)
        if not any(row["valid"] is not None for row in rows):
            if args.submit:
                return 0
            raise StudyError(worst(outcomes), "no run came to its end; see "
                             f"{study.folder}/runs/failed" if not rows else
                             f"no grid fits: {rows[0]['message']}")
        write(study, args, rows, simulator)
        left = len(jobs) - len(outcomes)
        if left:
            say(f"{left} of {len(jobs)} runs are still to come; the report has the others")
        return 0 if not left or args.submit else ENVIRONMENT


def worst(outcomes):
    return max((o.code for o in outcomes.values()), default=ENVIRONMENT)


def once_where_it_does_not_fit(rows):
    return [r for r in rows if r["exit_code"] != USAGE or r["repeat"] == 1]


def write(study, args, rows, simulator):
    fitting = [r for r in rows if r["valid"] is not None]
    points = [Point(first, group) for first, group in figures.by_config(fitting)]
    points.sort(key=lambda p: (p.ranks, -p.speed.mean))
    simulated = simulator.lines(points)
    write_runs(study.folder, rows, points=[p.json() for p in points], simulated=simulated.json())
    gallery = plots.Gallery(study.folder / "plots")
    draw(gallery, points, simulated, study.runner.runs)
    body = report(gallery, points, rows, args, simulated)
    what = "Strong" if args.kind == "strong" else "Weak"
    title = f"{what} scaling of {short(args.model)}"
    under = (f"{short(args.dataset)} · {args.common['scenario']} · {len(points)} grids × up to "
             f"{args.repeat} runs · {today()}")
    files.write_text(study.folder / "report.html",
                     page.page(title, page.text(under), body, args.command_line, today()))
    say(f"report: {study.folder}/report.html (also results.csv, results.json, plots/)")


def short(name):
    return name if name.startswith("synthetic:") else name.rsplit("/", 1)[-1].removesuffix(".h5")


class Point:
    """One grid's repeated runs."""

    def __init__(self, first, rows):
        self.first, self.rows, self.ranks = first, rows, first["ranks"]
        self.grid, self.config = first["grid"], first["config"]
        self.speed = over(rows, "output_tokens_per_second")
        self.steady = over(rows, "steady_tokens_per_second")
        self.valid = all(r["valid"] for r in rows)

    def mean(self, key):
        return over(self.rows, key).mean

    def efficiency(self, base):
        """Speed a rank, of the fewest ranks' best. For weak scaling, too: the work grew with the
        ranks, and speed is work over time."""
        return self.speed.mean / self.ranks / (base.speed.mean / base.ranks)

    def json(self):
        out = {"config": self.config, "grid": self.grid, "ranks": self.ranks,
               "runs": len(self.rows), "valid": self.valid}
        for key in ("output_tokens_per_second", "steady_tokens_per_second", "duration_s", "ramp_s",
                    "steady_s", "drain_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms",
                    "tpot_p99_ms", "step_ms", *(f"step_{p}_ms" for p in figures.PARTS)):
            found = over(self.rows, key)
            out[key] = {"mean": found.mean, "low": found.low, "high": found.high} if found else None
        return out


def best_of_each(points):
    best = {}
    for p in points:
        if p.ranks not in best or p.speed.mean > best[p.ranks].speed.mean:
            best[p.ranks] = p
    return [best[n] for n in sorted(best)]


def unit_of(points):
    return "GPUs" if points[0].first.get("backend") == "cuda" else "ranks"


def aside(number):
    """The first shape is in its place, the others beside it by turns."""
    return (0, -1, 1, 2, -2, 3, -3, 4)[number % 8]


def count(number, unit):
    return f"{number} {unit[:-1] if number == 1 else unit}"


def colours_of(points):
    """A shape of grid (only replicas, only stages, …) keeps its colour over all ranks."""
    shapes = list(dict.fromkeys(shape_of(p) for p in points))
    return {shape: plots.SERIES[i % len(plots.SERIES)] for i, shape in enumerate(shapes)}


def shape_of(point):
    first = point.first
    parts = [name for name, key in (("tensor", "tp"), ("pipeline", "pp"), ("data", "dp"))
             if (first[key] or 1) > 1]
    return " × ".join(parts) + " parallel" if parts else "one rank"


# Figures.

def draw(gallery, points, simulated, runs):
    draw_speed(gallery, points, simulated)
    draw_efficiency(gallery, points)
    draw_step(gallery, points)
    draw_phases(gallery, points)
    draw_timeline(gallery, best_of_each(points), runs)
    draw_latency(gallery, points)


def draw_speed(gallery, points, simulated):
    figure, axes = gallery.figure("throughput", 6.2, 3.8)
    best = best_of_each(points)
    base = best[0]
    ranks = [p.ranks for p in points]
    ideal = [base.speed.mean * n / base.ranks for n in sorted(set(ranks))]
    axes.plot(sorted(set(ranks)), ideal, "--", color="#b8c2cc", linewidth=1.5,
              label=f"ideal, from {count(base.ranks, unit_of(points))}")
    axes.plot([p.ranks for p in best], [p.speed.mean for p in best], "-", color="#aebfd2",
              linewidth=6, alpha=0.55, solid_capstyle="round", zorder=1, label="best of each")
    for number, (shape, colour) in enumerate(colours_of(points).items()):
        of = [p for p in points if shape_of(p) == shape]
        plots.points(axes, [p.ranks for p in of], [p.speed for p in of], colour, shape,
                     aside=aside(number))
    known = [p for p in best if simulated.of(p)]
    if known:
        axes.plot([p.ranks for p in known], [simulated.of(p) for p in known], "x:", markersize=7,
                  color=plots.INK, linewidth=1.4, markeredgewidth=1.8, label="simulator")
    axes.set_title("Output tokens per second")
    axes.set_ylim(0, max(p.speed.high for p in points) * 1.25)
    plots.rank_axis(axes, ranks, unit_of(points))
    plots.thousands(axes)
    plots.legend_below(axes, 3, 0.17)
    gallery.keep(figure)


def draw_efficiency(gallery, points):
    figure, axes = gallery.figure("efficiency", 6.2, 3.8)
    base = best_of_each(points)[0]
    for number, (shape, colour) in enumerate(colours_of(points).items()):
        of = [p for p in points if shape_of(p) == shape]
        per_rank = base.speed.mean / base.ranks
        parts = [figures.Repeated([100 * v / p.ranks / per_rank for v in p.speed.values])
                 for p in of]
        plots.points(axes, [p.ranks for p in of], parts, colour, shape, aside=aside(number))
    axes.axhline(100, color="#b8c2cc", linestyle="--", linewidth=1.5)
    share = 100 * base.ranks / base.speed.mean
    axes.set_ylim(0, max([100.0] + [share * p.speed.high / p.ranks for p in points]) * 1.12)
    plots.legend_below(axes, 3, 0.17)
    axes.set_title(f"Efficiency: speed of a {unit_of(points)[:-1]}, % of {base.ranks}'s")
    plots.rank_axis(axes, [p.ranks for p in points], unit_of(points))
    gallery.keep(figure)


def name_of(point):
    return f"{point.ranks}: {point.grid}" if point.ranks > 1 else point.grid


def draw_step(gallery, points):
    known = [p for p in points if p.mean("step_ms")]
    if not known:
        return
    figure, axes = gallery.figure("step", 6.2, 1.5 + 0.36 * len(known))
    parts = {part: [p.mean(f"step_{part}_ms") for p in known] for part in figures.PARTS}
    if any(parts["device"]):
        # What the host does beside a GPU is no part of the step.
        parts = {"device": parts["device"],
                 "bubble": [p.mean("step_ms") - p.mean("step_device_ms") for p in known]}
    ends = plots.stacked(axes, [name_of(p) for p in known], parts, plots.PARTS, plots.PART_NAMES)
    for row, (p, end) in enumerate(zip(known, ends)):
        axes.annotate(f" {p.mean('step_ms'):,.1f}", (end, len(known) - 1 - row), va="center",
                      fontsize=9, color=plots.QUIET)
    axes.set_title("Time per step, mean over ranks [ms]")
    axes.margins(x=0.1)
    plots.legend_below(axes, 4, 0.55 / (1 + 0.3 * len(known)))
    gallery.keep(figure)


def draw_phases(gallery, points):
    known = [p for p in points if any(p.mean(f"{phase}_s") for phase in figures.PHASES)]
    if not known:
        return
    figure, axes = gallery.figure("phases", 6.2, 1.5 + 0.36 * len(known))
    parts = {phase: [p.mean(f"{phase}_s") for p in known] for phase in figures.PHASES}
    ends = plots.stacked(axes, [name_of(p) for p in known], parts, plots.PHASES,
                         {"steady": "steady (≥ 90 % of the peak run)"})
    for row, (p, end) in enumerate(zip(known, ends)):
        rate = p.steady.mean
        words = f" {rate:,.0f} tokens/s in steady state" if rate else " no steady state"
        axes.annotate(words, (end, len(known) - 1 - row), va="center", fontsize=9,
                      color=plots.QUIET)
    axes.set_title("Ramp, steady state and drain [s]")
    axes.margins(x=0.42)
    plots.legend_below(axes, 3, 0.55 / (1 + 0.3 * len(known)))
    gallery.keep(figure)


def draw_timeline(gallery, best, runs):
    figure, (above, below) = gallery.figure("timeline", 6.2, 4.2, rows=2, sharex=True)
    for i, point in enumerate(best):
        row = sorted(point.rows, key=lambda r: r["output_tokens_per_second"])[len(point.rows) // 2]
        result = files.read_json(runs / row["run"] / "result.json")
        bins = result.get("passes", {}).get("performance", result).get("timeline")
        if not bins:
            continue
        running, tokens, width = grouped(bins, 32)
        at = [(k + 0.5) * width for k in range(len(running))]
        colour = plots.SERIES[i % len(plots.SERIES)]
        above.plot(at, running, color=colour, label=name_of(point), linewidth=1.8)
        below.plot(at, [t / width for t in tokens], color=colour, linewidth=1.8)
    above.set_title("Sequences running, and output tokens/s, over a run")
    above.set_ylabel("sequences")
    below.set_ylabel("tokens/s")
    below.set_xlabel("seconds")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        plots.thousands(axes)
    above.legend(loc="lower center", ncols=2)
    gallery.keep(figure)


def grouped(bins, most):
    """Few enough bins for the eye."""
    by = -(-len(bins["running"]) // most)
    cut = [slice(i, i + by) for i in range(0, len(bins["running"]), by)]
    running = [sum(bins["running"][c]) / len(bins["running"][c]) for c in cut]
    tokens = [sum(bins["tokens"][c]) * by / len(bins["tokens"][c]) for c in cut]
    return running, tokens, by * bins["bin_s"]


def draw_latency(gallery, points):
    figure, pair = gallery.figure("latency", 6.2, 3.7, columns=2)
    for axes, kind, title in ((pair[0], "ttft", "Time to first token [ms]"),
                              (pair[1], "tpot", "Time per output token [ms]")):
        best = best_of_each(points)
        for at, colour, marker in (("p50", plots.SERIES[0], "o"), ("p99", plots.SERIES[1], "s")):
            known = [p for p in best if over(p.rows, f"{kind}_{at}_ms")]
            plots.points(axes, [p.ranks for p in known],
                         [over(p.rows, f"{kind}_{at}_ms") for p in known], colour, at, True, marker)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        plots.rank_axis(axes, [p.ranks for p in points], unit_of(points))
        plots.thousands(axes)
        axes.legend(loc="best")
    gallery.keep(figure)


# The page.

def report(gallery, points, rows, args, simulated):
    best, unit = best_of_each(points), unit_of(points)
    base, top = best[0], max(points, key=lambda p: p.speed.mean)
    last = best[-1]
    fastest = max(best, key=lambda p: p.speed.mean)
    speedup = figures.ratio_interval(fastest.speed, base.speed)
    others = [p for p in (last,) if p is not fastest and p is not base]
    between = "".join(f"; {count(p.ranks, unit)}: {p.speed.mean / base.speed.mean:.2f}×"
                      for p in others)
    if speedup and speedup[2] < 2 * speedup[1]:
        between += f"; 95 % interval {speedup[1]:.2f} to {speedup[2]:.2f}"
    elif speedup:
        between += "; these runs vary too much for an interval"
    cores = max((r.get("usable_cores") or 0 for r in rows), default=0)
    spent = sum(r["run_seconds"] for r in rows)
    out = [page.tiles(
        page.tile("Fastest", f"{top.speed.mean:,.0f}", "tokens/s",
                  f"{count(top.ranks, unit)}: {top.grid}"),
        page.tile("Speed-up", f"{fastest.speed.mean / base.speed.mean:.2f}×", "",
                  f"{count(fastest.ranks, unit)} over {base.ranks}{between}"),
        page.tile("Efficiency", f"{100 * fastest.efficiency(base):.0f} %", "",
                  f"of {count(fastest.ranks, unit)}" + "".join(
                      f"; {count(p.ranks, unit)}: {100 * p.efficiency(base):.0f}\u00a0%"
                      for p in others)),
        page.tile("Steady state", f"{top.steady.mean:,.0f}" if top.steady else "–", "tokens/s",
                  "the fastest, without ramp and drain"),
        page.tile("Runs", str(len(rows)), "", f"{duration(spent)} in all"))]
    if unit == "ranks" and cores and max(p.ranks for p in points) > cores:
        out.append(page.note(
            f"This host has {cores} usable cores. Beyond {cores} ranks, ranks share cores: those "
            "points show what sharing costs, not how drover scales. Each rank had the same number "
            "of threads."))
    if not all(p.valid for p in points):
        out.append(page.note("LoadGen calls some of these runs INVALID; the table says which."))
    missing = [r for r in rows if r["valid"] is None]
    svg = gallery.svg
    out.append(page.pair(
        page.figure(svg["throughput"], "Points are means of repeated runs, bars reach from the "
                    "slowest to the fastest. " + page.text(simulated.words) +
                    largest_miss(points, simulated), "throughput over " + unit),
        page.figure(svg["efficiency"], "Speed divided by ranks, against the fewest ranks' best grid "
                    "(dashed: no loss).", "efficiency over " + unit)))
    lower = []
    if "step" in svg:
        lower.append(page.figure(svg["step"], step_words(points), "time per step"))
    if "phases" in svg:
        lower.append(page.figure(svg["phases"], "Steady: from the first to the last moment with at "
                                 "least 90 % of the peak number of sequences.", "phases"))
    out.append("<h2>Where the time goes</h2>" + page.pair(*lower))
    out.append("<h2>Over a run, and latencies</h2>" + page.pair(
        page.figure(svg["timeline"], "The best grid for each number of ranks, the median run.",
                    "timeline"),
        page.figure(svg["latency"], "The best grid for each number of ranks. " + latency_words(args),
                    "latencies")))
    out.append("<h2>All grids</h2>" + point_table(points, base, top, simulated))
    if missing:
        out.append("<h2>What did not run</h2>" + page.table(
            ["grid", "ranks", "why"], [[r["grid"], r["ranks"], r["message"]] for r in missing],
            left=(0, 2), wrap=(2,)))
    out.append("<h2>Environment</h2>" + page.environment(rows))
    out.append('<p class="quiet">Every run by itself is in results.csv and results.json beside this '
               "page, its logs under runs/, the figures as PNG under plots/.</p>")
    return "\n".join(out)


def step_words(points):
    if points[0].mean("step_compute_ms") is None:
        return ("On GPUs the host sees only whether a GPU's queue holds steps; what lies inside "
                "shows in a trace (--trace).")
    return ("Clocks of each rank's worker. Communication includes waits for the slowest rank of a "
            "stage; on shared cores also for the core.")


def latency_words(args):
    return ("In Offline all samples come at once: the first token waits for its turn."
            if args.common["scenario"] == "offline" else "")


def point_table(points, base, top, simulated):
    invalid = [] if all(p.valid for p in points) else ["LoadGen"]
    head = ["grid", "ranks", "runs", "tokens/s", "speed-up", "efficiency", "steady tokens/s",
            *(["simulated"] if simulated.speed else []), "ramp / steady / drain s", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms", *invalid]
    lines = []
    for p in points:
        def two(*keys, digits=0):
            return " / ".join(page.number(p.mean(k), digits) for k in keys)
        lines.append([p.grid, p.ranks, len(p.rows), str(p.speed),
                      f"{p.speed.mean / base.speed.mean:.2f}×",
                      f"{100 * p.efficiency(base):.0f} %", str(p.steady),
                      *([page.number(simulated.of(p))] if simulated.speed else []),
                      two("ramp_s", "steady_s", "drain_s", digits=1),
                      two("ttft_p50_ms", "ttft_p99_ms"), two("tpot_p50_ms", "tpot_p99_ms", digits=1),
                      *(["valid" if p.valid else "INVALID"] if invalid else [])])
    return page.table(head, lines, left=(0,), best=[points.index(top)])
