"""The simulator's line beside the measured points: `drover simulate`, calibrated by `drover bench` on one
rank and one pair of this machine, before the study's own runs."""

import dataclasses
import os
import subprocess

from . import files, program
from .errors import StudyError
from .folder import say
from .jobs import LAUNCH

BATCHES = "1,8,64"
# Of the study's options, those that `simulate` takes.
SIZES = ("model", "dataset", "scenario", "samples", "max-new-tokens", "activations", "kv", "kv-memory",
         "max-sequences", "step-tokens", "chunk-tokens", "batching", "groups", "threads", "graphs",
         "page-tokens", "sort", "target-qps", "ttft-ms", "tpot-ms", "gpu-memory-fraction")
STEP = ("model", "activations", "kv", "kv-memory", "backend", "threads", "page-tokens", "graphs")


@dataclasses.dataclass
class Simulated:
    speed: dict  # config -> tokens/s
    words: str   # for the caption: what the line is, or why there is none

    def of(self, point):
        return self.speed.get(point.config)

    def json(self):
        return {"output_tokens_per_second": self.speed, "note": self.words}


class Simulator:
    def __init__(self, args, study):
        self.args, self.study = args, study
        self.folder = study.folder / "calibration"
        self.why_not = self.missing()

    def missing(self):
        if self.args.no_simulate:
            return "it was not asked for"
        if not program.has_subcommand(self.args.program, "simulate"):
            return "this drover has no `simulate`"
        if self.args.submit and not (self.args.calibrate and self.args.topology):
            return ("with --submit it wants files of the machine: --topology (drover topology --detect), "
                    "--calibrate step.json,comm.json (drover bench step and comm --json)")
        return ""

    def options(self, names):
        words = []
        for key in names:
            if key in self.args.common and self.args.common[key] is not True:
                words += [f"--{key}", str(self.args.common[key])]
        return words

    def measure(self, name, ranks, words, how, ending="json"):
        """A file of `drover bench` or `drover topology`, kept beside the runs, so that a study that goes
        on has the same."""
        out = self.folder / f"{name}.{ending}"
        if not out.exists():
            say(f"measuring for the simulator: drover {words[0]} {words[1]}, ranks: {ranks}")
            aside = self.folder / f"{name}.part.{ending}"
            aside.unlink(missing_ok=True)
            command = [str(LAUNCH / "run.sh"), "-np", str(ranks), "--program", self.args.program, "--",
                       *words, how, str(aside)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800,
                                  stdin=subprocess.DEVNULL)
            if done.returncode != 0 or not aside.exists():
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise StudyError(done.returncode, f"drover {words[0]} {words[1]}: {last}")
            os.replace(aside, out)
        return str(out)

    def calibrate(self):
        """Before the runs. What cannot be measured costs the simulator's points, never the study."""
        if self.why_not:
            return
        self.folder.mkdir(exist_ok=True)
        backend = self.options(("backend",))
        try:
            if not self.args.calibrate:
                prompt = program.mean_prompt(self.args.program, self.args.dataset) or 128
                new = min(int(self.args.max_new_tokens), 32)
                self.args.calibrate = ",".join([
                    self.measure("step", 1, ["bench", "step", *self.options(STEP), "--batches", BATCHES,
                                             "--prompt-tokens", str(prompt), "--new-tokens", str(new)],
                                 "--json"),
                    self.measure("comm", 2, ["bench", "comm", "--seconds", "0.2", *backend], "--json")])
            if not self.args.topology:
                self.args.topology = self.measure("host", 1, ["topology", "--detect", *backend], "--file",
                                                  "ini")
        except (StudyError, subprocess.TimeoutExpired) as error:
            self.why_not = f"the calibration failed ({error})"

    def simulate(self, point):
        first = point.first
        out = self.folder / f"{point.config}.json"
        words = self.options(SIZES) + [
            "--topology", self.args.topology, "--gpus", str(point.ranks), "--grid",
            f"{first['tp']},{first['pp']},{first['dp']}", "--calibrate", self.args.calibrate,
            "--queries", str(round(point.mean("samples"))), "--json", str(out)]
        # A synthetic model's answers are as long as the references, each of its own length: the drain at
        # a run's end is made of the longest. Others end where they end: all as long as their mean.
        if not str(self.args.common["model"]).startswith("synthetic:"):
            words += ["--output-tokens",
                      str(max(1, round(point.mean("output_tokens") / point.mean("samples"))))]
        done = program.ask(self.args.program, "simulate", *words)
        if done.returncode != 0:
            raise StudyError(done.returncode, (done.stderr.strip().splitlines() or ["?"])[-1])
        return (files.read_json(out) or {}).get("figures", {}).get("output_tokens_per_second")

    def lines(self, points):
        if self.why_not:
            return Simulated({}, f"No simulator's line: {self.why_not}.")
        self.folder.mkdir(exist_ok=True)
        speed = {}
        try:
            for point in points:
                speed[point.config] = self.simulate(point)
        except (StudyError, subprocess.TimeoutExpired) as error:
            return Simulated({}, f"No simulator's line: drover simulate said: {error}.")
        return Simulated(speed, "Crosses: drover simulate, calibrated on one rank and one pair before "
                         "these runs.")


def largest_miss(points, simulated):
    """How far the simulator is off, in words; empty where there is none."""
    misses = [(abs(simulated.of(p) / p.speed.mean - 1), p) for p in points if simulated.of(p)]
    if not misses:
        return ""
    middle = sorted(m for m, _ in misses)[len(misses) // 2]
    most, where = max(misses, key=lambda m: m[0])
    return (f" It is {100 * middle:.0f} % off in the middle, {100 * most:.0f} % at most "
            f"({where.ranks}: {where.grid}).")
