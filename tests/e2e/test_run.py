"""`drover run` on the demo's model: every file that a run leaves, and that they agree."""

import json
import re
import sys

import pytest

import drover
import results

EXACT = ("--activations", "f32", "--kv", "f32")
SAMPLES, TOKENS = 16, 24
DEMO = ("--demo", "--model", drover.MODEL, "--dataset", drover.DATASET, "--samples", SAMPLES,
        "--max-new-tokens", TOKENS, "--scenario", "offline", "--mode", "performance,accuracy")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return results.run(tmp_path_factory.mktemp("demo") / "out", 2, *DEMO, *EXACT, "--pp", 2,
                       "--progress", "no")


def test_result_tells_everything(demo):
    r = demo.result
    assert r["valid"] is True and r["reasons"] == []
    assert r["verdict"] == "VALID under demo settings; not an MLPerf result"
    assert (r["scenario"], r["mode"]) == ("offline", "performance,accuracy")
    assert (r["grid"], r["backend"]) == ("tp 1 x pp 2 x dp 1", "cpu")
    assert (r["kv"], r["activations"]) == ("f32", "f32")
    assert (r["samples"], r["samples_issued"]) == (SAMPLES, SAMPLES)
    assert r["synthetic_model"] is False and r["synthetic_dataset"] is False
    for what in ("model", "dataset"):
        assert re.fullmatch(r"[0-9a-f]{64}", r[what]["fingerprint"]), r[what]
    sources = json.loads(r["model"]["provenance"]["source_files"])
    assert sources and all(re.fullmatch(r"[0-9a-f]{64}", s["sha256"]) for s in sources)
    for latency in ("ttft_ms", "tpot_ms"):
        p50, p90, p99 = (r[latency][p] for p in ("p50", "p90", "p99"))
        assert 0 < p50 <= p90 <= p99
    assert r["pages"]["count"] > 0 and r["pages"]["bytes_per_rank"] > 0
    assert r["preemptions"] == 0 and r["duration_s"] > 0
    assert list(r["passes"]) == ["performance", "accuracy"]
    assert all(p["valid"] for p in r["passes"].values())


def test_tokens_per_second_is_loadgens_own(demo):
    r = demo.result
    stated = float(re.search(r"^Tokens per second: (\S+)$", demo.summary(), re.M)[1])
    assert r["output_tokens_per_second"] == pytest.approx(stated, rel=1e-5)
    assert stated == pytest.approx(r["output_tokens"] / r["duration_s"], rel=0.02)


@pytest.mark.parametrize("mode", ["performance", "accuracy"])
def test_loadgens_logs_are_whole_and_its_own(demo, mode):
    entries = demo.detail(mode)
    values = {e["key"]: e["value"] for e in entries}
    assert values["loadgen_version"].startswith("6.0.17")
    # A tree with changes would say so here.
    assert values["loadgen_git_status_message"] == ""
    assert values["effective_scenario"] == "Offline"
    assert values["effective_test_mode"] == {"performance": "PerformanceOnly",
                                             "accuracy": "AccuracyOnly"}[mode]
    assert values["effective_accuracy_log_rng_seed"] == 0
    assert not any(e["metadata"]["is_error"] or e["metadata"]["is_warning"] for e in entries)
    summary = demo.summary(mode)
    assert "No errors encountered during test." in summary
    if mode == "performance":
        assert values["result_validity"] == "VALID" and values["num_errors"] == 0
        assert "Result is : VALID" in summary
        assert json.loads((demo.logs(mode) / "mlperf_log_accuracy.json").read_text()) == []


def test_journal_accuracy_log_and_result_agree(demo, tmp_path):
    answers = demo.accuracy()
    assert sorted(answers) == list(range(SAMPLES))
    for mode in ("performance", "accuracy"):
        journal = demo.journal(mode)
        assert sorted(line["sample"] for line in journal) == list(range(SAMPLES))
        for line in journal:
            assert line["pass"] == mode
            assert line["n_tokens"] == len(line["tokens"]) and 2 <= line["n_tokens"] <= TOKENS
            assert line["by_eos"] == (line["tokens"][-1] == 2)
            assert line["by_eos"] or line["n_tokens"] == TOKENS
            assert 2 not in line["tokens"][:-1]
            assert 0 < line["ttft_ms"] <= line["latency_ms"]
        tokens = {line["sample"]: line["tokens"] for line in journal}
        if mode == "accuracy":
            assert tokens == answers
        else:
            results.check_same_answers(tmp_path, tokens, answers, EXACT)
        total = sum(line["n_tokens"] for line in journal)
        assert demo.result["passes"][mode]["output_tokens"] == total
    assert demo.result["output_tokens"] == demo.result["passes"]["performance"]["output_tokens"]


def test_phases_and_step_times_add_up(demo):
    for mode in ("performance", "accuracy"):
        figures = demo.result["passes"][mode]
        phases, bins = figures["phases"], figures["timeline"]
        parts = [phases[name] for name in ("ramp", "steady", "drain") if phases[name]]
        assert sum(p["tokens"] for p in parts) == figures["output_tokens"] == sum(bins["tokens"])
        assert sum(p["seconds"] for p in parts) == pytest.approx(figures["duration_s"], abs=0.1)
        assert phases["peak_running"] == figures["scheduler"]["peak_running"]
        assert max(bins["running"]) <= phases["peak_running"] and len(bins["running"]) <= 256
        times = figures["step_time"]
        assert [r["rank"] for r in times["per_rank"]] == [0, 1]
        for rank in times["per_rank"]:
            # Warm-up and the other pass are not in it; a plan that only retires has no rows.
            assert 0 <= figures["scheduler"]["steps"] - rank["steps"] <= 4
            assert rank["seconds"] == pytest.approx(figures["duration_s"], rel=0.05, abs=0.1)
            known = [rank[part + "_s"] for part in
                     ("compute", "communication", "stage_wait", "plan_wait", "host")]
            assert sum(known) == pytest.approx(rank["seconds"], rel=1e-6) and min(known) >= -1e-4
            assert rank["compute_s"] > 0.1 * rank["seconds"]
            assert rank["stage_wait_s"] > 0
        mean = times["mean_ms"]
        assert mean["bubble"] == pytest.approx(mean["stage_wait"] + mean["plan_wait"])


def test_accuracy_log_decodes_to_what_generate_prints(demo, tmp_path):
    results.need_packages()
    sys.path.insert(0, str(drover.ROOT / "data"))
    from drover_data.tokens import StoredTokenizer
    decode = StoredTokenizer.read(drover.DATASET).table.decode
    questions = results.questions()
    printed = drover.drover(1, "generate", "--model", drover.MODEL, "--dataset", drover.DATASET,
                            "--samples", ",".join(map(str, range(SAMPLES))), "--max-new-tokens",
                            TOKENS, "--json", tmp_path / "answers.json", *EXACT).out
    generated = json.loads((tmp_path / "answers.json").read_text())
    results.check_same_answers(tmp_path, {i: a["tokens"] for i, a in enumerate(generated)},
                               demo.accuracy(), EXACT)
    blocks, different = [], 0
    for i, ids in sorted(demo.accuracy().items()):
        text = decode(generated[i]["tokens"])
        assert generated[i]["text"] == text
        if generated[i]["tokens"] == ids:
            blocks.append(f"[{i}] {questions[i]}\n{decode(ids)}\n\n")
        else:  # a near-tie, as checked above
            different += 1
            blocks.append(f"[{i}] {questions[i]}\n{text}\n\n")
    assert different <= 2
    for block in blocks:
        assert block in printed
    assert len(printed) == sum(map(len, blocks)), "something else was printed, too"


def test_each_rank_has_a_log(demo):
    logs = demo.rank_logs()
    assert len(logs) == 2
    for rank, text in enumerate(logs):
        lines = text.splitlines()
        assert all(re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}} \S+ rank {rank} ", line)
                   for line in lines)
        assert "shard: layers " + ("0-15" if rank == 0 else "15-30") in text
    first, second = demo.work_of_ranks()
    # Both stages ran every row: the two passes' and the warm-up's.
    for what in ("steps", "rows", "sequences"):
        assert first[what] == second[what]
    passes = demo.result["passes"].values()
    assert first["rows"] >= sum(p["scheduler"]["prefill_rows"] + p["scheduler"]["decode_rows"]
                                for p in passes)


def test_environment(demo):
    e = json.loads((demo.folder / "environment.json").read_text())
    assert "--pp 2" in e["command_line"] and str(drover.MODEL) in e["command_line"]
    assert e["host"] and e["cpu"] and e["usable_cores"] >= 1 and e["memory_bytes"] > 1 << 30
    for library in ("drover", "mpi", "hdf5", "loadgen", "commit", "compiler", "backend"):
        assert e["versions"][library]
    assert e["versions"]["loadgen"] == "6.0.17"


def test_score_goes_into_the_result(demo, tmp_path):
    scored = results.copy(demo, tmp_path / "out")
    table = results.data_tool("data/score.py", scored.logs("accuracy") / "mlperf_log_accuracy.json",
                              "--dataset", drover.DATASET, "--samples", SAMPLES, "--result",
                              scored.folder / "result.json")
    after = json.loads((scored.folder / "result.json").read_text())
    rouge = after.pop("rouge")
    assert after == demo.result, "score.py changed something else"
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert 0 < rouge[kind] < 100 and f"{rouge[kind]:.4f}" in table
    assert rouge["samples"] == SAMPLES
    tokens = demo.result["passes"]["accuracy"]["output_tokens"]
    assert rouge["tokens_per_sample"] == pytest.approx(tokens / SAMPLES, abs=1e-4)

    shown = results.data_tool("launch/summary.py", scored.folder)
    assert "VALID under demo settings" in shown and f"{rouge['rouge1']:.4f}" in shown
    # What the run itself ended with says the same.
    table = [line for line in demo.outcome.out.splitlines() if line.startswith("  ")]
    assert any(line.startswith("  output tokens/s ") for line in table)
    assert f"  result                 {demo.folder / 'result.json'}" in table
    for line in table:
        assert line in shown or line.startswith(("  result ", "  energy ")), line
    for file in ("result.json", "environment.json", "performance/run_1/mlperf_log_summary.txt",
                 "accuracy/mlperf_log_accuracy.json"):
        assert str(scored.folder / file) in shown


def test_config_file_gives_the_same(demo, tmp_path):
    config = tmp_path / "run.conf"
    config.write_text(f"# As in the demo's fixture.\nmodel = {drover.MODEL}\n"
                      f"dataset = {drover.DATASET}\nsamples = {SAMPLES}\ndemo = yes\npp = 2\n"
                      f"max-new-tokens = {TOKENS}\nmode = accuracy\nactivations = f32\n"
                      "kv = bf16\nprogress = no\n")
    # What is given beside the file wins over it.
    again = results.run(tmp_path / "out", 2, "--config", config, "--kv", "f32")
    assert again.result["kv"] == "f32"
    differ = {key for key in demo.result["settings"]
              if demo.result["settings"][key] != again.result["settings"][key]}
    assert differ <= {"out", "config", "mode"}
    results.check_same_answers(tmp_path, again.accuracy(), demo.accuracy(), EXACT)


def test_staged_store(tmp_path, demo):
    folder = tmp_path / "local"
    arguments = ("--demo", "--model", drover.MODEL, "--dataset", drover.DATASET, "--samples", 4,
                 "--max-new-tokens", TOKENS, "--mode", "accuracy", "--pp", 2, *EXACT, "--stage",
                 folder)
    first = results.run(tmp_path / "first", 2, *arguments)
    copy = folder / drover.MODEL.name
    assert copy.stat().st_size == drover.MODEL.stat().st_size
    assert not list(folder.glob("*.tmp"))
    made = copy.stat().st_ino, copy.stat().st_ctime_ns
    second = results.run(tmp_path / "second", 2, *arguments)
    assert made == (copy.stat().st_ino, copy.stat().st_ctime_ns), "the copy was made twice"
    want = {s: t for s, t in demo.accuracy().items() if s < 4}
    for run in (first, second):
        results.check_same_answers(tmp_path, run.accuracy(), want, EXACT)
        assert run.result["model"]["fingerprint"] == demo.result["model"]["fingerprint"]
