"""Tensor × pipeline × data parallel grids for so many ranks."""

import dataclasses
import re

from .errors import USAGE, StudyError

MOST_OF_AUTO = 4


@dataclasses.dataclass(frozen=True)
class Grid:
    tp: int
    pp: int
    dp: int

    @property
    def ranks(self):
        return self.tp * self.pp * self.dp

    @property
    def label(self):
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}"

    def __str__(self):
        parts = [f"{name} {size}" for name, size in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp))
                 if size > 1]
        return " × ".join(parts) or "one rank"


def all_of(ranks, heads=None, layers=None):
    """Every grid of so many ranks; `heads` and `layers` of the model leave out what cannot fit."""
    out = []
    for tp in (t for t in range(1, ranks + 1) if ranks % t == 0):
        if heads and any(h % tp for h in heads):
            continue
        for pp in (p for p in range(1, ranks // tp + 1) if ranks // tp % p == 0):
            if not layers or pp <= layers:
                out.append(Grid(tp, pp, ranks // tp // pp))
    return out


def auto_of(ranks, heads=None, layers=None):
    """The purest ones: replicas alone, stages alone, tensor slots alone, or the most of these with
    stages or replicas for the rest."""
    every = all_of(ranks, heads, layers)
    widest = max(g.tp for g in every)
    wanted = [Grid(1, 1, ranks), Grid(1, ranks, 1), Grid(widest, ranks // widest, 1),
              Grid(widest, 1, ranks // widest)]
    chosen = [g for i, g in enumerate(wanted) if g in every and g not in wanted[:i]]
    return chosen[:MOST_OF_AUTO]


def parse(text):
    found = re.fullmatch(r"(?:tp(\d+))?[-x,]?(?:pp(\d+))?[-x,]?(?:dp(\d+))?", text)
    sizes = [int(size or 1) for size in found.groups()] if found and text else [0]
    if min(sizes) < 1:
        raise StudyError(USAGE, f"--grids {text}: expected auto, all, or grids such as "
                         "tp2pp1dp1 with commas between")
    return Grid(*sizes)


def choose(text, ranks, heads=None, layers=None):
    """The grids of a --grids argument for each number of ranks."""
    if text in ("auto", "all"):
        pick = auto_of if text == "auto" else all_of
        return [grid for n in ranks for grid in pick(n, heads, layers)]
    asked = [parse(word) for word in text.split(",")]
    for grid in asked:
        if grid.ranks not in ranks:
            raise StudyError(USAGE, f"--grids {grid.label} has {grid.ranks} ranks, which --ranks "
                             f"{','.join(map(str, ranks))} does not name")
    without = [n for n in ranks if n not in {g.ranks for g in asked}]
    if without:
        raise StudyError(USAGE, f"--grids names no grid of {without[0]} ranks, which --ranks asks "
                         "for")
    return asked
