"""What batch chooses, which rows actions has, what qps tells beforehand."""

import math
import types

import pytest

from studies import actions, batch, figures, grids, qps
from studies.figures import Repeated


def point(sequences, *speeds, tpot=10.0):
    return types.SimpleNamespace(sequences=sequences, tokens=256, speed=Repeated(speeds),
                                 tpot=Repeated([tpot]), ttft=Repeated([100.0]))


def test_batch_takes_the_smallest_that_cannot_be_told_from_the_fastest():
    small, middle, large = point(8, 50, 51, 52), point(32, 99, 100, 101), point(64, 100, 101, 102)
    best, why = batch.choose([small, middle, large], None, None)
    assert best is middle and "64 sequences" in why
    clear = point(128, 150, 151, 152, tpot=30)
    assert batch.choose([small, middle, large, clear], None, None)[0] is clear
    assert batch.choose([small, middle, large, clear], 20, None)[0] is middle
    best, why = batch.choose([small, middle], 5, None)
    assert best is None and "--most-tpot-ms" in why
    # One run each: no idea of the noise, so the mean decides.
    assert batch.choose([point(8, 90), point(16, 100)], None, None)[0].sequences == 16


@pytest.fixture
def action_args(args, monkeypatch):
    monkeypatch.setattr(actions.program, "cores", lambda: 4)
    args.grid, args.chosen_grid = None, grids.Grid(1, 2, 2)
    args.baseline_sequences, args.sequences, args.whole_prompt, args.chunk = 50, 128, 2048, 256
    args.model_16bit = "synthetic:sixteen"
    args.common.pop("threads")
    return args


def test_actions_rows_and_their_options(action_args):
    every = actions.actions_of(action_args)
    assert [a.name for a in every if a.absent] == ["CUDA graphs"]
    rows, usable = actions.rows_of(every)
    assert len(rows) == 1 + 3 * 8 and len(usable) == 7
    jobs = actions.jobs_of(action_args, rows, usable)
    first = {taken: job for (taken, repeat), job in jobs.items() if repeat == 1}
    base, whole = first[()].options, first[tuple(usable)].options
    assert (base["model"], base["threads"], base["batching"], base["kv"], base["max-sequences"]) == (
        "synthetic:sixteen", 1, "static", "bf16", 50)
    assert (whole["model"], whole["batching"], whole["kv"], whole["max-sequences"], whole["pp"],
            whole["chunk-tokens"]) == ("synthetic:tiny", "continuous", "fp8", 128, 2, 256)
    # Four ranks on four cores have one thread each, with the action `threads` and without.
    assert first[tuple(s for s in usable if s != "threads")] is first[tuple(usable)]
    for (_, repeat), job in jobs.items():
        assert ("accuracy" in job.options["mode"]) == (repeat == 1)
    assert first[("threads",)].options["threads"] == 4


def test_actions_on_a_gpu_leave_threads_out(action_args):
    action_args.common["backend"] = "cuda"
    absent = [a.name for a in actions.actions_of(action_args) if a.absent]
    assert absent == ["threads"]
    _, options = actions.options_of(action_args, ("graphs",))
    assert options["graphs"] == "yes" and "threads" not in options
    assert actions.options_of(action_args, ())[1]["graphs"] == "no"


def test_table_shows_arrows_only_beyond_the_noise(action_args):
    every = actions.actions_of(action_args)
    rows, usable = actions.rows_of(every)
    runs = {}
    for taken, speeds in (((), (100, 101, 99)), (("kv8",), (120, 121, 119)),
                          (("batch",), (90, 115, 100))):
        for repeat, speed in enumerate(speeds, 1):
            runs[taken, repeat] = {"run": f"{taken}{repeat}", "valid": True, "message": "",
                                   "output_tokens_per_second": float(speed)}
    nothing = types.SimpleNamespace(compare=lambda *_: None)
    table = actions.Table(rows, runs, nothing)
    line = {l["action"]: l for l in table.lines if l["part"] == "alone"}
    assert line["FP8 KV cache"]["arrow"] == figures.UP
    assert line["batch size"]["arrow"] == figures.SAME
    assert line["threads"]["note"] == "not run yet"
    assert "needs a GPU" in line["CUDA graphs"]["note"]
    assert table.together == figures.UNKNOWN
    assert usable[0] == "threads"


def test_qps_tells_how_long_a_full_run_lasts(args):
    args.mlperf_length, args.common = True, {"scenario": "server"}
    assert qps.full_length(args, 10.0) == "at least 24,576 queries, about 40 min 58 s"
    assert qps.full_length(args, 100.0) == "at least 60,000 queries, about 10 min 0 s"
    args.common = {"scenario": "interactive"}
    assert qps.benchmark(args) == "llama2-70b-interactive"
    conf = qps.user_conf(args, 12.5, {"valid": True})
    assert conf.endswith("llama2-70b-interactive.Server.target_qps = 12.5\n")


class Server:
    """Valid up to a rate; counts its probes."""

    def __init__(self, limit):
        self.limit, self.asked = limit, []
        self.args = types.SimpleNamespace(within=0.05)

    def probe(self, rate):
        self.asked.append(rate)
        return rate <= self.limit


@pytest.mark.parametrize("start", [0.5, 9.0, 300.0])
def test_qps_search_ends_just_below_the_limit(start):
    server = Server(10.0)
    found = qps.Search.highest(server, start)
    assert found <= 10.0 < found * 1.06
    assert len(server.asked) < 15 and len(set(server.asked)) == len(server.asked)


def test_qps_search_gives_up_where_nothing_is_valid():
    with pytest.raises(Exception, match="no rate down to"):
        qps.Search.highest(Server(0.0), 10.0)


def test_qps_search_does_not_believe_a_rate_faster_than_offline():
    server = Server(math.inf)
    found = qps.Search.highest(server, 6.0, most=20.0)
    assert 19.0 < found <= 20.0 and max(server.asked) == found
