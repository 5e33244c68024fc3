"""tests/bench/trace_report.py over a trace of which every figure is known."""

import json
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "bench" / "trace_report.py"


def span(name, category, begin, end, row, rank=0, **args):
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": row, "ts": begin,
            "dur": end - begin, "args": args}


def events(rank=0):
    """One mixed step before the steady part, two decode steps of 100 us, 20 us apart."""
    out = [
        {"ph": "M", "name": "process_name", "pid": rank, "tid": 0,
         "args": {"name": f"rank {rank} (here)"}},
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": 1, "args": {"name": "worker"}},
        span("mixed step", "step", 0, 500, 1000, rank),
        span("linear_kernel", "kernel", 10, 490, 1008, rank),
        span("post", "host", 595, 625, 1, rank),
        span("wait", "host", 605, 615, 1, rank),
    ]
    for begin in (500, 620):
        out += [
            span("decode step", "step", begin, begin + 100, 1000, rank, step=1),
            span("linear_kernel", "kernel", begin, begin + 50, 1008, rank),
            # Launched under the linear, for whose end it waits.
            span("decode_kernel<128>", "kernel", begin + 20, begin + 70, 1008, rank),
            span("write_kernel<8, true>(NormRows, Output)", "kernel", begin + 70, begin + 75, 1008, rank),
            span("ncclDevKernel_AllReduce", "kernel", begin + 72, begin + 90, 1016, rank),
            span("argmax_kernel", "kernel", begin + 92, begin + 98, 1008, rank),
        ]
    return out


def run(tmp_path, content, *args):
    file = tmp_path / "trace.json"
    file.write_text(content if isinstance(content, str) else json.dumps({"traceEvents": content}))
    return subprocess.run([sys.executable, TOOL, file, *args], capture_output=True, text=True,
                          check=False)


def test_every_figure(tmp_path):
    done = run(tmp_path, events(), "--json")
    assert done.returncode == 0, done.stderr
    r = json.loads(done.stdout)["0"]
    assert r["steady_us"] == pytest.approx(220)
    # 96 us of each step: what overlaps counts once.
    assert r["busy_share"] == pytest.approx(192 / 220)
    gaps = r["gaps"]
    assert gaps[0]["us"] == pytest.approx(22)
    assert (gaps[0]["after"], gaps[0]["before"]) == ("argmax_kernel", "linear_kernel")
    assert gaps[0]["host"] == "worker: wait"
    assert [round(g["us"]) for g in gaps] == [22, 2, 2, 2]
    assert r["kernels"]["linear_kernel"]["us"] == pytest.approx(100)
    assert r["kernels"]["linear_kernel"]["count"] == 2
    assert list(r["kernels"])[0] == "linear_kernel"
    assert list(r["steps"]) == ["decode step"]
    step = r["steps"]["decode step"]
    assert step["steps"] == 2 and step["us"] == pytest.approx(100)
    assert step["classes"] == pytest.approx(
        {"linear": 50, "attention": 20, "norm": 5, "comm": 18, "other": 6})


def test_ranks_and_text(tmp_path):
    dropped = {"ph": "i", "s": "p", "name": "dropped", "cat": "trace", "pid": 1, "tid": 0, "ts": 1,
               "args": {"events": 12}}
    both = events(0) + events(1) + [dropped]
    text = run(tmp_path, both).stdout
    assert "rank 0 (here): steady part 0.220 ms, GPU busy 87.27%, idle 12.73%" in text
    assert "rank 1 (here)" in text and "12 later events are not in it" in text
    only = run(tmp_path, both, "--rank", "1").stdout
    assert "rank 0" not in only and "rank 1" in only


def test_without_kernels_the_steps_are_the_device(tmp_path):
    steps = [e for e in events() if e.get("cat") in (None, "step", "host")]
    r = json.loads(run(tmp_path, steps, "--json").stdout)["0"]
    assert r["busy_of"] == "steps"
    assert r["busy_share"] == pytest.approx(200 / 220)
    assert r["gaps"][0]["us"] == pytest.approx(20)


def test_a_host_without_a_device(tmp_path):
    r = json.loads(run(tmp_path, events()[:2] + events()[4:6], "--json").stdout)["0"]
    assert r["busy_share"] == 0 and r["steps"] == {}


@pytest.mark.parametrize("content", ["", "[]", "{\"traceEvents\": 3}", "{}"])
def test_other_files_are_refused(tmp_path, content):
    done = run(tmp_path, content)
    assert done.returncode == 3 and "not a trace" in done.stderr
