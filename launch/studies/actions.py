"""study.py actions: what each measure is worth, alone, one after the other, and left out of all."""

import dataclasses
import json
import subprocess
import sys

from . import figures, files, grids, page, plots, program
from .errors import ENVIRONMENT, USAGE, StudyError
from .figures import over
from .folder import Study, duration, say, today
from .jobs import LAUNCH, Job
from .scaling import short
from .tables import write_runs

HELP = "the table of actions: each alone, cumulative, each left out; speed and accuracy"
KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclasses.dataclass(frozen=True)
class Action:
    name: str
    short: str     # in folders' names
    words: str     # what is done
    absent: str = ""  # why it cannot be taken here


def add_arguments(parser):
    parser.add_argument("--grid", help="of the action `more ranks`, such as tp2 or pp2dp2 (default: a "
                        "replica for each core, at most 8)")
    parser.add_argument("--baseline-sequences", type=int, default=50, help="batch of the baseline")
    parser.add_argument("--sequences", type=int, default=128, help="of the action `batch size`")
    parser.add_argument("--whole-prompt", type=int, default=2048, help="tokens a step without "
                        "`chunked prefill`: at least the longest prompt (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens a step with it")
    parser.add_argument("--model-16bit", help="the same model with 16-bit weights, for the action "
                        "`INT4`; without, that row says so")


def actions_of(args):
    """In the order in which they are added."""
    gpu = args.common.get("backend") == "cuda"
    cores = program.cores()
    grid = args.chosen_grid
    return [
        Action("threads", "threads", f"{cores} cores shared by the ranks instead of one thread each",
               "a GPU rank works on its GPU" if gpu else
               "there is one core here" if cores < 2 else ""),
        Action("continuous batching", "continuous", "a sequence takes the place of one that ended"),
        Action("INT4 weights", "int4", "instead of 16 bits", "" if args.model_16bit else
               "no 16-bit model to compare with: --model-16bit"),
        Action("more ranks", "ranks", f"{grid.ranks}: {grid}", "the grid has one rank"
               if grid.ranks == 1 else ""),
        Action("FP8 KV cache", "kv8", "instead of 16 bits"),
        Action("batch size", "batch", f"{args.sequences} sequences instead of "
               f"{args.baseline_sequences}"),
        Action("chunked prefill", "chunks", f"at most {args.chunk} tokens a step instead of "
               f"{args.whole_prompt}"),
        Action("CUDA graphs", "graphs", "decode steps recorded", "" if gpu else
               "needs a GPU (--backend cuda behind --)"),
    ]


def options_of(args, taken):
    """drover's options when the actions with these short names are taken."""
    grid = args.chosen_grid if "ranks" in taken else grids.Grid(1, 1, 1)
    gpu = args.common.get("backend") == "cuda"
    options = dict(args.common)
    if args.model_16bit and "int4" not in taken:
        options["model"] = args.model_16bit
    if not gpu:
        options["threads"] = max(1, program.cores() // grid.ranks) if "threads" in taken else 1
    rows = args.chunk if "chunks" in taken else args.whole_prompt
    options |= {"batching": "continuous" if "continuous" in taken else "static",
                "kv": "fp8" if "kv8" in taken else "bf16",
                "max-sequences": args.sequences if "batch" in taken else args.baseline_sequences,
                "step-tokens": rows, "chunk-tokens": rows,
                "tp": grid.tp, "pp": grid.pp, "dp": grid.dp}
    if gpu:
        options["graphs"] = "yes" if "graphs" in taken else "no"
    return grid, options


def label_of(taken, every):
    if not taken:
        return "baseline"
    return "all" if set(taken) == set(every) else "+".join(taken)


@dataclasses.dataclass
class Row:
    part: str       # alone, cumulative, left out
    action: Action
    taken: tuple    # short names
    against: tuple  # the row it is compared with


def rows_of(actions):
    usable = [a.short for a in actions if not a.absent]
    rows = [Row("baseline", None, (), ())]
    rows += [Row("alone", a, (a.short,), ()) for a in actions]
    so_far = []
    for a in actions:
        before = tuple(so_far)
        if not a.absent:
            so_far.append(a.short)
        rows.append(Row("cumulative", a, tuple(so_far), before))
    rows += [Row("left out", a, tuple(s for s in usable if s != a.short), tuple(usable))
             for a in actions]
    return rows, usable


def jobs_of(args, rows, usable):
    jobs, same = {}, {}  # rows that come to the same options share their runs
    for repeat in range(1, args.repeat + 1):
        for row in rows:
            if row.action and row.action.absent or (row.taken, repeat) in jobs:
                continue
            grid, options = options_of(args, row.taken)
            # The answers need one run; the speed needs several.
            options["mode"] = "performance,accuracy" if repeat == 1 else "performance"
            key = (repeat, grid.ranks, json.dumps(options, sort_keys=True))
            if key not in same:
                same[key] = Job(label_of(row.taken, usable)[:60], grid.ranks, options, repeat,
                                {"taken": ",".join(row.taken)})
            jobs[row.taken, repeat] = same[key]
    return jobs


def main(args):
    plots.library()
    args.chosen_grid = grids.parse(args.grid) if args.grid else grids.Grid(
        1, 1, min(8, program.cores()))
    if args.model_16bit:
        program.check_16bit(args.program, args.model_16bit, args.model)
    if args.common["scenario"] != "offline":
        raise StudyError(USAGE, "the table of actions is for --scenario offline")
    actions = actions_of(args)
    rows, usable = rows_of(actions)
    jobs = jobs_of(args, rows, usable)
    with Study(args, args.command_line) as study:
        outcomes = study.finish(list(dict.fromkeys(jobs.values())))
        runs = {key: figures.row_of(job, outcomes[job], study.runner.runs / job.name)
                for key, job in jobs.items() if job in outcomes}
        if not any(r["valid"] is not None for r in runs.values()):
            if args.submit:
                return 0
            raise StudyError(ENVIRONMENT, "no run came to its end")
        accuracy = Accuracy(study, args, jobs, outcomes)
        table = Table(rows, runs, accuracy)
        each = list({row["run"]: row for row in runs.values()}.values())
        write_runs(study.folder, each, table=table.json())
        write_report(study, args, table, each, accuracy)
        print(table.text())
        return 0 if set(jobs.values()) <= set(outcomes) or args.submit else ENVIRONMENT


class Accuracy:
    """ROUGE of the runs' answers, and how it differs: paired bootstrap over the samples, by
    data/score.py. Kept beside the runs: scoring takes longer than reading."""

    def __init__(self, study, args, jobs, outcomes):
        self.study, self.args, self.why_not = study, args, ""
        self.logs = {taken: study.runner.runs / job.name / "accuracy/mlperf_log_accuracy.json"
                     for (taken, repeat), job in jobs.items()
                     if repeat == 1 and job in outcomes and outcomes[job].complete}
        self.names = {taken: job.name for (taken, repeat), job in jobs.items() if repeat == 1}
        if args.dataset.startswith("synthetic:"):
            self.why_not = "a synthetic dataset has no reference answers"

    def compare(self, taken, against):
        """{"rouge": …, "ratio": {kind: {"ratio", "low", "high"}}} or None."""
        if self.why_not or taken not in self.logs or against not in self.logs:
            return None
        scores = self.study.folder / "scores"
        scores.mkdir(exist_ok=True)
        out = scores / f"{self.names[taken]}--{self.names[against]}.json"
        if not out.exists():
            command = [sys.executable, str(LAUNCH.parent / "data/score.py"), str(self.logs[taken]),
                       "--dataset", self.args.dataset, "--samples", str(self.args.samples), "--compare",
                       str(self.logs[against]), "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
            if done.returncode != 0:
                self.why_not = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
                return None
        found = json.loads(out.read_text())
        return {"rouge": found["rouge"], "ratio": found["compare"]["ratio"]}


class Table:
    """The rows with their figures: speed over the row they are held against, and ROUGE."""

    def __init__(self, rows, runs, accuracy):
        self.lines = []
        for row in rows:
            of = [r for (taken, _), r in runs.items() if taken == row.taken]
            base = [r for (taken, _), r in runs.items() if taken == row.against]
            line = {"part": row.part, "action": row.action.name if row.action else "baseline",
                    "words": row.action.words if row.action else "", "note": ""}
            if row.action and row.action.absent:
                line["note"] = row.action.absent
            elif not of or of[0]["valid"] is None:
                line["note"] = of[0]["message"] if of else "not run yet"
            else:
                self.fill(line, row, of, base, accuracy)
            self.lines.append(line)
        last = [row.taken for row in rows if row.part == "cumulative"][-1]
        both = [over([r for (taken, _), r in runs.items() if taken == which],
                     "output_tokens_per_second") for which in (last, ())]
        self.together = figures.arrow(figures.ratio_interval(*both))

    def fill(self, line, row, of, base, accuracy):
        speed, before = (over(r, "output_tokens_per_second") for r in (of, base))
        line |= {"tokens_per_second": speed.mean, "speed": str(speed), "runs": len(speed.values)}
        if not all(r["valid"] for r in of):
            line["note"] = "LoadGen: INVALID"
        if row.part == "baseline":
            found = accuracy.compare((), ())
            line["rouge"] = found["rouge"] if found else None
            return
        if base and of[0]["run"] == base[0]["run"]:
            line["note"] = "changes nothing beside the others here"
            return
        if not before:
            line["note"] = "nothing to compare it with: that row did not run"
            return
        line["ratio"] = speed.mean / before.mean
        interval = figures.ratio_interval(speed, before)
        line["interval"] = interval[1:] if interval else None
        line["arrow"] = figures.arrow(interval)
        found = accuracy.compare(row.taken, row.against)
        if found:
            line["rouge"], line["rouge_ratio"] = found["rouge"], found["ratio"]
            line["rouge_arrow"] = {k: figures.arrow((r["ratio"], r["low"], r["high"]))
                                   for k, r in found["ratio"].items()}

    def json(self):
        return self.lines

    def text(self):
        out = []
        for line in self.lines:
            if line["part"] != (out and self.part):
                self.part = line["part"]
                out.append(f"\n{PARTS[self.part]}")
            speed = line.get("speed", "")
            ratio = f"{line['arrow']} ×{line['ratio']:.2f}" if "ratio" in line else ""
            rouge = " ".join(f"{KINDS[k]} {a}" for k, a in line.get("rouge_arrow", {}).items())
            out.append(f"  {line['action']:22}{speed:>18}  {ratio:12}{rouge}  {line['note']}".rstrip())
        return "\n".join(out).lstrip("\n")


PARTS = {"baseline": "Baseline", "alone": "Each alone, against the baseline",
         "cumulative": "One after the other, against the row before",
         "left out": "All but one, against all: what leaving it out costs"}


def cell_of(mark, words, interval=None):
    kind = {figures.UP: "up", figures.DOWN: "down"}.get(mark, "")
    title = f' title="95 %: {interval[0]:.3f} to {interval[1]:.3f}"' if interval else ""
    return "html", f'<span class="{kind}"{title}>{mark} {page.text(words)}</span>'


def html_table(table):
    scored = any(line.get("rouge") for line in table.lines)
    kinds = KINDS if scored else {}
    head = ["action", "what is done", "tokens/s", "speed", *kinds.values(), "note"]
    rows, part = [], None
    for line in table.lines:
        if line["part"] != part:
            part = line["part"]
            rows.append([PARTS[part]])
        speed = (cell_of(line["arrow"], f"×{line['ratio']:.2f}", line["interval"])
                 if "ratio" in line else "")
        rouge = []
        for kind in kinds:
            if "rouge_arrow" in line:
                r = line["rouge_ratio"][kind]
                rouge.append(cell_of(line["rouge_arrow"][kind], f"{line['rouge'][kind]:.2f}",
                                     (r["low"], r["high"])))
            else:
                rouge.append(f"{line['rouge'][kind]:.2f}" if line.get("rouge") else "")
        rows.append([line["action"], line["words"], line.get("speed", ""), speed, *rouge,
                     line["note"]])
    return page.table(head, rows, left=(0, 1, len(head) - 1), wrap=(1, len(head) - 1))


def draw(gallery, table):
    """The way from the baseline to all actions."""
    steps = [line for line in table.lines if line["part"] in ("baseline", "cumulative") and
             "tokens_per_second" in line]
    figure, axes = gallery.figure("actions", 9, 0.9 + 0.5 * len(steps))
    at = list(range(len(steps)))[::-1]
    colours = {figures.UP: plots.SERIES[2], figures.DOWN: plots.SERIES[4]}
    axes.barh(at, [s["tokens_per_second"] for s in steps], height=0.62,
              color=[colours.get(s.get("arrow"), "#9db4c0") for s in steps])
    for y, step in zip(at, steps):
        ratio = f", ×{step['ratio']:.2f}" if "ratio" in step else ""
        axes.annotate(f" {step['tokens_per_second']:,.0f}{ratio}", (step["tokens_per_second"], y),
                      va="center", fontsize=9.5, color=plots.INK)
    names = ["baseline" if s["part"] == "baseline" else f"+ {s['action']}" for s in steps]
    axes.set_yticks(at, names)
    axes.tick_params(axis="y", colors=plots.INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_title("Output tokens per second, action after action")
    gallery.keep(figure)


def write_report(study, args, table, runs, accuracy):
    gallery = plots.Gallery(study.folder / "plots")
    draw(gallery, table)
    measured = [line for line in table.lines if "tokens_per_second" in line]
    base = next((line for line in measured if line["part"] == "baseline"), None)
    after = [line for line in measured if line["part"] == "cumulative"]
    alone = [line for line in measured if line["part"] == "alone" and "ratio" in line]
    tiles = []
    if base and after:
        before, then = base["tokens_per_second"], after[-1]["tokens_per_second"]
        tiles.append(page.tile("All together", f"×{then / before:.2f}", table.together,
                               f"{before:,.0f} to {then:,.0f} tokens/s"))
    sure = [line for line in alone if line["arrow"] == figures.UP]
    if sure:
        top = max(sure, key=lambda line: line["ratio"])
        tiles.append(page.tile("Most alone", f"×{top['ratio']:.2f}", "", top["action"]))
    elif alone:
        tiles.append(page.tile("Most alone", "–", "", "no gain larger than the noise"))
    spent = sum(r["run_seconds"] for r in runs)
    tiles.append(page.tile("Runs", len(runs), "", f"{duration(spent)} in all"))
    words = ("⬆️ and ⬇️ stand only where the difference is larger than the noise: speed by a 95 % "
             "interval over the repeated runs (point at a cell to see it), ROUGE by a paired bootstrap "
             "over the samples. ➡️: no difference that these runs can show. "
             "?: too few runs to tell.")
    if accuracy.why_not:
        words += f" No accuracy: {accuracy.why_not}."
    body = [page.tiles(*tiles), page.figure(gallery.svg["actions"], "Green: faster than the row before; "
            "red: slower; grey: no difference larger than the noise.", "action after action"),
            "<h2>The table</h2>", f"<p>{page.text(words)}</p>", html_table(table),
            "<h2>Environment</h2>", page.environment(runs)]
    files.write_text(study.folder / "report.html", page.page(
        f"What each action is worth: {short(args.model)}", page.text(
            f"{short(args.dataset)} · offline · up to {args.repeat} runs a row · {today()}"),
        "\n".join(body), args.command_line, today()))
    say(f"report: {study.folder}/report.html")
