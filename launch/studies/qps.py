"""study.py qps: the highest target QPS that LoadGen calls valid, and the user.conf that keeps it."""

import math

from . import figures, files, grids, page, plots, program
from .errors import ENVIRONMENT, INVALID, USAGE, StudyError
from .folder import Study, duration, say, today
from .jobs import Job
from .scaling import short
from .tables import write_runs

HELP = "the highest target QPS of Server and Interactive that is valid; Offline's; writes user.conf"
# drover's own short runs need so many queries, LoadGen's early stopping at the 99th percentile.
PROBE_QUERIES = 459
# MLPerf Inference: a run lasts ten minutes at least, and goes over the whole set.
FULL_SECONDS, FULL_QUERIES = 600, 24576
OFFLINE_SLACK = 1.1  # LoadGen issues so much more than target_qps times the duration
FASTER_THAN_OFFLINE = 1.5  # a short Offline run is mostly ramp and drain; one of ten minutes is not
MOST_PROBES = 24
STEPS_DOWN = 4
STEP_DOWN, FULL_STEP_DOWN = 0.97, 0.93  # each step of MLPerf's length costs ten minutes


def add_arguments(parser):
    parser.add_argument("--grid", default="tp1", help="such as tp2pp1dp1 (default: one rank)")
    parser.add_argument("--start", type=float, help="first rate to try (default: from a short Offline "
                        "run)")
    parser.add_argument("--dry-run", action="store_true", help="tell how long the study would last, and "
                        "run nothing but the short Offline run (with --start not even that)")
    parser.add_argument("--within", type=float, default=0.05, help="stop when the valid and the "
                        "invalid rate are so close (default %(default)s)")


def rounded(rate):
    """Three digits: probes of a study that goes on are the same as before."""
    return float(f"{rate:.3g}")


def brief(row):
    """The limits that were not kept; LoadGen's own words where it is something else."""
    reasons = row["reasons"].split("; ")
    ours = [r for r in reasons if r.startswith("time ")]
    return "; ".join(ours) or reasons[0]


def seconds_of(queries, rate):
    return queries / rate


class Search:
    """Runs probes and remembers them. A probe is a run of its own: what is finished is not run
    again when the study goes on."""

    def __init__(self, args, study, samples):
        self.args, self.study, self.samples = args, study, samples
        self.grid = grids.parse(args.grid)
        self.rows = []

    def run(self, kind, options, says):
        job = Job(kind, self.grid.ranks, {**self.args.common, "tp": self.grid.tp, "pp": self.grid.pp,
                                          "dp": self.grid.dp, **options}, 1,
                  {"kind": kind.split("-")[0], "target_qps": options.get("target-qps")})
        say(says)
        outcomes = self.study.finish([job])
        if job not in outcomes:
            raise StudyError(ENVIRONMENT, f"{job.name} failed; its log is in {self.study.folder}/runs/"
                             "failed; the same command tries it again")
        outcome = outcomes[job]
        if not outcome.complete:
            raise StudyError(outcome.code, outcome.message)
        row = figures.row_of(job, outcome, self.study.runner.runs / job.name)
        self.rows.append(row)
        return row

    def offline(self):
        """Samples a second when all come at once: no server can do better for long."""
        options = {"scenario": "offline", "demo": True}
        for key in ("ttft-ms", "tpot-ms"):
            options[key] = self.args.common.get(key, 0)
        row = self.run("offline", options, "a short Offline run, for where to begin")
        steady = row["steady_tokens_per_second"] or row["output_tokens_per_second"]
        return row["samples_per_second"], steady / (row["output_tokens"] / row["samples"])

    def probe_queries(self):
        return max(PROBE_QUERIES, self.samples or 0)

    def forecast(self, rate):
        """How long everything lasts if the rate found is about this one."""
        # From half of Offline's rate: twice at most to enclose it, then the gap is halved.
        probes = 2 + math.ceil(math.log2(math.log(2) / math.log(1 + self.args.within)))
        each = seconds_of(self.probe_queries(), rate)
        say(f"about {probes} probes of {self.probe_queries()} queries, {duration(each)} each at {rate:g} "
            f"queries/s, and loading the model each time")
        say(self.told(rate) + (f"; up to {STEPS_DOWN} of them, each a little slower, while they are not valid"
                               if self.args.mlperf_length else ""))

    def probe(self, rate):
        queries = self.probe_queries()
        row = self.run(f"probe-{rate:g}", {"demo": True, "target-qps": rate},
                       f"probe at {rate:g} queries/s: {queries} queries, about "
                       f"{duration(seconds_of(queries, rate))}")
        say(f"  {'valid' if row['valid'] else 'not valid: ' + brief(row)}")
        return row["valid"]

    def highest(self, start, most=math.inf):
        """Doubles or halves until a valid rate has an invalid one above, then halves the gap. What is
        above `most` is taken as not valid: a probe may be over before its queue has grown."""
        low, high, rate = None, None, rounded(start)
        for _ in range(MOST_PROBES):
            if rate > most and low:
                say(f"  {rate:g} queries/s is not tried: Offline is slower, so its queue would only grow")
                high = rate
            elif self.probe(rate):
                low = rate
            else:
                high = rate
            if low and high:
                if high / low <= 1 + self.args.within:
                    return low
                rate = rounded(math.sqrt(low * high))
                if rate in (low, high):
                    return low
            else:
                rate = rounded(rate * 2 if low else rate / 2)
        if low is None:
            raise StudyError(INVALID, f"no rate down to {high:g} queries/s is valid: the limits cannot "
                             "be kept with this grid; see the report's latencies")
        return low

    def confirm(self, rate):
        """One run of its own at the rate found; a little less when chance was with the probe."""
        first, step = rate, FULL_STEP_DOWN if self.args.mlperf_length else STEP_DOWN
        for _ in range(STEPS_DOWN):
            row = self.run(f"confirm-{rate:g}", self.confirmation(rate), self.told(rate))
            if row["valid"]:
                return rate, row
            say(f"  not valid: {brief(row)}")
            tried, rate = rate, rounded(rate * step)
        raise StudyError(INVALID, f"no rate from {first:g} down to {tried:g} was confirmed; the short probes "
                         f"are too kind here: more --samples, or --start {rate:g} with --within "
                         f"{self.args.within:g}")

    def confirmation(self, rate):
        if self.args.mlperf_length:
            return {"target-qps": rate, "demo": False}
        # Not the probe's run over again: another name, and first in, first out of a warm engine.
        return {"target-qps": rate, "demo": True, "warmup": 8}

    def told(self, rate):
        if not self.args.mlperf_length:
            queries = self.probe_queries()
            return (f"confirmation at {rate:g} queries/s: {queries} queries, about "
                    f"{duration(seconds_of(queries, rate))} (short: not of MLPerf's length)")
        return f"confirmation at {rate:g} queries/s, {full_length(self.args, rate)}"


def full_queries(args):
    return FULL_QUERIES if benchmark(args).startswith("llama2-70b") else 0


def full_length(args, rate):
    """How long MLPerf's length is at this rate, in words."""
    most = max(FULL_SECONDS, seconds_of(full_queries(args), rate))
    return (f"at least {max(full_queries(args), math.ceil(rate * FULL_SECONDS)):,} queries, about "
            f"{duration(most)}")


def offline_length(args, rate):
    """Likewise of an Offline run, which LoadGen sizes by target_qps."""
    samples = max(full_queries(args), math.ceil(OFFLINE_SLACK * rate * FULL_SECONDS))
    return (f"LoadGen will issue {samples:,} samples, which last about "
            f"{duration(seconds_of(samples, rate))} (at least {duration(FULL_SECONDS)} are wanted)")


def benchmark(args):
    name = args.common.get("benchmark")
    if name:
        return name
    if args.common.get("demo") and not args.mlperf_length:
        return "drover-demo"
    return "llama2-70b-interactive" if args.common["scenario"] == "interactive" else "llama2-70b"


def main(args):
    if args.submit:
        raise StudyError(USAGE, "qps: each probe depends on the one before, so --submit cannot hand "
                         "them out; start this command itself in one batch job")
    if args.within <= 0:
        raise StudyError(USAGE, f"--within {args.within}: expected more than 0, such as 0.05")
    scenario = args.common["scenario"]
    if scenario == "singlestream":
        raise StudyError(USAGE, "qps is for offline, server and interactive; SingleStream has no rate")
    if args.mlperf_length and (given := {"ttft-ms", "tpot-ms"} & args.common.keys()):
        raise StudyError(USAGE, f"--{sorted(given)[0]} with --mlperf-length: {benchmark(args)} has limits "
                         "of MLPerf's, and the last run would be refused; leave one of them out")
    plots.library()
    samples = args.samples or program.sample_count(args.program, args.dataset)
    with Study(args, args.command_line) as study:
        search = Search(args, study, samples)
        if args.dry_run and args.start:
            search.forecast(args.start)
            return 0
        whole, steady = search.offline()
        say(f"Offline: {whole:.3g} samples/s over all, {steady:.3g} in steady state")
        if scenario == "offline":
            rate, row = rounded(steady), None
            say(f"target_qps {rate:g}: {offline_length(args, rate)}")
        elif args.dry_run:
            search.forecast(rounded(args.start or whole / 2))
            return 0
        else:
            # In ten minutes a queue grows too long at any rate above Offline's.
            most = max(whole, steady) * (1 if args.mlperf_length else FASTER_THAN_OFFLINE)
            rate = search.highest(args.start or whole / 2, most)
            rate, row = search.confirm(rate)
        write(study, args, search, rate, row)
    return 0


def user_conf(args, rate, verdict):
    """`verdict`: of the confirming run; None where there was none."""
    name = "Offline" if args.common["scenario"] == "offline" else "Server"
    marked = ("estimated from a short Offline run's steady state" if verdict is None else
              f"confirmed by a full run: {verdict}" if args.mlperf_length else
              "confirmed by a short run only")
    return (f"# Made by study.py qps, {today()}; {marked}.\n# {args.command_line}\n"
            f"{benchmark(args)}.{name}.target_qps = {rate:g}\n")


def write(study, args, search, rate, row):
    conf = study.folder / "user.conf"
    verdict = row and files.read_json(study.runner.runs / row["run"] / "result.json")["verdict"]
    written = user_conf(args, rate, verdict)
    files.write_text(conf, written)
    write_runs(study.folder, search.rows, target_qps=rate)
    gallery = plots.Gallery(study.folder / "plots")
    probes = [r for r in search.rows if r["kind"] in ("probe", "confirm")]
    figures_html = ""
    if probes:
        draw(gallery, study, probes, rate)
        figures_html = page.pair(*(page.figure(gallery.svg[k], "Each point is a run; hollow: not valid. "
                                               "Dashed: the limit.", k) for k in ("ttft", "tpot")))
    tiles = [page.tile("target_qps", f"{rate:g}", "queries/s", args.common["scenario"]),
             page.tile("Probes", sum(r["kind"] == "probe" for r in search.rows), "",
                       duration(sum(r["run_seconds"] for r in search.rows)) + " in all"),
             page.tile("Offline", f"{search.rows[0]['samples_per_second']:.3g}", "samples/s",
                       "a short run, for comparison"),
             page.tile("MLPerf's length", full_length(args, rate).rsplit("about ", 1)[-1], "",
                       full_length(args, rate).rsplit(", about", 1)[0])]
    table = page.table(["run", "queries/s", "samples", "lasted", "TTFT p99 ms", "TPOT p99 ms",
                        "LoadGen", "why"],
                       [[r["kind"], page.number(r["target_qps"], 2), page.number(r["samples"], 0),
                         duration(r["duration_s"]), page.number(r["ttft_p99_ms"], 0),
                         page.number(r["tpot_p99_ms"]), "valid" if r["valid"] else "INVALID",
                         "" if r["valid"] else brief(r)] for r in search.rows], left=(0, 6, 7), wrap=(7,),
                       best=[i for i, r in enumerate(search.rows) if r is row])
    words = "" if row is None or args.mlperf_length else page.note(
        "The confirmation was a short run as well: start again with --mlperf-length for one that "
        "MLPerf would take. The probes are kept.")
    files.write_text(study.folder / "report.html", page.page(
        f"Target QPS of {short(args.model)}", page.text(
            f"{short(args.dataset)} · {args.common['scenario']} · {search.grid} · {today()}"),
        "\n".join([page.tiles(*tiles), words, figures_html, "<h2>All runs</h2>",
                   "<p>Probes are short runs that only steer the search.</p>", table,
                   "<h2>user.conf</h2>", f"<pre>{page.text(written)}</pre>",
                   "<h2>Environment</h2>", page.environment(search.rows)]),
        args.command_line, today()))
    say(f"target_qps {rate:g}, kept in {conf}; report: {study.folder}/report.html")


def draw(gallery, study, probes, rate):
    result = files.read_json(study.runner.runs / probes[-1]["run"] / "result.json") or {}
    limits = result.get("latency_limits") or {}
    for kind, title in (("ttft", "Time to first token, p99 [ms]"),
                        ("tpot", "Time per output token, p99 [ms]")):
        figure, axes = gallery.figure(kind, 6.2, 3.7)
        for row in sorted(probes, key=lambda r: r["target_qps"]):
            axes.plot([row["target_qps"]], [row[f"{kind}_p99_ms"]],
                      "o" if row["kind"] == "probe" else "D", markersize=8, markeredgewidth=1.8,
                      color=plots.SERIES[0], fillstyle="full" if row["valid"] else "none")
        if limit := limits.get(f"{kind}_p99_ms"):
            axes.axhline(limit, linestyle="--", color=plots.SERIES[4], linewidth=1.5)
        axes.axvline(rate, color="#b8c2cc", linewidth=1.5)
        axes.set_xlabel("target queries/s")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        plots.thousands(axes)
        gallery.keep(figure)
