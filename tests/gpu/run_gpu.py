#!/usr/bin/env python3
"""Runs the GPU tests and benches of a build folder or a bundle and writes gpu.json: machine, commit, and
for each test pass, fail or skip. Started by tests/gpu.sh."""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parents[2]
MPIRUN = ROOT / "tests/mpi/mpirun.sh"
STEP = ["{drover}", "bench", "step", "--backend", "cuda", "--json", "{json}"]
LLAMA = [*STEP, "--model", "synthetic:llama2-70b", "--prompt-tokens", "128", "--new-tokens", "128"]
# name, GPUs (each gets a rank; 0: one, without mpirun), seconds, command.
BENCHES = [
    ("cuda_ops", 0, 180, ["{tests}/cuda_ops_bench", "{json}", "{commit}"]),
    ("hopper_linear", 0, 120, ["{tests}/hopper_linear_bench", "time"]),
    ("step_demo", 1, 120, [*STEP, "--model", "{demo}/smollm2-135m.h5", "--batches", "1,16,64"]),
    ("step_70b", 1, 400, [*LLAMA, "--batches", "1,16,64,256"]),
    ("comm", 2, 60, ["{drover}", "bench", "comm", "--backend", "cuda", "--json", "{json}"]),
    ("step_70b_tp2", 2, 400, [*LLAMA, "--tp", "2", "--batches", "1,16,64,256,512"]),
    ("step_70b_pp2", 2, 400, [*LLAMA, "--pp", "2", "--batches", "1,16,64,256,512"]),
]
E2E_SECONDS = 600
# Programs whose tests are run in several processes at once.
SHARDED = re.compile("^gpu_(linear|cache|rows|argmax|attention)")


class Runner:
    def __init__(self, args):
        self.binaries, self.out, self.commit = args.binaries.resolve(), args.out.resolve(), args.commit
        self.logs = self.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.filter = re.compile(args.filter or ".")
        self.sanitize = args.sanitize
        self.end = time.monotonic() + args.seconds if args.seconds > 0 else None
        self.drover = next((p for p in (self.binaries / "bin/drover", self.binaries / "drover")
                            if p.exists()), self.binaries / "drover")
        self.tests, self.benches = [], {}

    def left(self, wanted):
        """Seconds a program may take; 0 when the time is up."""
        if self.end is None:
            return wanted
        return max(0, min(wanted, self.end - time.monotonic()))

    def start(self, name, command, seconds, env=None):
        """Exit code (None: stopped, or not started for want of time) and its output."""
        limit = self.left(seconds)
        log = self.logs / f"{name}.log"
        if limit < 5:
            return None, "no time left", 0.0
        began = time.monotonic()
        with open(log, "w", encoding="utf-8", errors="replace") as out:
            try:
                p = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out,
                                     stderr=subprocess.STDOUT, start_new_session=True,
                                     env={**os.environ, **(env or {})}, cwd=ROOT)
            except OSError as error:
                return 127, str(error), 0.0
            try:
                code = p.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(p.pid, signal.SIGTERM)
                    time.sleep(2)
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        seconds = time.monotonic() - began
        text = log.read_text(errors="replace")
        print(f"{name}: {'stopped' if code is None else 'good' if code == 0 else f'exit code {code}'} "
              f"after {seconds:.1f} s", flush=True)
        if code != 0:
            print("    " + "\n    ".join(text.splitlines()[-12:]), flush=True)
        return code, text, seconds

    def add(self, program, test, result, seconds=0.0, why=""):
        entry = {"program": program, "test": test, "result": result, "seconds": round(seconds, 3)}
        if why:
            entry["why"] = why[-1500:]
        self.tests.append(entry)

    # --- C++ ---

    def programs(self):
        folder = self.binaries / "tests"
        listed = folder / "programs.txt"
        if not listed.exists():
            self.add("programs", "", "fail", why=f"{listed} is not there: built without CUDA?")
            return
        alone, together = [], []
        for line in listed.read_text().splitlines():
            name, ranks = line.split()
            label = name if ranks == "0" else f"{name}_{ranks}_ranks"
            if not self.filter.search(label):
                continue
            if not (folder / name).exists():
                self.add(label, "", "fail", why="not built")
            elif SHARDED.search(label) and (cores := len(os.sched_getaffinity(0))) > 3:
                # Their time is that of the reference on one core.
                shards = min(8, cores // 2)
                together += [(label, folder / name, 0, (i, shards)) for i in range(shards)]
            else:
                alone.append((label, folder / name, int(ranks)))
        for work in alone:
            self.program(*work)
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)) // 2 or 1) as pool:
            list(pool.map(lambda work: self.program(*work), together))

    def program(self, label, program, ranks, shard=(0, 1)):
        name = label if shard[1] == 1 else f"{label}.{shard[0]}"
        report = self.logs / f"{name}.json"
        command, env = [program], {}
        if self.sanitize:
            label = f"{label} ({self.sanitize})"
            command = ["compute-sanitizer", "--tool", self.sanitize, "--error-exitcode", "99", program]
        if ranks == 0:
            command.append(f"--gtest_output=json:{report}")
            if shard[1] > 1:
                env = {"GTEST_SHARD_INDEX": str(shard[0]), "GTEST_TOTAL_SHARDS": str(shard[1])}
        else:
            command = [MPIRUN, ranks, *command]
        code, text, seconds = self.start(name, command, 300, env)
        if code is None and text == "no time left":
            self.add(label, "", "skip", why=text)
            return
        if ranks == 0 and report.exists():
            self.read_gtest(label, report)
            if code not in (0, 1):
                self.add(label, "(the program)", "fail", seconds, f"exit code {code}\n{text[-800:]}")
            return
        if code is None and self.end is not None and time.monotonic() >= self.end:
            self.add(label, "", "skip", seconds, f"no time left\n{text[-400:]}")
        elif code != 0:
            self.add(label, "", "fail", seconds, f"{'stopped' if code is None else code}\n{text[-1200:]}")
        elif "GPUs are needed" in text or "no GPU here" in text:
            self.add(label, "", "skip", seconds, re.search(".*(GPUs are needed|no GPU here).*", text)[0])
        else:
            self.add(label, "", "pass", seconds)

    def read_gtest(self, label, report):
        for suite in json.loads(report.read_text())["testsuites"]:
            for case in suite["testsuite"]:
                failures = case.get("failures")
                result = "fail" if failures else "skip" if case["result"] == "SKIPPED" else "pass"
                why = "\n".join(f["failure"] for f in failures or [])
                self.add(label, f"{suite['name']}.{case['name']}", result,
                         float(case["time"].rstrip("s")), why)

    # --- pytest ---

    def e2e(self):
        # In the order of what is learned first.
        order = ["bad_input", "goldens", "two_gpus", "failures", "rouge"]
        files = sorted((ROOT / "tests/gpu/e2e").glob("test_*.py"),
                       key=lambda f: next((i for i, o in enumerate(order) if o in f.name), 99))
        for file in files:
            if self.filter.search(file.stem):
                self.pytest(file)

    def pytest(self, file):
        report = self.logs / f"{file.stem}.xml"
        kept = self.logs / "runs"
        code, text, seconds = self.start(
            file.stem, [sys.executable, "-m", "pytest", "-q", "-rsP", "-p", "no:cacheprovider",
                        f"--junitxml={report}", file], E2E_SECONDS,
            env={"DROVER_BIN": str(self.drover), "DROVER_PYTHON": sys.executable,
                 "DROVER_KEEP_RUNS": str(kept)})
        if kept.exists():
            self.keep(kept)
        if not report.exists():
            if text == "no time left":
                self.add(file.stem, "", "skip", why=text)
            else:
                why = "stopped" if code is None else f"exit code {code}"
                self.add(file.stem, "", "fail", seconds, f"{why}\n{text[-1200:]}")
            return
        for case in ET.parse(report).getroot().iter("testcase"):
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skipped = case.find("skipped")
            result = "fail" if bad is not None else "skip" if skipped is not None else "pass"
            why = "" if result == "pass" else (bad if bad is not None else skipped).get("message", "")
            self.add(file.stem, case.get("name"), result, float(case.get("time", 0)), why)
            if result == "pass" and (said := case.findtext("system-out")):
                self.tests[-1]["said"] = said.strip()[-1000:]

    def keep(self, runs):
        """Of whole runs only what tells the answers."""
        for folder in runs.iterdir():
            for name in ("result.json", "accuracy/mlperf_log_accuracy.json"):
                source = folder / name
                if source.exists():
                    target = self.logs / "answers" / folder.name / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
        shutil.rmtree(runs)

    # --- benches ---

    def bench(self, gpus):
        for name, ranks, seconds, command in BENCHES:
            if not self.filter.search(name):
                continue
            if max(ranks, 1) > gpus:
                self.benches[name] = {"result": "skip", "why": f"{ranks} GPUs are needed, here is {gpus}"}
                continue
            file = self.logs / f"bench_{name}.json"
            words = {"drover": self.drover, "tests": self.binaries / "tests", "json": file,
                     "commit": self.commit, "demo": os.environ.get("DROVER_DEMO", ROOT / "build/demo")}
            filled = [str(c).format(**words) for c in command]
            if ranks:
                filled = [MPIRUN, ranks, *filled]
            code, text, took = self.start(f"bench_{name}", filled, seconds)
            entry = {"result": "skip" if text == "no time left" else "pass" if code == 0 else "fail",
                     "seconds": round(took, 1)}
            if file.exists():
                entry["json"] = json.loads(file.read_text())
            else:
                entry["text"] = text[-6000:]
            self.benches[name] = entry


def gpus():
    try:
        said = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap,"
                               "clocks.max.sm,power.limit", "--format=csv,noheader"],
                              capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = ("name", "memory", "driver", "compute_capability", "max_sm_clock", "power_limit")
    return [dict(zip(names, (f.strip() for f in line.split(","))))
            for line in said.stdout.splitlines() if said.returncode == 0 and line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binaries", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--commit", default="", help="default: what drover says of itself")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--filter", default="")
    parser.add_argument("--sanitize", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--only", action="append", default=[])
    args = parser.parse_args()
    runner = Runner(args)
    there = gpus()
    began = time.monotonic()
    version = subprocess.run([runner.drover, "--version"], capture_output=True, text=True, check=False) \
        if runner.drover.exists() else None
    if not runner.commit:
        found = re.search(r"^commit +(\S+)", version.stdout, re.M) if version else None
        runner.commit = found[1] if found else "unknown"
    summary = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
               "commit": runner.commit, "gpus": there, "cores": len(os.sched_getaffinity(0))}
    summary["drover"] = version.stdout.splitlines() if version else "not there"
    if version and version.returncode != 0:
        runner.add("drover", "--version", "fail", why=version.stderr)

    def write():
        results = collections.Counter(t["result"] for t in runner.tests)
        failed = results["fail"] + sum(b["result"] == "fail" for b in runner.benches.values())
        summary.update(seconds=round(time.monotonic() - began, 1), counts=dict(results),
                       tests=runner.tests, benches=runner.benches)
        (runner.out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
        return failed

    # Written after each part: what comes later may be cut off.
    if "tests" in args.only:
        runner.programs()
        write()
    if "e2e" in args.only:
        runner.e2e()
        write()
    if "bench" in args.only:
        runner.bench(len(there))
    failed = write()
    for t in runner.tests:
        if t["result"] == "fail":
            print(f"FAILED {t['program']} {t['test']}")
    print(", ".join(f"{n} {r}" for r, n in sorted(summary["counts"].items())) or "no tests",
          f"-> {runner.out / 'gpu.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
