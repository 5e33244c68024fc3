"""What only GPUs measure: energy, and linears beside the library's."""

import json

import pytest

import drover

pytestmark = pytest.mark.gpus(1)


def check(energy, tokens):
    assert energy["devices"] == 1
    assert 20 < energy["mean_watts"] < 2000 and "NVML" in energy["measured_by"]
    assert energy["joules_per_output_token"] == pytest.approx(energy["joules"] / tokens)


def test_energy_of_a_run(tmp_path):
    out = tmp_path / "out"
    # Some seconds: the counter moves ten times a second.
    drover.drover(1, "run", "--backend", "cuda", "--model", drover.MODEL, "--dataset",
                  "synthetic:512x64:256", "--scenario", "offline", "--mode", "performance", "--demo",
                  "--max-new-tokens", 256, "--out", out)
    result = json.loads((out / "result.json").read_text())
    if "energy" not in result:
        pytest.skip("this GPU does not count its energy")
    check(result["energy"], result["output_tokens"])


def test_two_ranks_of_one_gpu_count_it_once(tmp_path):
    file = tmp_path / "bench.json"
    drover.drover(2, "bench", "step", "--backend", "cuda", "--share-gpu", "--dp", 2, "--kv-memory",
                  "256MiB", "--model", drover.MODEL, "--prompt-tokens", 32, "--new-tokens", 256, "--repeat", 2,
                  "--batches", "4,8", "--json", file)
    for figure in json.loads(file.read_text())["figures"]:
        if "energy" not in figure:
            pytest.skip("this GPU does not count its energy")
        check(figure["energy"], 2 * 256 * figure["batch"])


def test_linears_beside_the_library(tmp_path):
    file = tmp_path / "linear.json"
    text = drover.drover(1, "bench", "linear", "--backend", "cuda", "--model", "synthetic:llama2-70b",
                         "--tp", 8, "--rows", "1,100", "--json", file).out
    bench = json.loads(file.read_text())
    assert len(bench["figures"]) == 8
    if ", sm_90," not in bench["environment"]["versions"]["backend"]:
        pytest.skip("cuBLASLt scales e4m3 by rows on Hopper only")
    for figure in bench["figures"]:
        ratio = figure["library"]["us"] / figure["us"]
        assert figure["times_as_fast_as_library"] == pytest.approx(ratio)
        # Of the same shape, so neither is ten times the other.
        assert 0.1 < ratio < 10 and figure["library"]["flops"] == figure["flops"]
    assert text.count("as fast as the library") == 8


def test_budget_of_a_step(tmp_path):
    file = tmp_path / "bench.json"
    # In bf16 a linear of this model's groups is one kernel.
    outcome = drover.drover(1, "bench", "step", "--backend", "cuda", "--activations", "bf16", "--model",
                            drover.MODEL,
                            "--prompt-tokens", 64, "--new-tokens", 64, "--repeat", 2, "--batches", "1,16",
                            "--budget", "--json", file)
    budgets = json.loads(file.read_text())["budget"]["ranks"][0]
    if not budgets and "has whole steps of the GPU only" in outcome.err:
        pytest.skip("no CUPTI")
    for rows in (1, 16):
        decode = [b for b in budgets if (b["kind"], b["rows"]) == ("decode step", rows)]
        assert len(decode) == 1
        operations = {o["operation"]: o for o in decode[0]["operations"]}
        print(rows, {name: round(o["us"], 1) for name, o in operations.items()})
        assert sum(o["us"] for o in operations.values()) == pytest.approx(decode[0]["us"])
        # 30 layers; a step ends where the host sees it, so a call may count for the next one.
        for name in ("qkv", "rope + append", "attention decode", "o", "gate_up", "down"):
            assert operations[name]["calls"] == pytest.approx(30, rel=0.1), name
        assert operations["output"]["us"] > 0 and operations["argmax"]["us"] > 0
        # Linears that have no place in a forward would be "linear".
        assert operations.get("linear", {"us": 0})["us"] < 0.01 * decode[0]["us"]
        assert operations.get("other kernels", {"us": 0})["us"] < 0.01 * decode[0]["us"]


LINEAR = ("bench", "linear", "--backend", "cuda", "--model", "synthetic:llama2-70b", "--tp", 8)


@pytest.mark.parametrize("activations", ["fp8", "bf16"])
def test_tuning(tmp_path, activations):
    """Written, taken by a run, and never slower than the rule by more than noise."""
    file, tuned, plain = (tmp_path / n for n in ("tuning.txt", "tuned.json", "plain.json"))
    tune = drover.drover(1, "bench", "tune", "--backend", "cuda", "--model", "synthetic:llama2-70b",
                         "--tp", 8, "--activations", activations, "--rows", "8,64", "--out", file,
                         check=False)
    if tune.code == 2 and "nothing to tune" in tune.err:
        pytest.skip("no Hopper here")
    assert tune.code == 0, tune.err
    lines = [line.split() for line in file.read_text().splitlines()[3:]]
    assert len(lines) == 4 * 2
    name = "w4a8" if activations == "fp8" else "w4a16"
    for line in lines:
        assert line[0] == name and line[3] in ("8", "64")
        assert 0 < float(line[9]) <= float(line[10])
    print(tune.out)
    text = file.read_text()
    outcome = drover.drover(1, *LINEAR, "--activations", activations, "--rows", "8,64", "--tuning", file,
                            "--json", tuned)
    assert "8 choices for" in outcome.err
    drover.drover(1, *LINEAR, "--activations", activations, "--rows", "8,64", "--json", plain)
    us = [[f["us"] for f in json.loads(j.read_text())["figures"]] for j in (tuned, plain)]
    for a, b in zip(*us):
        assert a < 1.2 * b
    # Another GPU's is refused, and a kernel that is none.
    file.write_text(text.replace("gpu ", "gpu Not ", 1))
    refused = drover.drover(1, *LINEAR, "--tuning", file, check=False)
    assert refused.code == 3 and "tuned for Not " in refused.err
    file.write_text("\n".join(text.splitlines()[:2] +
                              [" ".join([*line[:4], "24", *line[5:]]) for line in lines]))
    refused = drover.drover(1, *LINEAR, "--activations", activations, "--tuning", file, check=False)
    assert refused.code == 3 and "24 tokens" in refused.err
