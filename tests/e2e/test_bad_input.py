"""Bad input: what is wrong and what to do, the class of the error as exit code, on every rank."""

import hashlib
import json
import os
import shutil
import subprocess

import h5py
import numpy as np
import pytest

import drover
from failing import BAD_INPUT, ENVIRONMENT, TINY, USAGE, fails, refused, same_cause

SMALL = ("--model", drover.MODEL, "--dataset", drover.DATASET, "--demo", "--threads", 1,
         "--warmup", 0, "--samples", 1, "--max-new-tokens", 2)


def with_model(path, *more):
    return ("generate", "--model", path, "--dataset", drover.DATASET, "--samples", 0,
            "--max-new-tokens", 1, *more)


def with_dataset(path, out):
    return ("run", "--model", drover.MODEL, "--dataset", path, "--demo", "--warmup", 0,
            "--samples", 1, "--max-new-tokens", 2, "--out", out)


@pytest.fixture
def model(tmp_path):
    """A copy of the demo's model, to be damaged."""
    path = tmp_path / "model.h5"
    shutil.copyfile(drover.MODEL, path)
    yield path
    path.unlink()


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "dataset.h5"
    shutil.copyfile(drover.DATASET, path)
    return path


# --- options and grids ---------------------------------------------------------------------------

def test_wrong_rank_count(tmp_path):
    out = tmp_path / "out"
    text = fails(tmp_path, 2, USAGE, "run", *TINY, "--tp", 2, "--pp", 2, "--dp", 1, "--out", out)
    assert "needs 4 ranks, but MPI started 2: use mpirun -np 4" in text
    assert "--tp 1 --pp 2 --dp 1" in text
    assert "needs 4 ranks" in same_cause(out, range(2))


def test_tp_that_does_not_divide(tmp_path):
    out = tmp_path / "out"
    text = fails(tmp_path, 2, USAGE, "run", *SMALL, "--tp", 2, "--out", out)
    assert "tp 2 does not divide 9 heads and 3 KV heads; tp 1 or 3 would work" in text
    assert "tp 1 or 3 would work" in same_cause(out, range(2))


def test_more_stages_than_layers(tmp_path):
    fails(tmp_path, 5, USAGE, "run", *TINY, "--pp", 5, "--out", tmp_path / "out", grace=3)
    assert "pp 1 to 4 would work" in same_cause(tmp_path / "out", range(5))


def test_unknown_option_on_every_rank(tmp_path):
    text = fails(tmp_path, 2, USAGE, "run", *TINY, "--out", tmp_path / "out", "--sampels", 3)
    assert "unknown option --sampels; did you mean --samples?" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (("rnu",), "unknown subcommand rnu"),
    (("run", "--tp", "two", "--out", "x", *TINY), "--tp two: expected a whole number"),
    (("run", "--tp", "-1", "--out", "x", *TINY), "-1"),
    (("run", "--scenario", "ofline", "--out", "x", *TINY), "ofline"),
    (("run", "--kv", "fp4", "--out", "x", *TINY), "fp4"),
    (("run", *TINY), "--out is missing"),
    (("run", "--out", "x", "--model", "synthetic:tiny"), "--dataset is missing"),
    (("run", "--out", "x", "--kv-memory", "2XB", *TINY), "expected a size such as"),
    (("generate", "--model", "synthetic:none", "--tokens", "x"), "no architecture named `none`; known:"),
])
def test_usage(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(USAGE, *arguments, says=says)


def test_config_files(tmp_path):
    config, out = tmp_path / "drover.conf", tmp_path / "out"
    config.write_text("max-sequences = 4\nsampels = 3\n")
    refused(USAGE, "run", *TINY, "--out", out, "--config", config,
            says=[str(config), "unknown key", "did you mean --samples?"])
    config.write_text("this is no configuration\n")
    refused(BAD_INPUT, "run", *TINY, "--out", out, "--config", config, says=str(config))
    refused(BAD_INPUT, "run", *TINY, "--out", out, "--config", tmp_path / "absent",
            says="cannot be read")


# --- stores and datasets -------------------------------------------------------------------------

def test_missing_store_on_every_rank(tmp_path):
    out, absent = tmp_path / "out", tmp_path / "absent.h5"
    text = fails(tmp_path, 3, BAD_INPUT, "run", "--model", absent, "--dataset", drover.DATASET,
                 "--pp", 3, "--out", out)
    cause = same_cause(out, range(3))
    assert str(absent) in cause and "no such file" in cause
    assert text.count("no such file") == 1, text  # said once, not once a rank


def test_bit_flip_that_one_rank_reads(tmp_path, model):
    """Only the last stage reads layer 29; the others wait for it."""
    with h5py.File(model) as f:
        codes = f["tensors/layers.29.down/codes"]
        place = codes.id.get_chunk_info(0)
        assert place.filter_mask == 0
    with open(model, "r+b") as f:
        f.seek(place.byte_offset + place.size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))
    out = tmp_path / "out"
    fails(tmp_path, 3, BAD_INPUT, "run", "--model", model, "--dataset", drover.DATASET, "--pp", 3,
          "--threads", 1, "--out", out, seconds=40)
    cause = same_cause(out, range(3))
    assert cause.startswith("rank 2 (loading): ") and "layers.29.down" in cause
    refused(BAD_INPUT, "inspect", model, says="layers.29.down")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_store(model, share):
    size = model.stat().st_size
    os.truncate(model, int(size * share))
    refused(BAD_INPUT, *with_model(model), says=str(model))


def replace(f, name, data, **more):
    del f[name]
    f.create_dataset(name, data=data, **more)


def external(f):
    del f["tensors/layers.0.q/codes"]
    f["tensors/layers.0.q/codes"] = h5py.ExternalLink("other.h5", "/x")


def absurd_tokenizer(f):
    del f["tokenizer/tokenizer_json"]
    f.create_dataset("tokenizer/tokenizer_json", shape=(1 << 40,), dtype="u1", chunks=(65536,))


MODEL_HARMS = {
    "vocab overflows": lambda f: f["architecture"].attrs.__setitem__("vocab", np.int64(1) << 62),
    "negative layers": lambda f: f["architecture"].attrs.__setitem__("layers", np.int64(-3)),
    "no heads": lambda f: f["architecture"].attrs.__setitem__("heads", np.int64(0)),
    "rows overflow": lambda f: f["tensors/embed"].attrs.__setitem__("rows", np.int64(1) << 62),
    "hidden is text": lambda f: f["architecture"].attrs.__setitem__("hidden", np.bytes_("many")),
    "newer version": lambda f: f.attrs.__setitem__("format_version", np.int64(9)),
    "a dataset's format": lambda f: f.attrs.__setitem__("format", np.bytes_("drover-dataset")),
    "external link": external,
    "absurd tokenizer": absurd_tokenizer,
    "floats for codes": lambda f: replace(f, "tensors/layers.0.q/codes",
                                          np.zeros((576, 288), "f4"), chunks=(512, 256)),
    "no layer 7": lambda f: f.__delitem__("tensors/layers.7.k"),
    "not a number": lambda f: f["architecture"].attrs.__setitem__("rope_base", np.float64("nan")),
}


@pytest.mark.parametrize("harm", MODEL_HARMS)
def test_hostile_store(model, harm):
    with h5py.File(model, "r+") as f:
        MODEL_HARMS[harm](f)
    # Nobody reads the tokenizer to answer token ids.
    command = ("inspect", model) if "tokenizer" in harm else with_model(model)
    refused(BAD_INPUT, *command, says=str(model))


def far_offsets(f):
    offsets = f["input_offsets"][:]
    offsets[-1] = 1 << 63
    replace(f, "input_offsets", offsets, chunks=(len(offsets),))


DATASET_HARMS = {
    "ids of another type": lambda f: replace(f, "input_ids", np.zeros(19599, "f8"), chunks=(19599,)),
    "far offsets": far_offsets,
    "no checksums": lambda f: f.__delitem__("input_ids_crc32c"),
    "external link": lambda f: (f.__delitem__("input_ids"), f.__setitem__(
        "input_ids", h5py.ExternalLink("other.h5", "/x"))),
    "a model's format": lambda f: f.attrs.__setitem__("format", np.bytes_("drover-model")),
}


@pytest.mark.parametrize("harm", DATASET_HARMS)
def test_hostile_dataset(tmp_path, dataset, harm):
    with h5py.File(dataset, "r+") as f:
        DATASET_HARMS[harm](f)
    refused(BAD_INPUT, *with_dataset(dataset, tmp_path / "out"), says=str(dataset))


def test_missing_or_truncated_dataset(tmp_path, dataset):
    refused(BAD_INPUT, *with_dataset(tmp_path / "absent.h5", tmp_path / "out"), says="no such file")
    os.truncate(dataset, dataset.stat().st_size // 2)
    refused(BAD_INPUT, *with_dataset(dataset, tmp_path / "out2"), says=str(dataset))


def test_dataset_for_another_tokenizer(tmp_path, dataset):
    with h5py.File(dataset, "r+") as f:
        other = b"{}"
        for name in ("tokenizer/tokenizer_json", "tokenizer/tokenizer_json_crc32c"):
            del f[name]
        f["tokenizer"].create_dataset("tokenizer_json", shape=(0,), dtype="u1", chunks=(1,),
                                      maxshape=(None,))
        f["tokenizer"].create_dataset("tokenizer_json_crc32c", shape=(0,), dtype="u4")
        f["tokenizer"].attrs["sha256"] = np.bytes_(hashlib.sha256(other).hexdigest())
    text = fails(tmp_path, 2, BAD_INPUT, *with_dataset(dataset, tmp_path / "out"), "--pp", 2)
    assert "another tokenizer" in text and "import the data again" in text
    assert "another tokenizer" in same_cause(tmp_path / "out", range(2))


# --- sizes that cannot work ----------------------------------------------------------------------

def test_prompt_longer_than_the_model_allows(tmp_path):
    refused(USAGE, "run", *SMALL, "--max-length", 16, "--out", tmp_path / "out",
            says=["positions, the model has 16", "shorten the prompt"])


def test_no_room_for_one_sequence(tmp_path):
    text = fails(tmp_path, 2, USAGE, "run", *SMALL, "--pp", 2, "--kv-memory", 1000,
                 "--out", tmp_path / "out")
    assert "no room for one sequence" in text and "raise --kv-memory to" in text
    assert "no room for one sequence" in same_cause(tmp_path / "out", range(2))
    refused(USAGE, "run", *SMALL, "--kv-memory", "400KB", "--out", tmp_path / "out2",
            says="raise --kv-memory")


# --- the results' folder -------------------------------------------------------------------------

def test_results_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    drover.drover(2, "run", *TINY, "--pp", 2, "--out", out)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*") if p.is_file()}
    text = fails(tmp_path / "again", 2, USAGE, "run", *TINY, "--pp", 2, "--out", out)
    assert "there are results in" in text and "--force" in text
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size)
                      for p in out.rglob("*") if p.is_file()}
    drover.single("run", *TINY, "--out", out, "--force")
    assert json.loads((out / "result.json").read_text())["grid"] == "tp 1 x pp 1 x dp 1"
    assert not (out / "logs/rank-0001.log").exists()


def test_unwritable_output(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    text = fails(tmp_path / "1", 2, ENVIRONMENT, "run", *TINY, "--pp", 2, "--out", file / "out")
    assert "cannot be created" in text and "choose another --out folder" in text
    # A file system that takes nothing, even from root.
    refused(ENVIRONMENT, "run", *TINY, "--out", "/proc/drover", says="choose another --out folder")


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "none", str(disk)],
                             capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no small file system can be mounted here")
    try:
        refused(ENVIRONMENT, "run", "--model", "synthetic:tiny", "--dataset", "synthetic:32x150:64",
                "--demo", "--threads", 1, "--warmup", 1, "--max-sequences", 8,
                "--out", disk / "out", says=str(disk))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
