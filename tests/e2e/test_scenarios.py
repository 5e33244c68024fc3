"""Scenarios, replicas and batching, on a synthetic model so that each run lasts seconds."""

import collections
import re

import pytest

import drover
import results

TINY = ("--model", "synthetic:tiny", "--progress", "no", "--threads", 1)
# Queries a second, LoadGen's limits of the scenario in ms (first token, each token).
SCENARIOS = {"server": (100, 2000, 200), "interactive": (100, 450, 40), "singlestream": (0, 0, 0)}


@pytest.fixture(scope="module", params=SCENARIOS)
def scenario(request, tmp_path_factory):
    qps = SCENARIOS[request.param][0]
    return results.run(tmp_path_factory.mktemp(request.param) / "out", 1, *TINY, "--demo",
                       "--dataset", "synthetic:8x4:64", "--scenario", request.param,
                       "--max-new-tokens", 8, "--mode", "performance,accuracy",
                       *(("--target-qps", qps) if qps else ()))


def test_scenario_is_valid_and_marked(scenario):
    r = scenario.result
    assert r["valid"] is True, r["reasons"]
    # LoadGen may fill up the queries to a whole number of sets; early stopping wants 459 in Server.
    least = {"server": 459, "interactive": 459, "singlestream": 65}[r["scenario"]]
    assert least <= r["samples"] == r["samples_issued"] <= least + 128
    assert r["output_tokens"] == 4 * r["samples"], "given lengths act as the end"
    assert r["synthetic_model"] is True and r["synthetic_dataset"] is True
    assert r["model"]["name"] == "synthetic:tiny" and r["dataset"]["synthetic"] is True
    assert r["verdict"] == "VALID under demo settings; not an MLPerf result"
    assert "unverified" not in r and "division" not in r
    assert sorted(scenario.accuracy()) == list(range(64))
    assert all(len(ids) == 4 for ids in scenario.accuracy().values())


def test_limits_are_the_scenarios(scenario):
    _, first, each = SCENARIOS[scenario.result["scenario"]]
    values = {e["key"]: e["value"] for e in scenario.detail()}
    assert values["effective_scenario"] == ("Server" if first else "SingleStream")
    if not first:
        assert "latency_limits" not in scenario.result
        return
    assert scenario.result["latency_limits"] == {"ttft_p99_ms": first, "tpot_p99_ms": each}
    assert f"ttft_latency (ns): {first}000000" in scenario.summary()
    assert f"tpot_latency (ns): {each}000000" in scenario.summary()


def test_latencies_agree_with_loadgens(scenario):
    """LoadGen counts from the query's schedule, drover from its issue: a busy host tears them apart
    at the last percentile, which is given more room."""
    summary = scenario.summary()
    for ours, theirs in (("ttft_ms", "first token latency"), ("tpot_ms", "time to output token")):
        for percent, room in (("50", 3), ("90", 5), ("99", 25)):
            found = re.search(rf"^{percent}\.00 percentile {theirs} \(ns\) *: (\d+)$", summary, re.M)
            want = int(found[1]) / 1e6
            got = scenario.result[ours][f"p{percent}"]
            print(f"{scenario.result['scenario']} {ours} p{percent}: {got:.3f}, LoadGen {want:.3f}")
            assert abs(got - want) <= room
            logged = scenario.result["loadgen_latency"][ours][f"p{percent}"]
            assert logged == pytest.approx(want, abs=1e-6)


def test_tokens_per_second_of_server_is_loadgens(scenario):
    found = re.search(r"^Completed tokens per second *: (\S+)$", scenario.summary(), re.M)
    if scenario.result["scenario"] == "singlestream":
        assert scenario.result["output_tokens_per_second"] > 0
        return
    assert scenario.result["output_tokens_per_second"] == pytest.approx(float(found[1]), rel=1e-4)


def test_replicas_share_the_work(tmp_path):
    data = ("--demo", "--dataset", "synthetic:48x32:96", "--max-new-tokens", 32, "--scenario",
            "offline", "--mode", "performance,accuracy", "--max-sequences", 8, "--activations",
            "f32", "--kv", "f32", "--warmup", 4)
    one = results.run(tmp_path / "one", 1, *TINY, *data)
    two = results.run(tmp_path / "two", 2, *TINY, *data, "--dp", 2)
    assert two.result["grid"] == "tp 1 x pp 1 x dp 2"
    work = two.work_of_ranks()
    print("; ".join(f"replica {i}: {w}" for i, w in enumerate(work)))
    # Whoever runs dry takes what waits for the other: on a host that gives one replica less time it
    # has fewer of the rows, but both work to the end.
    seconds = [w["seconds"] for w in work]
    assert min(seconds) >= 0.5 * max(seconds)
    for what in ("rows", "sequences"):
        assert min(w[what] for w in work) >= 0.05 * sum(w[what] for w in work)
    assert sum(w["sequences"] for w in work) == 2 * 96 + 4  # both passes, and the warm-up
    assert two.result["samples"] == 96 and two.result["output_tokens"] == 96 * 32
    same = sum(one.accuracy()[s] == ids for s, ids in two.accuracy().items())
    # Random weights have near-ties; test_grids.py holds the tokens of replicas exactly.
    assert same >= 90, f"only {same} of 96 answers are those of one replica"


def test_copies_repeat_the_whole_set(tmp_path):
    data = ("--dataset", "synthetic:8x4:32", "--max-new-tokens", 4, "--copies", 3)
    run = results.run(tmp_path / "three", 1, *TINY, "--demo", *data)
    counts = collections.Counter(line["sample"] for line in run.journal("performance"))
    assert counts == {sample: 3 for sample in range(32)}
    assert run.result["copies"] == 3 and run.result["samples_issued"] == 96
    refused = drover.drover(1, "run", "--out", tmp_path / "none", *TINY, *data, check=False)
    assert refused.code == 2 and "--copies 3: works in Offline with --demo" in refused.err


def test_static_batching_takes_more_steps(tmp_path):
    """Answers of unequal length: a batch that waits for its longest wastes steps."""
    data = ("--demo", "--dataset", "synthetic:openorca:32", "--max-new-tokens", 400, "--scenario",
            "offline", "--mode", "performance", "--max-sequences", 8)
    runs = {way: results.run(tmp_path / way, 1, *TINY, *data, "--batching", way)
            for way in ("continuous", "static")}
    lengths = {way: sorted((line["sample"], line["n_tokens"]) for line in run.journal("performance"))
               for way, run in runs.items()}
    assert lengths["static"] == lengths["continuous"]
    assert len({n for _, n in lengths["static"]}) > 10, "the lengths should differ"
    steps = {way: run.result["scheduler"]["steps"] for way, run in runs.items()}
    print(f"steps: {steps}")
    assert steps["static"] > 1.2 * steps["continuous"]
    assert all(run.result["scheduler"]["peak_running"] == 8 for run in runs.values())


def test_audit_config_only_where_it_is_named(tmp_path):
    """LoadGen by itself obeys an audit.config that lies in the working directory."""
    audit = tmp_path / "audit.config"
    audit.write_text("*.*.accuracy_log_rng_seed = 720381539243781796\n"
                     "*.*.accuracy_log_sampling_target = 5\n")
    data = ("--demo", "--dataset", "synthetic:8x4:16", "--max-new-tokens", 4)
    seed, sampled = "effective_accuracy_log_rng_seed", "effective_accuracy_log_sampling_target"
    for name, extra, want in (("lying", (), (0, 0)),
                              ("named", ("--audit-conf", audit), (720381539243781796, 5))):
        run = results.run(tmp_path / name, 1, *TINY, *data, *extra, cwd=tmp_path)
        values = {e["key"]: e["value"] for e in run.detail()}
        assert (values[seed], values[sampled]) == want
        assert ("audit_conf" in run.result) == (name == "named")
