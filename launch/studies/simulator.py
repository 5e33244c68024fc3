"""The simulator's line beside the measured points, where the program has a simulator."""

import dataclasses

from . import program


@dataclasses.dataclass
class Simulated:
    points: list  # [(ranks, tokens/s)]
    words: str    # for the caption: what the line is, or why there is none

    def json(self):
        return {"points": self.points, "note": self.words}


def lines(args, points):
    del points
    if not program.has_subcommand(args.program, "simulate"):
        return Simulated([], "No simulator's line: this drover has no `simulate`.")
    return Simulated([], "No simulator's line: not calibrated for this machine.")
