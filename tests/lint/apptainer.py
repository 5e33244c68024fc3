#!/usr/bin/env python3
"""apptainer.py DEFINITION: what can be known of an Apptainer definition without Apptainer: its header
and sections, that the files it copies are there, that its scripts are shell and clean. Nothing is
built here, and this says so. Ends with 1 and a line for each finding; `--self-test` first.
"""

import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Apptainer's user guide, "definition files".
SECTIONS = {"setup", "files", "app", "environment", "post", "runscript", "startscript", "test",
            "labels", "help", "arguments"}
SCRIPTS = {"setup", "post", "environment", "runscript", "startscript", "test"}
NEEDED = {"post", "runscript", "test"}
HEADER_KEYS = {"bootstrap", "from", "stage", "includecmd", "mirrorurl", "osversion", "include",
               "fingerprints", "library", "registry", "namespace"}
ARGUMENT = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def split(text):
    """(header lines, section -> its lines), and what is wrong with the sections themselves."""
    header, sections, current, findings = [], {}, None, []
    for line in text.splitlines():
        head = re.match(r"%(\w+)(.*)$", line)
        if head:
            current = head[1].lower()
            if current not in SECTIONS:
                findings.append(f"unknown section %{head[1]}")
            if current in sections:
                findings.append(f"section %{current} twice")
            sections[current] = []
        elif current is None:
            header.append(line)
        else:
            sections[current].append(line)
    return header, sections, findings


def check_header(header):
    keys = {}
    for line in header:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = line.partition(":")
        if not colon or key.strip().lower() not in HEADER_KEYS:
            yield f"the header has '{line.strip()}'"
        keys[key.strip().lower()] = value.strip()
    for key in ("bootstrap", "from"):
        if not keys.get(key):
            yield f"the header lacks {key.capitalize()}"


def check_files(sections, root):
    """Sources without an argument of the build in them must be there, absolute targets."""
    declared = {line.partition("=")[0].strip() for line in sections.get("arguments", []) if "=" in line}
    used = set(ARGUMENT.findall("\n".join(line for lines in sections.values() for line in lines)))
    for name in sorted(used - declared):
        yield f"{{{{ {name} }}}} is used, but not in %arguments"
    for name in sorted(declared - used):
        yield f"%arguments has {name}, which nothing uses"
    for line in sections.get("files", []):
        words = ARGUMENT.sub("ARGUMENT", line.strip()).split()
        if not words or words[0].startswith("#"):
            continue
        if "ARGUMENT" not in words[0] and not list(root.glob(words[0])):
            yield f"%files copies {words[0]}, which is not there"
        if len(words) != 2 or not words[1].startswith("/"):
            yield f"%files: '{line.strip()}': expected a source and an absolute target"


def check_script(name, lines):
    script = "#!/bin/sh\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n"
    said = subprocess.run(["bash", "--posix", "-n"], input=script, capture_output=True, text=True,
                          check=False)
    if said.returncode != 0:
        yield f"%{name}: {said.stderr.strip()}"
    if shutil.which("shellcheck"):
        # %environment is sourced: what it exports is for others.
        said = subprocess.run(["shellcheck", "--shell=sh", "--exclude=SC2034", "-f", "gcc", "-"],
                              input=script, capture_output=True, text=True, check=False)
        for line in said.stdout.splitlines():
            yield f"%{name}: {line}"


def check(text, root):
    header, sections, findings = split(text)
    yield from findings
    yield from check_header(header)
    for name in sorted(NEEDED - sections.keys()):
        yield f"there is no %{name}"
    yield from check_files(sections, root)
    for name in sorted(SCRIPTS & sections.keys()):
        if not any(line.strip() and not line.strip().startswith("#") for line in sections[name]):
            yield f"%{name} is empty"
        yield from check_script(name, sections[name])
    test = "\n".join(sections.get("test", []))
    if "set -e" not in test:
        yield "%test goes on after a failure: it wants set -e"


GOOD = """Bootstrap: docker
From: debian:bookworm-slim
%files
    README.md /README.md
%post
    true
%runscript
    exec true "$@"
%test
    set -e
    true
"""


def self_test():
    offences = {
        "no %test": GOOD.split("%test", maxsplit=1)[0],
        "a section of another name": GOOD + "%tset\n    true\n",
        "a file that is not there": GOOD.replace("README.md /", "NOTES.md /"),
        "a relative target": GOOD.replace("/README.md", "README.md"),
        "a script that is none": GOOD.replace("    true\n%run", "    if true; then\n%run"),
        "no From": GOOD.replace("From: debian:bookworm-slim\n", ""),
        "an argument that nobody declares": GOOD.replace("README.md /", "{{ file }} /"),
        "a test that goes on": GOOD.replace("    set -e\n", ""),
        "a word in the header": "hello\n" + GOOD,
    }
    missed = [name for name, text in offences.items() if not list(check(text, ROOT))]
    wronged = list(check(GOOD, ROOT))
    for line in [f"not found: {name}" for name in missed] + wronged:
        print(f"self-test: {line}")
    return not missed and not wronged


def main(arguments):
    if "--self-test" in arguments and not self_test():
        return 1
    file = ROOT / next(a for a in arguments if not a.startswith("-"))
    findings = list(check(file.read_text(encoding="utf-8"), ROOT))
    for line in findings:
        print(f"{file.relative_to(ROOT)}: {line}")
    if not findings:
        print(f"{file.relative_to(ROOT)}: nothing to complain of; looked at, not built "
              f"(Apptainer is {'not used by this test' if shutil.which('apptainer') else 'not here'})")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
