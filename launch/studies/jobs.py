"""One run of drover: what it is, where it lies, how it ended.

A job's folder appears, by one rename, when it is finished, with `outcome.json` in it. Before, the
run works in `NAME.part`; what failed is moved to `failed/`. So whatever is killed and when, a
finished run is there whole and is never repeated, and an unfinished one begins anew.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

from . import files
from .errors import BAD_INPUT, ENVIRONMENT, INVALID, USAGE, StudyError

LAUNCH = pathlib.Path(__file__).resolve().parents[1]
STOP_SECONDS = 20  # that a run has to end in when the study is stopped


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    label: str     # readable, part of the folder's name: "tp1-pp2-dp1"
    ranks: int
    options: dict  # drover run's, without --out
    repeat: int = 1
    tags: dict = dataclasses.field(default_factory=dict)  # what the study knows it by

    @property
    def config(self):
        """Names what is run, the same for each repetition: other options, other name."""
        what = json.dumps([self.ranks, sorted((k, str(v)) for k, v in self.options.items()),
                           identity(self.options.get("model")),
                           identity(self.options.get("dataset"))])
        return f"{self.label}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"

    @property
    def name(self):
        return f"{self.config}-r{self.repeat}"

    def arguments(self, out):
        words = ["run"]
        for key, value in self.options.items():
            if value is not False:
                words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return words + ["--out", str(out), "--force"]


def identity(file):
    """A file by size and time of change; a synthetic name by itself."""
    try:
        status = os.stat(file)
        return [os.path.basename(file), status.st_size, status.st_mtime_ns]
    except (OSError, TypeError):
        return [file]


@dataclasses.dataclass
class Outcome:
    code: int
    message: str = ""   # the first cause, where drover gave one
    seconds: float = 0  # start-up and loading included

    @property
    def fits(self):
        # What a GPU's memory cannot hold is told before anything is allocated, in these words.
        return self.code != USAGE and "--gpu-memory-fraction" not in self.message

    @property
    def complete(self):
        return self.code in (0, INVALID)


def outcome_of(folder):
    found = files.read_json(folder / "outcome.json")
    return Outcome(**{k: found[k] for k in ("code", "message", "seconds")}) if found else None


def whole_result(folder, modes):
    """drover's result.json, if every pass of it came to its end."""
    try:
        result = files.read_json(folder / "result.json")
    except StudyError:
        return None
    if not result or result.get("format") != "drover-result" or result.get("error"):
        return None
    return result if set(modes.split(",")) <= set(result.get("passes", {})) else None


def first_cause(log):
    """What drover said last on its way out."""
    causes = re.findall(r"^(?:drover|run\.sh): (?!with |mpirun )(.+)$", log, re.M)
    return causes[-1] if causes else (log.strip().splitlines() or ["it said nothing"])[-1]


class Runner:
    """Runs jobs on this machine, or in the allocation it is in, through launch/run.sh."""

    def __init__(self, runs, program=None, hostfile=None, minutes=240):
        self.runs, self.program, self.hostfile, self.minutes = runs, program, hostfile, minutes
        self.child = None

    def command(self, job, out):
        words = [str(LAUNCH / "run.sh"), "-np", str(job.ranks)]
        words += ["--program", str(self.program)] if self.program else []
        words += ["--hostfile", str(self.hostfile)] if self.hostfile else []
        return words + ["--"] + job.arguments(out)

    def finished(self, job):
        """The outcome of a job that needs no run any more, or None."""
        folder, part = self.runs / job.name, self.runs / f"{job.name}.part"
        if found := outcome_of(folder):
            return found
        # Killed after drover was done, before its folder was named.
        result = whole_result(part, job.options.get("mode", "performance"))
        if not result:
            return None
        outcome = Outcome(0 if result["valid"] else INVALID, "", result.get("duration_s", 0))
        self.keep(job, outcome)
        return outcome

    def keep(self, job, outcome):
        folder, part = self.runs / job.name, self.runs / f"{job.name}.part"
        part.mkdir(exist_ok=True)
        files.write_json(part / "outcome.json",
                         dataclasses.asdict(outcome) | {"job": dataclasses.asdict(job)})
        os.replace(part, folder)

    def set_aside(self, job, outcome):
        """A run that failed: its logs stay, the next start of the study tries again."""
        failed = self.runs / "failed"
        failed.mkdir(exist_ok=True)
        part = self.runs / f"{job.name}.part"
        files.write_json(part / "outcome.json", dataclasses.asdict(outcome))
        for number in range(1, 1000):
            if not (failed / f"{job.name}-{number}").exists():
                os.replace(part, failed / f"{job.name}-{number}")
                return

    def last_failure(self, job):
        """What the newest failed run of this job said; None where none failed."""
        for number in range(999, 0, -1):
            if outcome := outcome_of(self.runs / "failed" / f"{job.name}-{number}"):
                return f"{outcome.message} (exit code {outcome.code})"
        return None

    def run(self, job):
        part = self.runs / f"{job.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        begin = time.monotonic()
        log = part / "run.log"
        with open(log, "wb") as output:
            code = self.call(self.command(job, part), output)
        outcome = Outcome(code, "", round(time.monotonic() - begin, 3))
        if not outcome.complete:
            outcome.message = first_cause(log.read_text(errors="replace"))
        if outcome.complete and not whole_result(part, job.options.get("mode", "performance")):
            outcome = Outcome(ENVIRONMENT, f"{part}/result.json is missing or not whole; is the "
                              "disk full?", outcome.seconds)
        if outcome.complete or not outcome.fits:
            self.keep(job, outcome)
        else:
            self.set_aside(job, outcome)
        if outcome.code == BAD_INPUT:  # no other run would fare better
            raise StudyError(BAD_INPUT, outcome.message)
        return outcome

    def call(self, command, output):
        """Its exit code. When this process is told to stop, so is the run, and waited for."""
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                      stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return self.child.wait(timeout=60 * self.minutes)
        except subprocess.TimeoutExpired:
            self.end_child()
            raise StudyError(ENVIRONMENT, f"a run took more than {self.minutes} minutes; raise "
                             "--run-minutes, or make it shorter with --samples") from None
        except BaseException:
            self.end_child()
            raise

    def end_child(self):
        # First run.sh alone, which tells its launcher once: srun kills at a second signal.
        for kill, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGKILL)):
            try:
                kill(self.child.pid, number)
                self.child.wait(timeout=STOP_SECONDS)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return
