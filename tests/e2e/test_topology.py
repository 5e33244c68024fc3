"""drover topology: a file for the machine at hand, that reads back the same."""

import configparser
import os
import pathlib

import pytest

import drover

STAND_IN = pathlib.Path(drover.BINARY).parent / "tests/libstand_in_nvml.so"
CORES = len(os.sched_getaffinity(0))


def sections(text):
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_this_machine(tmp_path):
    file = tmp_path / "here.ini"
    drover.drover(2, "topology", "--detect", "--file", file)
    told = sections(file.read_text())
    assert told["machine"]["nodes"] == "1" and told["machine"]["gpus_per_node"] == "0"
    assert int(told["host"]["cores"]) >= CORES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert float(told["host"]["memory_gib"]) == pytest.approx(memory, rel=0.01)
    for key in ("latency_us", "gb_per_s", "send_latency_us", "send_gb_per_s"):
        assert 0 < float(told["link"][key]) < 1e6
        assert f"link.{key}" in told["machine"]["measured"]
    assert told["grid"] == {"tp": "1", "pp": "1", "dp": "0"}
    # What is read back is what was written.
    again = drover.single("topology", file).out
    assert sections(again) == told
    assert drover.drover(2, "run", "--topology", file, "--print-placement").code == 0


def test_a_file_that_is_there_stays(tmp_path):
    file = tmp_path / "here.ini"
    file.write_text("[grid]\ntp = 1\n")
    outcome = drover.single("topology", file, "--detect", check=False)
    assert outcome.code == 2 and "--force" in outcome.err
    assert file.read_text() == "[grid]\ntp = 1\n"
    drover.single("topology", "--detect", "--measure", "no", "--force", "--file", file)
    assert "cores = " in file.read_text()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not STAND_IN.exists(), reason="the stand-in for NVML is not built")
def test_gpus_that_a_driver_tells_of(tmp_path):
    file = tmp_path / "gpus.ini"
    env = {"DROVER_NVML": str(STAND_IN), "HWLOC_SYNTHETIC": "pack:2 numa:1 core:8 pu:2"}
    drover.single("topology", file, "--detect", env=env)
    told = sections(file.read_text())
    assert told["machine"]["gpus_per_node"] == "4" and told["host"]["cores"] == "16"
    assert told["gpu"]["name"] == "Stand-in GPU"
    assert float(told["gpu"]["memory_gib"]) == 80
    assert float(told["gpu"]["compute_capability"]) == 9
    assert float(told["link"]["gb_per_s"]) == pytest.approx(45)  # 3 NVLinks of 25 GB/s, guessed
    assert "link" not in told["machine"]["measured"] and "guesses" in file.read_text()
    assert sections(drover.single("topology", file).out) == told


def test_bad_input(tmp_path):
    assert drover.single("topology", check=False).code == 2
    outcome = drover.single("topology", tmp_path / "none.ini", check=False)
    assert outcome.code == 3 and "none.ini" in outcome.err
    file = tmp_path / "bad.ini"
    file.write_text("[machine]\nnodes = 1\ngpus_per_node = 2\n")
    assert drover.single("topology", file, check=False).code == 3
    outcome = drover.single("topology", tmp_path / "no" / "x.ini", "--detect", "--measure", "no",
                            check=False)
    assert outcome.code == 4 and "x.ini" in outcome.err
