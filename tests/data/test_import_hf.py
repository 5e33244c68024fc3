"""GPTQ and 16-bit folders into stores; judged by the weights the folders were made from."""

import json
import os
import signal
import subprocess
import sys
import time

import h5py
import hf_folders
import numpy as np
import pytest
import stores
from conftest import DATA
from drover_data import hf_source, model_store
from drover_data.cli import DataError
from google_crc32c import value as crc32c
from safetensors.numpy import load_file, save_file


def check(path, truth):
    assert stores.wrong_chunks(path, crc32c) == []
    with h5py.File(path, "r") as file:
        assert set(file["tensors"]) == set(truth)
        for name, weights in truth.items():
            np.testing.assert_array_equal(stores.weights_of(file, name), weights, err_msg=name)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_groups(tmp_path, tokenizer_json, group, symmetric):
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    truth = hf_folders.write_gptq(folder, tokenizer_json, group, symmetric)
    hf_source.import_hf(folder, out)
    check(out, truth)
    with h5py.File(out, "r") as file:
        q = stores.attributes(file["tensors/layers.0.q"])
        assert q["zero_kind"] == ("symmetric" if symmetric else "zero_points")
        assert q["group_size"] == (128 if group == -1 else group)
        assert "permutation" not in file["tensors/layers.0.q"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form,meta", [
    ("gptq", None), ("gptq", {"quantizer": ["gptqmodel:2.2.0"]}), ("gptq_v2", None)])
def test_gptq_act_order_and_zero_conventions(tmp_path, tokenizer_json, symmetric, form, meta):
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    truth = hf_folders.write_gptq(folder, tokenizer_json, 32, symmetric, True, form, meta)
    hf_source.import_hf(folder, out)
    check(out, truth)
    with h5py.File(out, "r") as file:
        assert "act-order" in stores.attributes(file["provenance"])["quantization"]
        order = file["tensors/layers.1.down/permutation"][...]
        assert order.shape == (1, 256) and sorted(order[0]) == list(range(256))


def test_codes_are_kept_bit_for_bit(tmp_path, tokenizer_json):
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    hf_folders.write_gptq(folder, tokenizer_json, shards=1)
    hf_source.import_hf(folder, out)
    words = load_file(os.path.join(folder, "model.safetensors"))[
        "model.layers.0.mlp.up_proj.qweight"].view(np.uint32)
    with h5py.File(out, "r") as file:
        codes = file["tensors/layers.0.up/codes"][...]
    for row, col in [(0, 0), (3, 1), (200, 127), (255, 64)]:
        code = words[col // 8, row] >> 4 * (col % 8) & 15
        assert codes[row, col // 2] >> 4 * (col % 2) & 15 == code


def test_different_orders_of_one_input_are_refused(tmp_path, tokenizer_json):
    folder = str(tmp_path / "model")
    hf_folders.write_gptq(folder, tokenizer_json, act_order=True, split_orders=True)
    with pytest.raises(DataError, match="share their input"):
        hf_source.import_hf(folder, str(tmp_path / "model.h5"))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_unquantized(tmp_path, tokenizer_json, dtype):
    """Llama 3: scaled rope, several ends, tied embeddings."""
    random = np.random.default_rng(3)
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    tensors, truth = hf_folders.plain_parts(random)
    del tensors["lm_head.weight"], truth["output"]
    for layer in range(hf_folders.LAYERS):
        for name, shape in hf_folders.LINEAR.items():
            values = random.normal(0, 1, shape).astype(np.float16)
            tensors[f"model.layers.{layer}.{name}.weight"] = values
            truth[f"layers.{layer}.{hf_folders.OURS[name]}"] = values.astype(np.float64)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    hf_folders.write_folder(folder, tensors, hf_folders.config(
        tie_word_embeddings=True, rope_scaling=scaling, rope_theta=500000.0), tokenizer_json, 2)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ bos_token }}x")
    if dtype == "BF16":
        truth = {name: as_bf16(weights) for name, weights in truth.items()}
        make_bf16(tmp_path / "model")
    hf_source.import_hf(folder, out)
    check(out, truth)
    with h5py.File(out, "r") as file:
        a = stores.attributes(file["architecture"])
        assert list(a["eos_ids"]) == [1, 7] and a["tied_embeddings"] == 1
        assert (a["rope_scaling"], a["rope_factor"], a["rope_base"]) == ("llama3", 8.0, 500000.0)
        assert a["rope_original_max_positions"] == 32 and a["rope_high_freq_factor"] == 4.0
        assert file["tokenizer/chat_template"][...].tobytes() == b"{{ bos_token }}x"
        assert stores.attributes(file["tensors/embed"])["kind"] == dtype.lower()


def as_bf16(weights):
    cut = weights.astype(np.float32).view(np.uint32) >> 16
    return (cut << 16).view(np.float32).astype(np.float64)


def make_bf16(folder):
    """Rewrites f16 files as bf16 (truncated); by hand, since numpy has no bf16."""
    for path in folder.glob("*.safetensors"):
        header, blob = {}, b""
        for name, values in load_file(path).items():
            bits = (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
            header[name] = {"dtype": "BF16", "shape": list(values.shape),
                            "data_offsets": [len(blob), len(blob) + len(bits)]}
            blob += bits
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


class Stop(Exception):
    pass


def test_goes_on_after_an_exception(tmp_path, tokenizer_json, monkeypatch):
    """The second run writes only the tensors the first did not finish."""
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    truth = hf_folders.write_gptq(folder, tokenizer_json, act_order=True)
    written, finish = [], model_store.StoreWriter.finish_tensor

    def finish_then_stop(self, name):
        if len(written) == 9:
            raise Stop
        finish(self, name)
        written.append(name)

    monkeypatch.setattr(model_store.StoreWriter, "finish_tensor", finish_then_stop)
    with pytest.raises(Stop):
        hf_source.import_hf(folder, out)
    assert not os.path.exists(out)
    first, written[:] = list(written), []
    with open(f"{out}.part.journal", "ab") as journal:
        journal.write(b'{"tensor": "layers.1.do')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(model_store.StoreWriter, "finish_tensor",
                        lambda self, name: (finish(self, name), written.append(name)))
    hf_source.import_hf(folder, out)
    assert len(first) == 9 and set(first) | set(written) == set(truth)
    assert not set(first) & set(written)
    check(out, truth)
    assert sorted(os.listdir(tmp_path)) == ["model", "model.h5"]


def test_survives_kill_minus_nine(tmp_path, tokenizer_json):
    """Killed at the places a kill hurts most; the last run ends with a right store."""
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    truth = hf_folders.write_gptq(folder, tokenizer_json)
    code = f"""
import os, signal, sys
sys.path.insert(0, {DATA!r})
from drover_data import model_store, hf_source
count, plain = 0, model_store.write_fully
def half_then_die(file, data, offset):
    global count
    count += 1
    if count == int(sys.argv[1]):
        plain(file, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    plain(file, data, offset)
model_store.write_fully = half_then_die
hf_source.import_hf({folder!r}, {out!r})
"""
    for after in (1, 20):
        done = subprocess.run([sys.executable, "-c", code, str(after)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not os.path.exists(out)
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stdout
    check(out, truth)


def test_changed_folder_starts_anew(tmp_path, tokenizer_json, monkeypatch):
    folder, out = str(tmp_path / "model"), str(tmp_path / "model.h5")
    hf_folders.write_gptq(folder, tokenizer_json, seed=1)
    with monkeypatch.context() as patch:
        finish, left = model_store.StoreWriter.finish_tensor, [5]

        def stop_later(self, name):
            left[0] -= 1
            if not left[0]:
                raise Stop
            finish(self, name)

        patch.setattr(model_store.StoreWriter, "finish_tensor", stop_later)
        with pytest.raises(Stop):
            hf_source.import_hf(folder, out)
    time.sleep(0.01)
    truth = hf_folders.write_gptq(folder, tokenizer_json, seed=2)
    hf_source.import_hf(folder, out)
    check(out, truth)


def test_bad_folders(tmp_path, tokenizer_json):
    def refused(match, change):
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        hf_folders.write_gptq(str(folder), tokenizer_json, shards=1)
        change(folder)
        with pytest.raises(DataError, match=match):
            hf_source.import_hf(str(folder), str(folder / "out.h5"))
        assert not (folder / "out.h5").exists()

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def edit_config(**changes):
        def change(folder):
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return change

    def edit_tensor(name, values):
        def change(folder):
            path = str(folder / "model.safetensors")
            save_file(load_file(path) | {name: values}, path)
        return change

    refused("cut off", cut)
    refused("'llama' is supported", edit_config(model_type="qwen2"))
    refused("in 8 bits", edit_config(quantization_config={"bits": 8, "quant_method": "gptq"}))
    refused("wants scales", edit_config(
        quantization_config={"bits": 4, "quant_method": "gptq", "group_size": 64}))
    refused("do they belong together", edit_config(intermediate_size=512))
    refused("do they belong together", edit_config(vocab_size=200))
    refused("biases are not supported", edit_tensor(
        "model.layers.0.self_attn.q_proj.bias", np.ones(128, np.float16)))
    refused("g_idx", edit_tensor(
        "model.layers.0.mlp.down_proj.g_idx", np.zeros(256, np.int32)))
    refused("lacks", edit_config(num_hidden_layers=3))
    refused("not valid JSON", lambda folder: (folder / "config.json").write_text("{"))
    refused("header", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64))


def test_existing_output_is_kept(tmp_path, tokenizer_json):
    folder, out = str(tmp_path / "model"), tmp_path / "model.h5"
    hf_folders.write_gptq(folder, tokenizer_json)
    out.write_text("precious")
    tool = [sys.executable, os.path.join(DATA, "import_hf.py"), folder, "--out", str(out)]
    refused = subprocess.run(tool, capture_output=True, text=True)
    assert refused.returncode == 3 and "--force" in refused.stderr
    assert out.read_text() == "precious"
    assert subprocess.run([*tool, "--force"], capture_output=True).returncode == 0
    assert out.stat().st_size > 1000
