"""A study's folder: which of its jobs are finished, and how the others get run.

    OUT/study.json    the study's command and its jobs, for whoever runs them
    OUT/runs/NAME/    one finished run each: drover's results, run.log, outcome.json
    OUT/runs/failed/  runs that failed, with their logs
"""

import dataclasses
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from . import files
from .errors import ENVIRONMENT, INVALID, USAGE, StudyError
from .jobs import LAUNCH, Job, Runner, identity

FAILURES_IN_A_ROW = 3
GPU_RANK_CORES = 4  # LoadGen, the leader, a worker and the watchdog, as slurm/common.sh asks for


class Study:
    """Holds the folder's lock from `with` to its end."""

    def __init__(self, args, command):
        self.folder = pathlib.Path(args.out)
        self.args, self.command = args, command
        try:
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(ENVIRONMENT, f"--out {args.out}: {error.strerror}") from error
        self.runner = Runner(self.folder.resolve() / "runs", args.program, args.hostfile,
                             args.run_minutes)

    def __enter__(self):
        self.lock = files.Lock(self.folder / ".lock")
        take_stops()
        return self

    def __exit__(self, *exception):
        self.lock.__exit__(*exception)

    def write_state(self, jobs):
        known = {}
        old = files.read_json(self.folder / "study.json") or {}
        for job in jobs:
            known[job.name] = dataclasses.asdict(job)
        files.write_json(self.folder / "study.json", {
            "format": "drover-study", "format_version": 1, "command": self.command,
            "program": self.args.program, "hostfile": self.args.hostfile,
            "run_minutes": self.args.run_minutes, "jobs": known,
            "submitted": old.get("submitted", {})})

    def outcomes(self, jobs):
        """{job: outcome} of those that need no run any more. One that does not fit speaks for its
        repetitions."""
        found, misfits = {}, {}
        for job in jobs:
            if outcome := self.runner.finished(job):
                found[job] = outcome
                if not outcome.fits:
                    misfits[job.config] = outcome
        return found | {job: misfits[job.config] for job in jobs if job.config in misfits}

    def finish(self, jobs):
        """Runs or submits what is left. {job: outcome}; with --submit maybe not all."""
        self.write_state(jobs)
        done = self.outcomes(jobs)
        left = [job for job in jobs if job not in done]
        if done:
            say(f"{len(done)} of {len(jobs)} runs are there already")
        if not left:
            return done
        if self.args.submit:
            self.submit(left)
            return done
        return self.run_here(jobs, left)

    def run_here(self, jobs, left):
        spent, failures, done = [], 0, self.outcomes(jobs)
        for job in left:
            done = self.outcomes(jobs)
            if job in done:
                continue
            to_do = sum(other not in done for other in left)
            ahead = f", about {duration(to_do * sum(spent) / len(spent))} left" if spent else ""
            say(f"{len(jobs) - to_do + 1}/{len(jobs)} {job.name}{ahead}")
            outcome = self.runner.run(job)
            spent.append(outcome.seconds)
            if outcome.code == INVALID:
                say("  LoadGen calls it INVALID: kept, and marked")
            elif not outcome.fits:
                say(f"  does not fit: {outcome.message}")
            failed = outcome.fits and not outcome.complete
            failures = failures + 1 if failed else 0
            if failed:
                say(f"  failed with exit code {outcome.code}: {outcome.message}")
            if failures == FAILURES_IN_A_ROW:
                raise StudyError(outcome.code, f"{failures} runs in a row failed, the last one with:"
                                 f" {outcome.message}; its log is in {self.folder}/runs/failed. "
                                 "Finished runs are kept; the same command goes on")
        return self.outcomes(jobs)

    # Through Slurm: one batch job for each run, which calls this program for one job.

    def submit(self, left):
        if not shutil.which("sbatch"):
            raise StudyError(ENVIRONMENT, "--submit: there is no Slurm here (sbatch is not in PATH); "
                             "run it where there is, or without --submit")
        state = files.read_json(self.folder / "study.json")
        waiting = {name: number for name, number in state["submitted"].items()
                   if in_queue(number)}
        scripts = self.folder / "scripts"
        scripts.mkdir(exist_ok=True)
        new = 0
        for job in left:
            if job.name in waiting:
                continue
            if cause := self.runner.last_failure(job):
                say(f"{job.name} failed before: {cause}")
            script = scripts / f"{job.name}.sh"
            files.write_text(script, self.script(job))
            done = subprocess.run(["sbatch", "--parsable", *self.args.sbatch, str(script)],
                                  capture_output=True, text=True, check=False, timeout=120)
            if done.returncode != 0:
                raise StudyError(ENVIRONMENT, f"sbatch refused {script}: {done.stderr.strip()}")
            waiting[job.name] = done.stdout.strip().split(";")[0]
            state["submitted"] = waiting
            files.write_json(self.folder / "study.json", state)  # never submitted twice
            new += 1
        say(f"{new} jobs submitted, {len(left) - new} were in the queue; when they are done, the "
            "same command gathers them")

    def script(self, job):
        out = self.folder.resolve()
        gpu = job.options.get("backend") == "cuda"
        cores = GPU_RANK_CORES if gpu else int(job.options.get("threads", 0)) or 1
        return "\n".join([
            "#!/bin/bash", f"#SBATCH --job-name=drover-{job.label}", f"#SBATCH --ntasks={job.ranks}",
            f"#SBATCH --cpus-per-task={cores}", *([f"#SBATCH --gpus={job.ranks}"] if gpu else []),
            # Before the time limit: drover's ranks still write down why they ended.
            "#SBATCH --signal=B:TERM@60", f"#SBATCH --output={out}/scripts/%j.log",
            "# srun does not take it from sbatch by itself.",
            'export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}',
            "# The study's folder knows the rest.",
            f"exec {quoted(sys.executable)} {quoted(LAUNCH / 'study.py')} job {quoted(out)} "
            f"{quoted(job.name)}", ""])


def take_stops():
    """A stop ends the run that is on, then this process."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))


def run_one(folder, name):
    """What a batch job does: one job of a study. No lock: each job has a folder of its own."""
    state = files.read_json(pathlib.Path(folder) / "study.json")
    if not state or name not in state.get("jobs", {}):
        raise StudyError(USAGE, f"{folder} knows no job {name}")
    job = Job(**state["jobs"][name])
    runner = Runner(pathlib.Path(folder).resolve() / "runs", state["program"], state["hostfile"],
                    state["run_minutes"])
    take_stops()
    outcome = runner.finished(job) or runner.run(job)
    if outcome.message:
        say(outcome.message)
    return outcome.code


def in_queue(number):
    found = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True,
                           text=True, check=False, timeout=60)
    if found.returncode != 0 and "Invalid job id" not in found.stderr:
        raise StudyError(ENVIRONMENT, "squeue does not say whether jobs are still waiting, and none is "
                         f"to be submitted twice: {found.stderr.strip()}")
    return found.returncode == 0 and bool(found.stdout.strip())


def quoted(path):
    return "'" + str(path).replace("'", "'\\''") + "'"


def say(text):
    print(f"study: {text}", file=sys.stderr, flush=True)


def duration(seconds):
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def today():
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


__all__ = ["Study", "duration", "identity", "run_one", "say", "today"]
