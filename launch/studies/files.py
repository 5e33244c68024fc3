"""Files that are whole or not there, and the lock of a study's folder."""

import fcntl
import json
import os
import socket

from .errors import BAD_INPUT, USAGE, StudyError


def write_text(path, text):
    """Aside, to the disk, then renamed: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path):
    """The object in a file; None when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise StudyError(BAD_INPUT, f"{path} is not whole: {error}; remove it if it is not worth "
                         "keeping") from error
    if not isinstance(value, dict):
        raise StudyError(BAD_INPUT, f"{path} does not hold a JSON object")
    return value


class Lock:
    """One study at a time in a folder. The kernel frees it however the process ends."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise StudyError(USAGE, f"{path.parent}: a study is going on there ({owner}); wait for "
                             "it, or take another --out") from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.truncate(0)
        self.file.close()
