"""Numbers, grids, and a report out of recorded runs."""

import csv
import json
import pathlib
import random

import pytest
from conftest import recorded_jobs

from studies import figures, grids, scaling
from studies.errors import StudyError
from studies.figures import Repeated, arrow, ratio_interval
from studies.jobs import Outcome


def test_interval_of_a_ratio_holds_what_it_says():
    """Of runs with 2 % noise, 95 % of the intervals hold the true ratio; some do not."""
    draw, inside = random.Random(5), 0
    for _ in range(2000):
        ours = Repeated([110 * draw.lognormvariate(0, 0.02) for _ in range(3)])
        theirs = Repeated([100 * draw.lognormvariate(0, 0.02) for _ in range(3)])
        middle, low, high = ratio_interval(ours, theirs)
        assert low < middle < high
        inside += low <= 1.1 <= high
    assert 0.93 < inside / 2000 < 0.995


def test_arrows_only_beyond_the_noise():
    base = Repeated([100, 101, 99])
    assert arrow(ratio_interval(Repeated([120, 121, 119]), base)) == figures.UP
    assert arrow(ratio_interval(Repeated([80, 81, 79]), base)) == figures.DOWN
    assert arrow(ratio_interval(Repeated([101, 99, 103]), base)) == figures.SAME
    assert arrow(ratio_interval(Repeated([150, 60, 140]), base)) == figures.SAME
    assert arrow(ratio_interval(Repeated([120]), base)) == figures.UNKNOWN, "one run shows no noise"
    assert arrow((1.003, 1.001, 1.005), least=0.01) == figures.SAME


def test_repeated():
    assert str(Repeated([100.0, 104.0])) == "102.0 ± 2.0"
    assert str(Repeated([None])) == "not measured" and not Repeated([])


def test_grids():
    names = lambda found: [g.label for g in found]  # noqa: E731
    assert names(grids.auto_of(6, heads=(9, 3), layers=30)) == [
        "tp1-pp1-dp6", "tp1-pp6-dp1", "tp3-pp2-dp1", "tp3-pp1-dp2"]
    assert names(grids.auto_of(1)) == ["tp1-pp1-dp1"]
    assert names(grids.all_of(2)) == ["tp1-pp1-dp2", "tp1-pp2-dp1", "tp2-pp1-dp1"]
    assert names(grids.all_of(2, layers=1)) == ["tp1-pp1-dp2", "tp2-pp1-dp1"]
    assert names(grids.choose("tp2,pp2dp2", [2, 4])) == ["tp2-pp1-dp1", "tp1-pp2-dp2"]
    for bad, why in (("tp3", "has 3 ranks"), ("2x2", "expected auto"), ("", "expected auto"),
                     ("tp2", "no grid of 4 ranks")):
        with pytest.raises(StudyError, match=why):
            grids.choose(bad, [2, 4])


def test_rows_tell_what_is_known_and_no_more():
    job, folder = recorded_jobs()[0]
    row = figures.row_of(job, Outcome(0), folder)
    result = json.loads((folder / "result.json").read_text())
    assert row["output_tokens_per_second"] == result["output_tokens_per_second"]
    assert row["step_device_ms"] is None and row["rouge1"] is None
    parts = sum(row[f"step_{p}_ms"] for p in ("compute", "communication", "bubble", "host"))
    assert parts == pytest.approx(row["step_ms"], rel=1e-3)
    misfit = figures.row_of(job, Outcome(2, "tp 2 does not divide"), folder)
    assert misfit["valid"] is None and "output_tokens_per_second" not in misfit


def test_report_of_recorded_runs(finished):
    assert scaling.main(finished) == 0
    out = pathlib.Path(finished.out)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8 and {r["ranks"] for r in rows} == {"1", "2"}
    kept = json.loads((out / "results.json").read_text())
    speed = [p["output_tokens_per_second"]["mean"] for p in kept["points"] if p["ranks"] == 1]
    assert len(speed) == 1
    page = (out / "report.html").read_text()
    # One file that needs nothing else, each figure in it and beside it.
    assert "<script" not in page and 'src="http' not in page and "@import" not in page
    assert page.count("<svg") == 6 == len(list((out / "plots").glob("*.png")))
    for words in ("Speed-up", "Efficiency", "Where the time goes", "dp 2", "No simulator", "AMD"):
        assert words in page, words
    assert f"{max(p['output_tokens_per_second']['mean'] for p in kept['points']):,.0f}" in page


def test_report_tells_what_did_not_fit(finished):
    finished.ranks, finished.grids = "1,2", "tp1,dp2,pp2,tp2"
    out = pathlib.Path(finished.out)
    for job, folder in recorded_jobs():
        if job.options["tp"] == 2:
            kept = out / "runs" / job.name / "outcome.json"
            text = json.loads(kept.read_text()) | {"code": 2, "message": "tp 2 does not <divide>"}
            kept.write_text(json.dumps(text))
    assert scaling.main(finished) == 0
    page = (out / "report.html").read_text()
    assert "What did not run" in page and "tp 2 does not &lt;divide&gt;" in page


def test_weak_scaling_takes_copies(args):
    args.kind = "weak"
    jobs = scaling.jobs_of(args, grids.choose("auto", [1, 2]))
    assert {job.ranks: job.options["copies"] for job in jobs} == {1: 1, 2: 2}
    args.common.pop("demo")
    with pytest.raises(StudyError, match="leave --mlperf-length out"):
        scaling.main(args)
