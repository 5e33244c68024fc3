"""The other subcommands, and the memory of a rank."""

import re

import pytest

import drover
import results

GRIDS = {1: (1, 1), 2: (1, 2), 3: (3, 1), 6: (3, 2)}  # ranks: tp, pp


@pytest.fixture(scope="module")
def memory():
    """MiB of each rank by number of ranks: [(weights, KV pool, peak RSS)]."""
    table = {}
    for ranks, (tp, pp) in GRIDS.items():
        out = drover.drover(ranks, "generate", "--model", drover.MODEL, "--dataset", drover.DATASET,
                            "--samples", "0,1,2,3", "--max-new-tokens", 4, "--tp", tp, "--pp", pp,
                            "--kv-memory", "64MiB", "--threads", 1, "--report-memory").out
        head = next(i for i, line in enumerate(out.splitlines())
                    if line.split() == "rank weights MiB KV pool MiB peak RSS MiB".split())
        rows = [line.split() for line in out.splitlines()[head + 1:]]
        assert [int(row[0]) for row in rows] == list(range(ranks))
        table[ranks] = [tuple(map(float, row[1:])) for row in rows]
        print(f"{ranks} ranks: " + "; ".join(f"weights {w}, peak RSS {rss}"
                                             for w, _, rss in table[ranks]))
    return table


def test_a_rank_holds_its_shard(memory):
    largest = {ranks: max(w for w, _, _ in rows) for ranks, rows in memory.items()}
    assert largest[1] > largest[2] > largest[3] > largest[6] > 0
    # The table of tokens is on both pipeline stages here, as it is tied: 28 of the 128 million.
    assert largest[3] == pytest.approx(largest[1] / 3, rel=0.02)
    assert largest[2] < 0.65 * largest[1] and largest[6] < 0.22 * largest[1]


def test_peak_memory_falls_as_ranks_are_added(memory):
    peak = {ranks: max(rss for _, _, rss in rows) for ranks, rows in memory.items()}
    assert peak[1] > peak[2] > peak[3] > peak[6]
    for ranks, rows in memory.items():
        assert all(rss > weights for weights, _, rss in rows)
        assert all(kv <= 64 for _, kv, _ in rows)


def test_inspect_model():
    out = drover.single("inspect", drover.MODEL).out
    for text in ("a model store, format version 1", "30 layers, hidden 576, 9 heads (3 KV) of 64",
                 "int4 g32 minimums", "GGUF Q4_1", "every checksum agrees", "272 tensors"):
        assert text in out
    assert re.search(r"^end ids +2$", out, re.M)
    quick = drover.single("inspect", drover.MODEL, "--no-verify").out
    assert "every checksum agrees" not in quick and "272 tensors" in quick


def test_inspect_dataset():
    out = drover.single("inspect", drover.DATASET).out
    prompts = results.prompts(len(results.questions()))
    tokens = sum(map(len, prompts))
    assert re.search(rf"^samples +{len(prompts)}$", out, re.M)
    assert f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens" in out
    assert f"{tokens} in all" in out and "every checksum agrees" in out
    assert results.questions()[0] in out


def test_generate_answers_a_text():
    """Encoding goes through the data tools; the dataset's ids came the same way."""
    results.need_packages()
    question = results.questions()[1]
    arguments = ("generate", "--model", drover.MODEL, "--max-new-tokens", 12, "--activations", "f32",
                 "--kv", "f32")
    asked = drover.drover(1, *arguments, "--text", question, env={"DROVER_PYTHON": drover.PYTHON})
    stored = drover.drover(1, *arguments, "--dataset", drover.DATASET, "--samples", 1)
    assert asked.out == stored.out and len(asked.out.strip()) > 10


def test_version_names_all():
    out = drover.single("--version").out
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["loadgen"] == "6.0.17"
    assert re.match(r"\d+\.\d+\.\d+$", lines["drover"]) and re.match(r"1\.\d+\.\d+", lines["hdf5"])
    assert "MPI" in lines["mpi"]


def test_help_tells_every_option():
    top = drover.single("--help").out
    names = re.findall(r"^  ([a-z]+) {2,}\S", top, re.M)
    assert {"run", "generate", "inspect", "logits"} <= set(names)
    commands = [(name,) for name in names if name != "bench"]
    if "bench" in names:
        parts = re.findall(r"^drover bench ([a-z]+) +\S", drover.single("bench", "--help").out, re.M)
        assert parts
        commands += [("bench", part) for part in parts]
    for command in commands:
        lines = drover.single(*command, "--help").out.splitlines()
        assert len(lines) >= 3
        for line in lines:
            assert re.match(r"  --[a-z-]+ +\S.{5,}", line), f"drover {command} --help: {line}"
    assert drover.single(check=False).code == 2
