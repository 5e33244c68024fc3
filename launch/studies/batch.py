"""study.py batch: the batch size and the tokens a step that serve best, kept in a run file."""

import os

from . import figures, files, grids, page, plots
from .errors import ENVIRONMENT, USAGE, StudyError
from .figures import over
from .folder import Study, say, today
from .jobs import Job
from .scaling import numbers, short
from .tables import write_runs

HELP = "tokens/s and latency over batch size and tokens a step; writes the best as a run file"
# Not worth a larger batch: so little faster cannot be told from luck.
LEAST_GAIN = 0.01


def add_arguments(parser):
    parser.add_argument("--sequences", default="16,32,64,128", help="batch sizes: sequences at once "
                        "in a replica (default %(default)s)")
    parser.add_argument("--step-tokens", default="128,256,512", help="rows of one step at most "
                        "(default %(default)s)")
    parser.add_argument("--grid", default="tp1", help="such as tp2pp1dp1 (default: one rank)")
    parser.add_argument("--most-tpot-ms", type=float, help="leave out what has more at p99")
    parser.add_argument("--most-ttft-ms", type=float, help="likewise, time to first token")


def jobs_of(args, grid):
    jobs = []
    for repeat in range(1, args.repeat + 1):
        for sequences in numbers(args.sequences, "--sequences"):
            for tokens in numbers(args.step_tokens, "--step-tokens"):
                own = {"tp": grid.tp, "pp": grid.pp, "dp": grid.dp, "max-sequences": sequences,
                       "step-tokens": tokens}
                jobs.append(Job(f"b{sequences}-t{tokens}", grid.ranks, args.common | own, repeat,
                                {"sequences": sequences, "step_tokens": tokens,
                                 "grid": str(grid)}))
    return jobs


def main(args):
    plots.library()
    grid = grids.parse(args.grid)
    jobs = jobs_of(args, grid)
    with Study(args, args.command_line) as study:
        outcomes = study.finish(jobs)
        rows = [figures.row_of(job, outcomes[job], study.runner.runs / job.name)
                for job in jobs if job in outcomes]
        points = [Point(first, group) for first, group in
                  figures.by_config([r for r in rows if r["valid"] is not None])]
        if not points:
            if args.submit:
                return 0
            raise StudyError(ENVIRONMENT, "no run came to its end" +
                             (f": {rows[0]['message']}" if rows else ""))
        best, why = choose(points, args.most_tpot_ms, args.most_ttft_ms)
        write_runs(study.folder, rows)
        write_report(study, args, points, rows, best, why)
        if best:
            file = study.folder / "run.conf"
            files.write_text(file, run_file(best, args, why))
            say(f"best: {best.sequences} sequences, {best.tokens} tokens a step: {best.speed} "
                f"tokens/s; kept in {file} (drover run --config {file} --out …)")
        else:
            raise StudyError(USAGE, why)
        return 0


class Point:
    def __init__(self, first, rows):
        self.first, self.rows = first, rows
        self.sequences, self.tokens = first["sequences"], first["step_tokens"]
        self.speed = over(rows, "output_tokens_per_second")
        self.steady = over(rows, "steady_tokens_per_second")
        self.ttft, self.tpot = over(rows, "ttft_p99_ms"), over(rows, "tpot_p99_ms")


def choose(points, most_tpot, most_ttft):
    """The fastest that keeps the limits; of those that cannot be told from it, the smallest."""
    kept = [p for p in points if (not most_tpot or p.tpot.mean <= most_tpot) and
            (not most_ttft or p.ttft.mean <= most_ttft)]
    if not kept:
        return None, ("no batch size keeps --most-tpot-ms and --most-ttft-ms; the report shows "
                      "how far each is from it")
    top = max(kept, key=lambda p: p.speed.mean)
    for point in sorted(kept, key=lambda p: (p.sequences, p.tokens)):
        found = figures.ratio_interval(top.speed, point.speed)
        # Without repetitions there is no idea of the noise: the mean decides.
        worse = top.speed.mean > point.speed.mean * (1 + LEAST_GAIN)
        if point is top or not worse or (found and found[1] <= 1 + LEAST_GAIN and
                                         top.speed.mean < point.speed.mean * 1.05):
            words = "the fastest" if point is top else (
                f"the smallest that cannot be told from the fastest ({top.sequences} sequences, "
                f"{top.tokens} tokens a step)")
            return point, words
    return top, "the fastest"


def run_file(best, args, why):
    """For --config: all that makes the run what it was, but for where it lies and how long it is."""
    lines = [f"# Made by study.py batch, {today()}: {best.speed} tokens/s, {why}.",
             f"# Started with: {args.command_line}"]
    job = best.rows[0]
    options = args.common | {"tp": job["tp"], "pp": job["pp"], "dp": job["dp"],
                             "max-sequences": best.sequences, "step-tokens": best.tokens}
    for key, value in options.items():
        if key in ("mode", "progress", "demo", "samples"):
            continue
        if key in ("model", "dataset") and os.path.exists(value):
            value = os.path.abspath(value)
        lines.append(f"{key} = {'yes' if value is True else value}")
    return "\n".join(lines) + "\n"


def write_report(study, args, points, rows, best, why):
    gallery = plots.Gallery(study.folder / "plots")
    sizes = sorted({p.tokens for p in points})
    for name, key, title in (("speed", "speed", "Output tokens per second"),
                             ("tpot", "tpot", "Time per output token, p99 [ms]"),
                             ("ttft", "ttft", "Time to first token, p99 [ms]")):
        figure, axes = gallery.figure(name, 6.2, 3.7)
        for number, tokens in enumerate(sizes):
            of = [p for p in points if p.tokens == tokens]
            plots.points(axes, [p.sequences for p in of], [getattr(p, key) for p in of],
                         plots.SERIES[number % len(plots.SERIES)], f"{tokens} tokens a step", True,
                         aside=(0, -1, 1)[number % 3])
        if best and key == "speed":
            axes.plot([best.sequences], [best.speed.mean], "o", markersize=15, fillstyle="none",
                      color=plots.INK, markeredgewidth=1.5, label="chosen")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        plots.rank_axis(axes, [p.sequences for p in points], "sequences at once in a replica")
        plots.thousands(axes)
        plots.legend_below(axes, 4, 0.17)
        gallery.keep(figure)
    chosen = [page.tile("Chosen", best.sequences, "sequences", f"{best.tokens} tokens a step: {why}"),
              page.tile("Speed", f"{best.speed.mean:,.0f}", "tokens/s", f"{len(best.rows)} runs, "
                        f"{best.speed}"),
              page.tile("Time per output token", f"{best.tpot.mean:,.1f}", "ms", "p99"),
              page.tile("Time to first token", f"{best.ttft.mean:,.0f}", "ms", "p99")] if best else []
    body = [page.tiles(*chosen) if best else page.note(page.text(why)),
            page.pair(page.figure(gallery.svg["speed"], "Means of repeated runs; bars from the slowest "
                                  "to the fastest.", "tokens/s"),
                      page.figure(gallery.svg["tpot"], "Larger batches are faster together and slower "
                                  "each.", "time per output token"),
                      page.figure(gallery.svg["ttft"], "In Offline all samples come at once and wait "
                                  "for their turn.", "time to first token")),
            "<h2>All of them</h2>", page.table(
                ["sequences", "tokens a step", "runs", "tokens/s", "steady tokens/s", "TTFT p99 ms",
                 "TPOT p99 ms", "preemptions"],
                [[p.sequences, p.tokens, len(p.rows), str(p.speed), str(p.steady),
                  page.number(p.ttft.mean, 0), page.number(p.tpot.mean),
                  page.number(over(p.rows, "preemptions").mean, 0)] for p in points], left=(),
                best=[points.index(best)] if best else []),
            "<h2>Environment</h2>", page.environment(rows)]
    misfits = {r["label"]: r["message"] for r in rows if r["valid"] is None}
    if misfits:
        body += ["<h2>What did not run</h2>", page.table(
            ["batch", "why"], list(misfits.items()), left=(0, 1), wrap=(1,))]
    files.write_text(study.folder / "report.html", page.page(
        f"Batch size for {short(args.model)}", page.text(
            f"{short(args.dataset)} · {args.common['scenario']} · {points[0].first['grid']} · {today()}"),
        "\n".join(body), args.command_line, today()))
    say(f"report: {study.folder}/report.html")
