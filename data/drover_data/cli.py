"""What every tool shares: errors as one line, progress, hashes, atomic text files."""

import hashlib
import json
import os
import sys

from tqdm import tqdm


class DataError(Exception):
    """Bad input: the message says what is wrong, what was expected and what to do."""


EXIT_USAGE = 2
EXIT_BAD_INPUT = 3


def run(main):
    """Runs a tool's main and ends the process with drover's exit codes."""
    try:
        sys.exit(main() or 0)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


class Progress:
    """A bar on a terminal, otherwise a plain line at every tenth of the way."""

    def __init__(self, total, what):
        self.total, self.what, self.seen, self.told = max(total, 1), what, 0, 0
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True)

    def add(self, amount):
        self.seen += amount
        if self.bar:
            self.bar.update(amount)
            return
        tenth = self.seen * 10 // self.total
        if tenth > self.told:
            self.told = tenth
            print(f"{self.what}: {tenth * 10} % of {self.total / 1e6:.1f} MB", file=sys.stderr)

    def close(self):
        if self.bar:
            self.bar.close()


def sha256_bytes(data):
    return hashlib.sha256(data).hexdigest()


def sha256_stream(stream, progress=None):
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
        if progress:
            progress.add(len(block))
    return digest.hexdigest()


def sha256_file(path, progress=None):
    with open(path, "rb") as stream:
        return sha256_stream(stream, progress)


def source_file(path, name=None):
    """One entry of the `source_files` attribute."""
    return {
        "name": name or os.path.basename(path),
        "sha256": sha256_file(path),
        "bytes": os.path.getsize(path),
    }


def check_output(path, force):
    """Results already there are never overwritten without --force."""
    if os.path.exists(path) and not force:
        raise DataError(f"{path} is already there; give --force to replace it, or another --out")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)


def sync_folder(path):
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text_atomically(path, text):
    """A reader sees the old file or the new one, never a part."""
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
    sync_folder(path)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); was it cut off?") from error
