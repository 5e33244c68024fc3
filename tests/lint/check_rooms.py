#!/usr/bin/env python3
"""Holds the sources to the rooms: who may include whom, which room has which library, file sizes.

Without arguments checks this repository; ends with 1 and a line for each finding. `--self-test`
first checks that every rule finds what it should.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIDDLE = {"store", "model", "comm", "backend", "sched", "machine"}
# Room -> rooms it may include beside itself.
MAY_INCLUDE = {
    "base": set(),
    **{room: {"base"} for room in MIDDLE},
    "model": {"base", "store"},
    "engine": {"base"} | MIDDLE,
    "plan": {"base", "model", "comm", "sched"},
    "serve": {"base", "engine"} | MIDDLE,
    "main": {"base", "engine", "plan", "serve"} | MIDDLE,
}
# Header of an outside library -> the only place, or places, that include it.
LIBRARY_HOMES = [
    (r"H5\w*\.h|hdf5\w*\.h", "store"),
    (r"mpi\.h", "comm"),
    (r"(oneapi/dnnl/.*|dnnl.*\.h(pp)?|cblas\.h|omp\.h)", "backend"),
    (r"boost/.*", "base"),
    (r"nlohmann/.*", "base"),
    (r"spdlog/.*", "base"),
    (r"openssl/.*", "base"),
    (r"hwloc(/.*|\.h)|nvml\.h", "machine"),
    (r"nvtx3/.*", "base"),
    (r"(cupti|cublas)\w*\.h", "backend"),
    (r"cuda\w*\.h", ("backend", "comm")),
    (r"nccl\w*\.h", "comm"),
    (r"(loadgen|query_sample\w*|system_under_test|test_settings|query_dispatch_library)\.h", "serve"),
]
# Header -> the only folders of src that include it.
LIBRARY_FOLDERS = [
    (r"nccl\.h", ("comm/nccl",)),
    (r"cuda_runtime(_api)?\.h", ("backend/cuda", "comm/gpu", "comm/nccl")),
]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# Folders of one machine have no place in the sources ([/] keeps this file from finding itself).
MACHINE_PATH = re.compile(r"(?<![\w.}$/*-])[/](?:root|home|work|Users|mnt|scratch)[/]\w")
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b")
TEXT = {".cc", ".h", ".cu", ".cuh", ".py", ".sh", ".cmake", ".txt", ".md", ".json", ".ini", ".in"}
CODE = {".cc", ".h", ".cu", ".cuh", ".py", ".sh", ".cmake"}
MOST_LINES = 600
MOST_BYTES = 1 << 20


def room_of(path):
    """src/engine/x.h -> engine; src/main.cc -> main; elsewhere None."""
    parts = path.parts
    if parts[0] != "src":
        return None
    return parts[1] if len(parts) > 2 else "main"


def check_includes(path, text):
    room = room_of(path)
    if room is None:
        return
    if room not in MAY_INCLUDE:
        yield f"{path}: src/{room} is not a room of the design"
        return
    for name in INCLUDE.findall(text):
        first = name.split("/")[0]
        if first in MAY_INCLUDE and "/" in name and first not in MAY_INCLUDE[room] | {room}:
            yield f"{path}: {room} may not include {name}"
        for pattern, home in LIBRARY_HOMES:
            homes = (home,) if isinstance(home, str) else home
            if re.fullmatch(pattern, name) and room not in homes:
                yield f"{path}: {name} is included in {' and '.join(homes)} only"
        for pattern, folders in LIBRARY_FOLDERS:
            if re.fullmatch(pattern, name) and str(path.parent.relative_to("src")) not in folders:
                yield f"{path}: {name} is included in {' and '.join(folders)} only"


def check_text(path, text):
    if path.suffix in CODE and (lines := text.count("\n")) > MOST_LINES:
        yield f"{path}: {lines} lines, at most {MOST_LINES}"
    for number, line in enumerate(text.splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{path}:{number}: unfinished work: {line.strip()[:80]}"
        if MACHINE_PATH.search(line):
            yield f"{path}:{number}: a folder of one machine: {line.strip()[:80]}"


def check(root, files):
    for file in files:
        path = pathlib.PurePosixPath(file)
        full = root / file
        if not full.is_file():
            continue  # removed, not yet committed
        if full.stat().st_size > MOST_BYTES:
            yield f"{path}: over 1 MiB"
        if path.suffix in TEXT or path.name in {".clang-tidy", "run"}:
            text = full.read_text(encoding="utf-8", errors="replace")
            yield from check_includes(path, text)
            yield from check_text(path, text)


def repository_files():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True,
                            check=False)
    if listed.returncode == 0:
        return listed.stdout.splitlines()
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")
            if p.is_file() and not {"build", ".git"} & set(p.relative_to(ROOT).parts)]


def self_test():
    """Each offence must be found, and the innocent file must not."""
    offences = {
        "src/base/a.h": '#include "comm/comm.h"\n',
        "src/sched/a.cc": '#include "model/shard.h"\n',
        "src/store/a.cc": '#include "engine/decoder.h"\n',
        "src/engine/a.cc": "#include <mpi.h>\n",
        "src/sched/b.cc": "#include <cuda_runtime.h>\n",
        "src/backend/a.cc": "#include <nccl.h>\n",
        "src/model/a.cc": "#include <hdf5.h>\n",
        "src/base/b.cc": "#include <hwloc.h>\n",
        "src/machine/a.cc": '#include "comm/world.h"\n',
        "src/engine/b.cc": "#include <test_settings.h>\n",
        "src/comm/b.cc": "#include <nlohmann/json.hpp>\n",
        "src/comm/c.cc": "#include <nccl.h>\n",
        "src/engine/c.cc": "#include <cuda_runtime_api.h>\n",
        "src/backend/cuda/a.cc": "#include <nccl.h>\n",
        "src/cellar/a.cc": "int x;\n",
        "src/plan/a.cc": '#include "engine/decoder.h"\n',
        "src/engine/d.cc": '#include "plan/topology.h"\n',
        "src/base/long.cc": "\n" * (MOST_LINES + 1),
        "src/base/later.cc": "// TO" + "DO: later\n",
        "launch/a.sh": "cd /" + "home/someone\n",
    }
    innocent = {
        "src/model/good.cc": '#include "store/store.h"\n#include "base/error.h"\n#include <vector>\n',
        "src/serve/good.cc": '#include <loadgen.h>\n#include "sched/step.h"\n',
        "src/store/good.cc": "#include <hdf5.h>\n",
        "src/plan/good.cc": '#include "comm/grid.h"\n#include "sched/scheduler.h"\n',
        "src/comm/gpu/good.cc": "#include <cuda_runtime_api.h>\n",
        "src/comm/nccl/good.cc": "#include <cuda_runtime_api.h>\n#include <nccl.h>\n",
        "src/backend/cuda/good.cc": "#include <cuda_runtime_api.h>\n",
        "src/main.cc": '#include "serve/session.h"\n#include "comm/world.h"\n',
    }
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, text in (offences | innocent).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        missed = [n for n in offences if not list(check(root, [n]))]
        wronged = [line for n in innocent for line in check(root, [n])]
    return [f"self-test: nothing found in {n}" for n in missed] + \
           [f"self-test: wrongly found: {line}" for line in wronged]


def main():
    findings = self_test() if "--self-test" in sys.argv else []
    findings += check(ROOT, repository_files())
    print("\n".join(findings) or "rooms: nothing to complain of")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
