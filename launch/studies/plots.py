"""The figures, as SVG for the page and PNG beside it. One look for all."""

import io

from .errors import ENVIRONMENT, StudyError

INK, QUIET, GRID, PAPER = "#1f2933", "#6b7785", "#e4e8ec", "#ffffff"
# Distinct also for colour-blind eyes; one grid keeps its colour in all figures.
SERIES = ["#2463a6", "#e07b39", "#2a9d74", "#8a5fbf", "#c9433e", "#5f9ed1", "#a67c1a", "#6b7785"]
PARTS = {"compute": "#2463a6", "communication": "#e07b39", "bubble": "#c7ced6", "host": "#8a5fbf",
         "device": "#2463a6"}
PART_NAMES = {"compute": "compute", "communication": "communication",
              "bubble": "bubble (waiting for a stage or a plan)", "host": "host",
              "device": "GPU (its queue not empty)"}
SNUG = {"bbox_inches": "tight", "pad_inches": 0.12}
PHASES = {"ramp": "#f2c14e", "steady": "#2a9d74", "drain": "#9db4c0"}


def library():
    try:
        import matplotlib
    except ImportError as error:
        raise StudyError(ENVIRONMENT, "matplotlib is missing: run launch/setup.sh and start the "
                         "study with build/venv/bin/python") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({
        "font.family": ["DejaVu Sans"], "font.size": 10.5, "axes.edgecolor": GRID,
        "axes.labelcolor": QUIET, "axes.titlesize": 12, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlepad": 12,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "text.color": INK,
        "xtick.color": QUIET, "ytick.color": QUIET, "xtick.major.size": 0, "ytick.major.size": 0,
        "legend.frameon": False, "legend.fontsize": 9.5, "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER, "svg.fonttype": "path", "svg.hashsalt": "drover",
        "lines.linewidth": 2, "lines.markersize": 6})
    return pyplot


class Gallery:
    """Draws figures and keeps them: name -> SVG text; PNG files beside the report."""

    def __init__(self, folder):
        self.pyplot = library()
        self.folder, self.svg = folder, {}
        folder.mkdir(exist_ok=True)

    def figure(self, name, width=6.2, height=3.7, columns=1, rows=1, **options):
        figure, axes = self.pyplot.subplots(rows, columns, figsize=(width, height), **options)
        figure.name = name
        return figure, axes

    def keep(self, figure):
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, **SNUG)
        svg = text.getvalue()
        self.svg[figure.name] = svg[svg.index("<svg"):]
        aside = self.folder / f".{figure.name}.tmp.png"
        figure.savefig(aside, format="png", dpi=150, **SNUG)
        aside.replace(self.folder / f"{figure.name}.png")
        self.pyplot.close(figure)


def rank_axis(axes, ranks, unit="ranks"):
    if max(ranks) >= 8 * min(ranks):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(sorted(set(ranks)), [str(n) for n in sorted(set(ranks))])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(unit)


def thousands(axes):
    from matplotlib.ticker import FuncFormatter
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 10 or v == 0
                                                 else f"{v:g}"))


def points(axes, x, figures, colour, label=None, line=False, marker="o", aside=0):
    """Means with bars from the lowest to the highest of the repeated runs. `aside`: steps to the
    right or left, so that series do not hide each other."""
    x = [n * (1 + 0.018 * aside) for n in x]
    ys = [f.mean for f in figures]
    below = [f.mean - f.low for f in figures]
    above = [f.high - f.mean for f in figures]
    axes.errorbar(x, ys, yerr=[below, above], fmt=marker + ("-" if line else ""), color=colour,
                  label=label, capsize=3.5, capthick=1.3, elinewidth=1.3, markeredgecolor=PAPER,
                  markeredgewidth=0.8)


def legend_below(axes, columns, down):
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -down), ncols=columns)


def stacked(axes, names, parts, colours, labels):
    """Horizontal bars; parts: {part: [one value for each name]}."""
    left = [0.0] * len(names)
    at = list(range(len(names)))[::-1]
    for part, values in parts.items():
        values = [v or 0.0 for v in values]
        if not any(values):
            continue
        axes.barh(at, values, left=left, color=colours[part], label=labels.get(part, part),
                  height=0.62, edgecolor=PAPER, linewidth=0.8)
        left = [a + b for a, b in zip(left, values)]
    axes.set_yticks(at, names)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", colors=INK)
    return left
