"""drover plan and drover simulate: the memory of real runs, errors, and figures that add up."""

import json
import pathlib
import re

import pytest

import drover

TOPOLOGY = drover.ROOT / "topology"
RESULTS = drover.ROOT / "tests/bench/results"
NP1 = RESULTS / "2026-11-25_h100_57cf520_step_70b_np1.json"
TP2 = RESULTS / "2026-11-25_h100_57cf520_step_70b_np2_tp2.json"
PP2 = RESULTS / "2026-11-25_h100_57cf520_step_70b_np2_pp2.json"
LLAMA = ("--model", "synthetic:llama2-70b")
ASKED = ("--prompt-tokens", 128, "--output-tokens", 64)


def plan(folder, *arguments, check=True):
    """The JSON of drover plan, and what it printed."""
    file = folder / "plan.json"
    out = drover.single("plan", *arguments, "--json", file, check=check)
    return json.loads(file.read_text()) if out.code == 0 else None, out


def only(planned, tp, pp):
    grid, = [g for g in planned["grids"] if (g["tp"], g["pp"]) == (tp, pp)]
    return grid


@pytest.fixture(name="here")
def machine_of_this_host(tmp_path):
    """A topology with this host's memory; its rates are of no interest."""
    total = int(re.search(r"MemTotal: +(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1])
    file = tmp_path / "here.ini"
    file.write_text("[machine]\nnodes = 1\ngpus_per_node = 0\n[host]\ncores = 2\n"
                    f"memory_gib = {total / (1 << 20)!r}\nread_gb_per_s = 20\nbf16_gflops = 200\n"
                    "[link]\nlatency_us = 1\ngb_per_s = 4\n[grid]\ntp = 1\npp = 1\ndp = 0\n")
    return file


@pytest.mark.parametrize("tp,pp,dp", [(1, 1, 1), (1, 2, 1), (3, 2, 1), (1, 1, 2)])
def test_memory_is_a_real_runs(tmp_path, here, tp, pp, dp):
    extra = ("--kv-memory", "64MiB") if tp == 3 else ()
    run = drover.drover(tp * pp * dp, "generate", "--model", drover.MODEL, "--dataset", drover.DATASET,
                        "--samples", 0, "--max-new-tokens", 2, "--tp", tp, "--pp", pp, "--dp", dp,
                        "--threads", 1, "--report-memory", "--log-level", "info", *extra)
    pages, tokens = map(int, re.search(r"KV [\d.]+ MiB in (\d+) pages of (\d+) tokens", run.err).groups())
    ranks = [line.split() for line in run.out.splitlines() if re.fullmatch(r" +\d+( +[\d.]+){3}", line)]
    weights, pools = [float(r[1]) for r in ranks], [r[2] for r in ranks]
    planned, _ = plan(tmp_path, "--model", drover.MODEL, "--topology", here, "--grid", f"{tp},{pp},{dp}",
                      *ASKED, *extra)
    memory = only(planned, tp, pp)["memory"]
    assert (memory["pages"], memory["page_tokens"]) == (pages, tokens)
    stages = [f"{s['kv'] / (1 << 20):.1f}" for s in memory["bytes_of_stages"]]
    assert pools == [s for _ in range(dp) for s in stages for _ in range(tp)]
    # Tables are taken for 16-bit ones; this model's embedding has 8.
    planned = [s["weights"] / (1 << 20) for s in memory["bytes_of_stages"]]
    # A CPU that does not multiply bf16 holds what it multiplies as f32, which a topology does not say of its hosts.
    if not re.search(r"\bavx512_bf16\b", pathlib.Path("/proc/cpuinfo").read_text()):
        embedding = 49152 * 576 * 2 / tp / (1 << 20)
        planned = [2 * w - (embedding if stage == 0 else 0) for stage, w in enumerate(planned)]
    assert [w for _ in range(dp) for w in planned for _ in range(tp)] == pytest.approx(weights, rel=0.2)


def test_a_cpu_rank_holds_f32_weights_in_32_bits(tmp_path):
    held = {}
    for activations in ("bf16", "f32", "fp8"):
        planned, _ = plan(tmp_path, "--model", "synthetic:smollm2-135m", "--topology", TOPOLOGY / "cpu.ini",
                          "--grid", "1,1,1", "--gpus", 1, "--activations", activations, *ASKED)
        held[activations] = only(planned, 1, 1)["memory"]["bytes_of_stages"][0]["weights"]
    assert held["f32"] == held["fp8"] == 2 * held["bf16"]


@pytest.mark.parametrize("file,tp,pp", [(NP1, 1, 1), (TP2, 2, 1), (PP2, 1, 2)])
def test_memory_is_what_gpus_had(tmp_path, file, tp, pp):
    measured = json.loads(file.read_text())["pages"]["count"]
    planned, _ = plan(tmp_path, *LLAMA, "--topology", TOPOLOGY / "h100x8.ini", *ASKED,
                      "--grid", f"{tp},{pp},1", "--gpus", tp * pp)
    assert only(planned, tp, pp)["memory"]["pages"] == pytest.approx(measured, rel=0.01)


def test_two_gpus_from_the_figures_of_one(tmp_path):
    """Fitted to one H100's steps and a pair's sums, held against steps of two with the kernels of then:
    tensor slots sum few rows over peer memory. Prompts of one sequence are left out: launches bound
    them (tests/bench)."""
    one, pair, tp2, pp2 = (RESULTS / f"2026-11-25_h100_{name}.json" for name in (
        "1366998_step_70b_np1", "1366998_comm_np2", "1366998_step_70b_np2_tp2",
        "7b7bac1_step_70b_np2_pp2"))
    planned, out = plan(tmp_path, *LLAMA, "--topology", TOPOLOGY / "h100x8.ini", "--gpus", 2, *ASKED,
                        "--calibrate", f"{one},{pair}", "--against", f"{tp2},{pp2}")
    print(out.out)
    errors = {a["what"]: a["error"] for a in planned["against"]}
    assert len(errors) == 8
    assert all(abs(e) < 0.1 for what, e in errors.items() if not what.endswith("token, batch 1"))
    assert "another device" not in out.out
    assert planned["rates"]["peer_latency"]["origin"] == "measured"
    assert planned["rates"]["flops"]["origin"] == "fitted"
    assert planned["rates"]["sum_latency"]["origin"] == "measured"
    assert planned["rates"]["pairs"]["origin"] == "guessed"
    grids = planned["grids"]
    assert [g["tokens_per_s"]["value"] for g in grids] == sorted(
        (g["tokens_per_s"]["value"] for g in grids), reverse=True)
    for g in grids:
        assert g["tokens_per_s"]["low"] < g["tokens_per_s"]["value"] < g["tokens_per_s"]["high"]
        assert {t["origin"] for t in g["terms_ms_of_slowest_stage"]} <= {"measured", "fitted", "guessed"}


EPYC = [str(RESULTS / f"2026-11-25_epyc_7e9dcbe_{kind}_{r}.json") for r in "abc" for kind in ("np1", "comm")]
ON_EPYC = ("--model", drover.MODEL, "--threads", 1, "--topology", RESULTS / "2026-11-25_epyc.ini",
           "--calibrate", ",".join(EPYC))


def test_two_cpu_ranks_from_one_and_a_pair(tmp_path):
    """Fitted to one rank's steps and a pair's messages, held against steps of two ranks: medians of three
    rounds on a busy machine."""
    held = ",".join(str(RESULTS / f"2026-11-25_epyc_7e9dcbe_pp2_{r}.json") for r in "abc")
    planned, out = plan(tmp_path, *ON_EPYC, "--gpus", 2, *ASKED, "--against", held)
    print(out.out)
    rounds = {}
    for a in planned["against"]:
        rounds.setdefault(a["what"], []).append(a)
    assert len(rounds) == 6 and all(len(r) == 3 for r in rounds.values())
    for r in rounds.values():
        assert r[0]["model"] == pytest.approx(sorted(a["measured"] for a in r)[1], rel=0.1)


@pytest.mark.parametrize("grid", ["1,1,1", "1,2,1", "1,1,2"])
def test_simulated_runs_are_the_measured_ones(tmp_path, grid):
    runs = json.loads((RESULTS / "2026-11-25_epyc_7e9dcbe_runs.json").read_text())
    file = tmp_path / "simulation.json"
    drover.single("simulate", *ON_EPYC, "--grid", grid, "--dataset", "synthetic:48x64:96",
                  "--max-new-tokens", 64, "--json", file)
    simulated = json.loads(file.read_text())["figures"]["output_tokens_per_second"]
    assert simulated == pytest.approx(sorted(runs["grids"][grid])[1], rel=0.1)


def test_figures_of_another_gpu_are_warned_about(tmp_path):
    _, out = plan(tmp_path, *LLAMA, "--topology", TOPOLOGY / "h200x1.ini", *ASKED, "--calibrate", NP1)
    assert "was measured on another device (cuda: NVIDIA H100 80GB HBM3)" in out.out


def test_each_number_of_threads_is_fitted_by_itself(tmp_path):
    """Two ranks share two cores, one thread each; one rank has both. As measured in 2026-11-23, where a
    second thread made small steps slower and large ones faster."""
    one, two = (RESULTS / f"2026-11-23_xeon-avx512-amx_6cb2f4928c18_step_np1-{n}.json"
                for n in ("1thread", "2threads"))
    arguments = ("--model", drover.MODEL, "--topology", TOPOLOGY / "cpu.ini", *ASKED)
    both, out = plan(tmp_path, *arguments, "--gpus", 1, "--calibrate", f"{one},{two}", "--against", two)
    assert "of 1 threads a rank" in out.out and "of 2 threads a rank" in out.out
    assert all(abs(a["error"]) < 0.06 for a in both["against"])
    only_two, _ = plan(tmp_path, *arguments, "--gpus", 1, "--calibrate", two)
    assert only(both, 1, 1)["threads"] == 2
    assert only(both, 1, 1)["tokens_per_s"] == only(only_two, 1, 1)["tokens_per_s"]


def test_every_grid_of_a_machine(tmp_path):
    planned, out = plan(tmp_path, *LLAMA, "--topology", TOPOLOGY / "h200_2x8.ini", *ASKED)
    grids = {(g["tp"], g["pp"], g["dp"]) for g in planned["grids"]}
    assert grids == {(t, p, 16 // t // p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8, 16) if t * p <= 16}
    assert "best: " in out.out and "why: " in out.out


def test_tensor_slots_on_two_nodes_are_warned_about(tmp_path):
    machine = tmp_path / "four_a_node.ini"
    machine.write_text((TOPOLOGY / "h200_2x8.ini").read_text().replace(
        "gpus_per_node = 8", "gpus_per_node = 4").replace("dp = 16", "dp = 8"))
    _, out = plan(tmp_path, *LLAMA, "--topology", machine, *ASKED, "--grid", "8,1,1")
    found = re.search(r"warning: tp 8 x pp 1 x dp 1: tensor-parallel slots lie on 2 nodes; .* about "
                      r"([\d.]+) ms more", out.out)
    assert found and float(found[1]) > 1
    _, out = plan(tmp_path, *LLAMA, "--topology", machine, *ASKED, "--grid", "4,2,1")
    assert "warning" not in out.out


def test_a_run_warns_of_it_too(tmp_path):
    machine = tmp_path / "three_nodes.ini"
    machine.write_text("[machine]\nnodes = 3\ngpus_per_node = 0\n[host]\ncores = 1\nmemory_gib = 4\n"
                       "read_gb_per_s = 10\nbf16_gflops = 100\n[link]\nlatency_us = 10\ngb_per_s = 40\n[network]\nlatency_us = 30\n"
                       "gb_per_s = 10\n[grid]\ntp = 3\npp = 1\ndp = 1\n")
    out = drover.drover(3, "generate", "--model", drover.MODEL, "--dataset", drover.DATASET, "--samples", 0,
                        "--max-new-tokens", 2, "--topology", machine, "--kv-memory", "64MiB", "--threads", 1)
    # 61 sums over 3 nodes, and as much less as they would take within one.
    ms = 61e3 * (20e-6 * 1.585 + 4 / 3 * 64 * 576 * 4 * (1 / 10e9 - 1 / 40e9))
    found = re.search(r"lie on 3 nodes; .* about ([\d.]+) ms more in a step of 64 rows", out.err)
    assert float(found[1]) == pytest.approx(ms, abs=0.06)


def test_operations_calibrate(tmp_path):
    """What drover bench measures of one operation is taken as measured."""
    model = ("--model", "synthetic:smollm2-135m")
    files = [tmp_path / f"{kind}.json" for kind in ("linear", "attention", "comm", "step")]
    drover.drover(1, "bench", "linear", *model, "--threads", 1, "--rows", "1,256", "--json", files[0])
    drover.drover(1, "bench", "attention", *model, "--threads", 1, "--sequences", 8, "--json", files[1])
    drover.drover(2, "bench", "comm", "--sizes", "64,18432", "--seconds", 0.02, "--json", files[2])
    drover.drover(1, "bench", "step", *model, "--threads", 1, "--batches", "1,4", "--repeat", 1,
                  "--prompt-tokens", 16, "--new-tokens", 6, "--json", files[3])
    planned, out = plan(tmp_path, *model, "--topology", TOPOLOGY / "cpu.ini", "--gpus", 2, *ASKED,
                        "--calibrate", ",".join(map(str, files)), "--threads", 1)
    assert len(planned["observations"]) == 8 + 1 + 4 + 4, out.out
    origins = {name: rate["origin"] for name, rate in planned["rates"].items() if name != "misfit"}
    assert {origins[name] for name in ("read", "flops", "cache", "sum_latency")} == {"measured"}
    assert origins["share"] == "guessed"
    assert {(g["tp"], g["pp"], g["dp"]) for g in planned["grids"]} == {(1, 2, 1), (1, 1, 2)}


def test_bad_input(tmp_path):
    cpu, h100 = TOPOLOGY / "cpu.ini", TOPOLOGY / "h100x8.ini"
    grid_only = tmp_path / "grid.ini"
    grid_only.write_text("[grid]\ntp = 1\n")
    broken = tmp_path / "bench.json"
    broken.write_text('{"bench": "step", "model": {}}')
    result = RESULTS / "2026-11-25_h100_57cf520_offline_70b_350.json"
    hostile = []
    for key, value in (("grid", "tp 0 x pp 1 x dp 1"), ("prompt_tokens", 0), ("grid", 7),
                       ("figures", [{"batch": -1}]), ("pages", {"count": 1 << 40, "tokens": 16})):
        hostile.append(tmp_path / f"hostile{len(hostile)}.json")
        hostile[-1].write_text(json.dumps({**json.loads(NP1.read_text()), key: value}))
    cases = [
        ((*LLAMA, *ASKED), 2, "--topology is missing"),
        (("--topology", h100, *ASKED), 2, "--model is missing"),
        ((*LLAMA, "--topology", h100), 2, "say what is asked"),
        ((*LLAMA, "--topology", grid_only, *ASKED), 3, "it names a grid only"),
        ((*LLAMA, "--topology", tmp_path / "none.ini", *ASKED), 3, "cannot be read"),
        ((*LLAMA, "--topology", h100, *ASKED, "--grid", "3,1,1", "--gpus", 3), 2, "tp 3 does not divide"),
        ((*LLAMA, "--topology", h100, *ASKED, "--grid", "2,1,1"), 2, "2 ranks, but 8 are planned"),
        ((*LLAMA, "--topology", h100, *ASKED, "--grid", "2x1"), 2, "expected auto, or tp,pp,dp"),
        ((*LLAMA, "--topology", h100, *ASKED, "--gpus", 16), 2, "no [network] to add nodes by"),
        ((*LLAMA, "--topology", TOPOLOGY / "rtx4090x1.ini", *ASKED), 4, "no grid of 1 ranks holds"),
        ((*LLAMA, "--topology", cpu, *ASKED, "--calibrate", NP1), 2, "calibrate with benches of the same"),
        (("--model", "synthetic:llama2-7b", "--topology", h100, *ASKED, "--calibrate", NP1), 2,
         "measured with the model"),
        ((*LLAMA, "--topology", h100, *ASKED, "--calibrate", broken), 3, "not as drover bench writes it"),
        ((*LLAMA, "--topology", h100, *ASKED, "--calibrate", result), 3, "not a file of drover bench"),
        ((*LLAMA, "--topology", h100, *ASKED, "--json", tmp_path / "no" / "x.json"), 4, "x.json"),
    ]
    cases += [((*LLAMA, "--topology", h100, *ASKED, "--calibrate", h), 3, h.name) for h in hostile]
    for arguments, code, words in cases:
        out = drover.single("plan", *arguments, check=False)
        assert (out.code, words in out.err) == (code, True), (arguments, out.code, out.err)


def test_grids_that_hold_too_little_are_named(tmp_path):
    """A prompt that one rank's pages cannot hold, but two ranks' can."""
    planned, out = plan(tmp_path, *LLAMA, "--topology", TOPOLOGY / "a800x2.ini", "--prompt-tokens", 1000,
                        "--output-tokens", 100, "--max-new-tokens", 100, "--kv-memory", "128MiB")
    assert "needs 69 pages" in only(planned, 1, 1)["problem"]
    assert "problem" not in only(planned, 2, 1) and "does not fit" in out.out


def test_a_run_refuses_a_bad_topology(tmp_path):
    bad = tmp_path / "bad.ini"
    bad.write_text("[grid]\ntp = 1\nqq = 2\n")
    out = drover.drover(1, "generate", "--model", drover.MODEL, "--dataset", drover.DATASET, "--samples", 0,
                        "--topology", bad, check=False)
    assert out.code == 3 and "unknown key grid.qq" in out.err


def simulate(folder, *arguments, check=True):
    file = folder / "simulation.json"
    out = drover.single("simulate", *LLAMA, "--topology", TOPOLOGY / "h100x8.ini", *arguments,
                        "--json", file, check=check)
    return json.loads(file.read_text()) if out.code == 0 else None, out


def test_simulation_of_an_offline_run_on_a_gpu(tmp_path):
    """Beside 350 samples under LoadGen on one H100, from the bench of steps alone."""
    measured = json.loads((RESULTS / "2026-11-25_h100_57cf520_offline_70b_350.json").read_text())
    got, out = simulate(tmp_path, "--gpus", 1, "--grid", "1,1,1", "--dataset", "synthetic:openorca:350",
                        "--calibrate", NP1)
    print(out.out)
    figures = got["figures"]
    assert figures["output_tokens"] == measured["output_tokens"]
    assert figures["prefill_rows"] == measured["scheduler"]["prefill_rows"]
    assert figures["output_tokens_per_second"] == pytest.approx(
        measured["output_tokens_per_second"], rel=0.1)
    assert figures["ttft_ms"]["p50"] == pytest.approx(measured["ttft_ms"]["p50"], rel=0.1)


@pytest.mark.parametrize("grid,ranks,name", [("1,1,1", 1, "np1"), ("1,1,2", 2, "np2_dp2"), ("1,2,1", 2, "np2_pp2")])
def test_offline_runs_on_two_gpus_from_one(tmp_path, grid, ranks, name):
    of = "2026-11-25_h100_7b7bac1"
    measured = json.loads((RESULTS / f"{of}_offline_70b_1500_{name}.json").read_text())
    got, _ = simulate(tmp_path, "--gpus", ranks, "--grid", grid, "--dataset", "synthetic:openorca:1500",
                      "--calibrate", RESULTS / f"{of}_step_70b_np1.json")
    figures = got["figures"]
    assert figures["output_tokens"] == measured["output_tokens"]
    for of_run, simulated in ((measured["output_tokens_per_second"], figures["output_tokens_per_second"]),
                              (measured["ttft_ms"]["p50"], figures["ttft_ms"]["p50"]),
                              (measured["tpot_ms"]["p99"], figures["tpot_ms"]["p99"])):
        assert simulated == pytest.approx(of_run, rel=0.1)


def test_simulation_repeats_itself(tmp_path):
    arguments = ("--grid", "2,1,4", "--dataset", "synthetic:openorca:200", "--scenario", "server",
                 "--target-qps", 40, "--stragglers", "2:1.5", "--seed", 3)
    one, out = simulate(tmp_path, *arguments)
    again, _ = simulate(tmp_path, *arguments)
    other, _ = simulate(tmp_path, *arguments[:-1], 4)
    assert one["figures"] == again["figures"] != other["figures"]
    assert one["figures"]["sequences"] == 200 and "40 queries/s" in out.out
    assert 0 < one["rank0"]["load"] < 1


def test_a_rank_0_that_is_too_busy_gets_a_tree(tmp_path):
    got, out = simulate(tmp_path, "--gpus", 8, "--grid", "1,1,8", "--dataset", "synthetic:16x64:400",
                        "--step-ms", 0.005, "--leader-us", 0)
    assert got["rank0"]["load"] > 0.5 and "a tree of" in out.out


def test_simulation_of_bad_input(tmp_path):
    cases = [
        (("--scenario", "server", *ASKED), 2, "needs --target-qps"),
        (("--scenario", "never", *ASKED), 2, "expected offline, server or interactive"),
        (("--stragglers", "9:2", *ASKED), 2, "at most 8 ranks"),
        (("--stragglers", "1:0.5", *ASKED), 2, "a factor from 1 to"),
        (("--dataset", "synthetic:4096x64:4", "--queries", 60000000), 4, "lower --queries"),
        (("--dataset", "synthetic:openorca", "--samples", 3000), 2, "--samples 3000: there are 2000"),
    ]
    for arguments, code, words in cases:
        _, out = simulate(tmp_path, *arguments, check=False)
        assert (out.code, words in out.err) == (code, True), (arguments, out.code, out.err)
