"""One kind of error, with drover's exit codes."""

import errno
import sys

USAGE, BAD_INPUT, ENVIRONMENT, INVALID, LOST_PEER = 2, 3, 4, 5, 6


class StudyError(Exception):
    """The message says what is wrong, what was expected and what to do."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def run(main):
    """Runs a study's main and ends the process with drover's exit codes."""
    try:
        sys.exit(main() or 0)
    except StudyError as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "; free some space: finished runs are kept, the same command goes on"
        print(f"study.py: {error}{hint}", file=sys.stderr)
        sys.exit(ENVIRONMENT)
    except KeyboardInterrupt:
        print("study.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
