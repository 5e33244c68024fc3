#!/usr/bin/env python3
"""Studies of drover: runs it many times, goes on where it was stopped, and shows what came of it."""

import argparse
import shlex
import sys

from studies import actions, batch, errors, folder, program, qps, scaling
from studies.errors import USAGE, StudyError

STUDIES = {"scaling": scaling, "actions": actions, "batch": batch, "qps": qps}


def common_arguments(parser):
    parser.add_argument("--model", required=True, help="model store, or synthetic:NAME")
    parser.add_argument("--dataset", required=True, help="dataset, or synthetic:openorca[:n]")
    parser.add_argument("--out", required=True, help="the study's folder; the same command goes on "
                        "where it was stopped")
    parser.add_argument("--scenario", default="offline", choices=("offline", "server",
                        "interactive", "singlestream"))
    parser.add_argument("--samples", type=int, default=0, help="the first so many (0: all)")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--mlperf-length", action="store_true", help="runs as long as MLPerf wants; "
                        "otherwise drover's --demo: the samples once")
    parser.add_argument("--program", help="the drover to study (default: this tree's)")
    parser.add_argument("--hostfile", help="Open MPI's, for launch/run.sh")
    parser.add_argument("--submit", action="store_true", help="submit each run to Slurm instead of "
                        "running it; the same command later gathers")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="an option "
                        "for sbatch, such as --sbatch=--time=1:00:00; may be repeated")
    parser.add_argument("--run-minutes", type=float, default=240, help="longest time of one run")
    parser.add_argument("drover", nargs="*", metavar="-- OPTIONS", help="drover's own options, for "
                        "every run")


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="study", required=True)
    for name, study in STUDIES.items():
        one = kinds.add_parser(name, help=study.HELP, description=study.HELP)
        common_arguments(one)
        study.add_arguments(one)
    batch_job = kinds.add_parser("job", help="one run of a study (what its batch jobs call)")
    batch_job.add_argument("folder")
    batch_job.add_argument("name")
    if "--" in words:
        cut = words.index("--")
        args = parser.parse_args(words[:cut])
        args.drover = words[cut + 1:]
    else:
        args = parser.parse_args(words)
    return args


def options_of(args):
    """drover's options that all runs of the study share."""
    options = {"model": args.model, "dataset": args.dataset, "scenario": args.scenario,
               "mode": "performance", "max-new-tokens": args.max_new_tokens, "progress": "no"}
    if args.samples:
        options["samples"] = args.samples
    if not args.mlperf_length:
        options["demo"] = True
    words = list(args.drover)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise StudyError(USAGE, f"{word!r} behind --: expected drover's options, such as "
                             "--kv bf16")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else True
        if key in ("out", "force", "tp", "pp", "dp", "mode"):
            raise StudyError(USAGE, f"--{key} is the study's own business; leave it out behind --")
        options[key] = value
    return options


def main():
    args = parse(sys.argv[1:])
    if args.study == "job":
        return folder.run_one(args.folder, args.name)
    if args.repeat < 1:
        raise StudyError(USAGE, f"--repeat {args.repeat}: at least 1")
    args.command_line = shlex.join(["launch/study.py", *sys.argv[1:]])
    args.program = program.find(args.program)
    args.shape = program.check_inputs(args.program, args.model, args.dataset)
    args.common = options_of(args)
    return STUDIES[args.study].main(args)


if __name__ == "__main__":
    errors.run(main)
