"""What the studied program and this machine say of themselves."""

import os
import pathlib
import re
import subprocess

from .errors import BAD_INPUT, ENVIRONMENT, USAGE, StudyError
from .jobs import LAUNCH


def find(named):
    """The drover that launch/run.sh would take, or the one that was named."""
    root = LAUNCH.parent
    build = pathlib.Path(os.environ.get("DROVER_BUILD_DIR", root / "build"))
    places = [named or os.environ.get("DROVER_BIN")] if named or os.environ.get("DROVER_BIN") else \
        [build / "release/drover", root.parent.parent / "bin/drover"]
    for place in places:
        if os.access(place, os.X_OK):
            return str(pathlib.Path(place).resolve())
    raise StudyError(ENVIRONMENT, f"no drover at {places[0]}: build it (cmake --preset release && "
                     "ninja -C build/release) or name one with --program")


def ask(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False,
                          timeout=300, stdin=subprocess.DEVNULL)


def check_inputs(program, model, dataset):
    """Told at once rather than by the first run."""
    for what, file in (("--model", model), ("--dataset", dataset)):
        if file and not file.startswith("synthetic:") and not os.access(file, os.R_OK):
            raise StudyError(BAD_INPUT, f"{what} {file}: there is no such file, or it cannot be read")
    return shape(program, model)


def check_16bit(program, file, model):
    """--model-16bit is a store of 16 bits, of the same sizes as --model."""
    if not os.access(file, os.R_OK):
        raise StudyError(BAD_INPUT, f"--model-16bit {file}: there is no such file, or it cannot be read")
    told = ask(program, "inspect", file, "--no-verify")
    weights = re.search(r"^weights\s+(\S+)", told.stdout, re.M)
    if told.returncode != 0 or not weights:
        raise StudyError(BAD_INPUT, f"--model-16bit {file}: {told.stderr.strip().removeprefix('drover: ')}")
    if weights[1].rstrip(",") not in ("f16", "bf16"):
        raise StudyError(USAGE, f"--model-16bit {file} has {weights[1]} weights, not 16 bits: import the "
                         "unquantized checkpoint (data/import_hf.py)")
    ours = shape(program, model)
    if ours and (theirs := shape(program, file)) != ours:
        raise StudyError(USAGE, f"--model-16bit {file} is another model: {theirs} where --model has {ours}")


def shape(program, model):
    """{"heads": (…), "layers": n} of a model store; empty where only a run can tell."""
    if model.startswith("synthetic:"):
        return {}
    told = ask(program, "inspect", model, "--no-verify")
    if told.returncode != 0:
        raise StudyError(BAD_INPUT, told.stderr.strip().removeprefix("drover: ") or
                         f"{model} cannot be read")
    found = re.search(r"(\d+) layers, .*?(\d+) heads \((\d+) KV\)", told.stdout)
    return {"heads": (int(found[2]), int(found[3])), "layers": int(found[1])} if found else {}


def sample_count(program, dataset):
    """Samples of a dataset; None where only a run can tell."""
    if dataset.startswith("synthetic:"):
        last = dataset.split(":")[-1]
        return int(last) if last.isdigit() else None
    told = ask(program, "inspect", dataset, "--no-verify")
    found = re.search(r"^samples\s+(\d+)", told.stdout, re.M)
    return int(found[1]) if found else None


def mean_prompt(program, dataset):
    """Tokens of a prompt of the dataset, on average; None where only a run can tell."""
    if found := re.fullmatch(r"synthetic:(\d+)x\d+(?::\d+)?", dataset):
        return int(found[1])
    if dataset.startswith("synthetic:"):
        return None
    found = re.search(r"^prompts .*mean ([\d.]+)", ask(program, "inspect", dataset,
                                                       "--no-verify").stdout, re.M)
    return round(float(found[1])) if found else None


def cores():
    """As launch/mpi_env.sh counts them: the affinity, less where a container's quota is smaller."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def has_subcommand(program, name):
    return ask(program, name, "--help").returncode == 0
