"""Checksums, chunks, decoding tables and datasets."""

import h5py
import numpy as np
import pytest
import stores
from drover_data import hdf5, weights
from drover_data.cli import DataError
from drover_data.dataset_file import Dataset, write_dataset
from drover_data.model_store import StoreWriter, TensorSpec
from drover_data.tokens import (DecodingTable, Prompter, StoredTokenizer, load_tokenizer,
                                render_chat)


def test_crc_is_castagnoli():
    assert stores.crc32c_slow(b"123456789") == 0xE3069283  # the catalogue's check value
    data = np.arange(100, dtype=np.uint16)
    assert hdf5.crc32c(data) == stores.crc32c_slow(data.tobytes())


def test_nibbles():
    codes = np.random.default_rng(1).integers(0, 16, (5, 64), dtype=np.uint8)
    packed = weights.pack_pairs(codes)
    assert packed[2, 3] == codes[2, 6] | codes[2, 7] << 4
    np.testing.assert_array_equal(weights.unpack_pairs(packed), codes)


ARCHITECTURE = {"family": "llama", "layers": 1}


def test_chunks_of_the_format(tmp_path, tokenizer_json):
    """Sizes that do not fill their last chunks; the slow checksum judges."""
    path = str(tmp_path / "model.h5")
    spec = TensorSpec("q", "int4", 520, 1120, 32, "minimums", "bf16", True)
    random = np.random.default_rng(2)
    values = {"codes": random.integers(0, 256, (520, 560), dtype=np.uint8),
              "scales": random.integers(0, 65536, (520, 35), dtype=np.uint16),
              "minimums": random.integers(0, 65536, (520, 35), dtype=np.uint16),
              "permutation": random.permutation(1120).astype(np.int32)[None, :]}
    writer = StoreWriter(path)
    writer.begin(ARCHITECTURE, {}, StoredTokenizer(tokenizer_json), [spec])
    for field, data in values.items():
        writer.write("q", field, data[:512])
        if len(data) > 512:
            writer.write("q", field, data[512:], 512)
    writer.finish_tensor("q")
    writer.finish()
    with h5py.File(path, "r") as file:
        group = file["tensors/q"]
        for field, data in values.items():
            np.testing.assert_array_equal(group[field][...], data)
        assert group["codes"].chunks == (512, 256) and group["codes_crc32c"].shape == (2, 3)
        assert group["scales"].chunks == (512, 35) and group["permutation"].chunks == (1, 512)
        assert group["codes_crc32c"].chunks is None  # contiguous
        assert file["tokenizer/chat_template"].shape == (0,)
        assert file["tokenizer/chat_template"].chunks == (1,)
        assert file["tokenizer/chat_template_crc32c"].shape == (0,)
    assert stores.wrong_chunks(path, stores.crc32c_slow) == []
    with open(path, "r+b") as file:  # a flipped bit is seen
        with h5py.File(path, "r") as store:
            at = store["tensors/q/codes"].id.get_chunk_info(4).byte_offset
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert len(stores.wrong_chunks(path, stores.crc32c_slow)) == 1


def test_writer_refuses_parts(tmp_path, tokenizer_json):
    writer = StoreWriter(str(tmp_path / "model.h5"))
    spec = TensorSpec("q", "f16", 1024, 32)
    writer.begin(ARCHITECTURE, {}, StoredTokenizer(tokenizer_json), [spec])
    with pytest.raises(ValueError):
        writer.write("q", "values", np.zeros((100, 32), np.uint16))  # not a whole chunk
    with pytest.raises(ValueError):
        writer.finish()
    with pytest.raises(DataError, match="another import"):
        StoreWriter(str(tmp_path / "model.h5"))


TEXTS = ["the cat. a the", "naïve ☃ text\n\n  x 12345", "a", "  two spaces", "", "tab\there"]


@pytest.mark.parametrize("which", ["tokenizer_json", "sentencepiece_json"])
def test_tables_decode_as_the_tokenizer_does(which, request):
    content = request.getfixturevalue(which)
    tokenizer, table = load_tokenizer(content), DecodingTable.of(content)
    assert table.strip_leading_space == (which == "sentencepiece_json")
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert table.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
        assert table.decode([1, *ids, 1]) == text


def test_table_covers_the_vocabulary(tokenizer_json):
    table = DecodingTable.of(tokenizer_json, 300)  # padded: more rows than tokens
    assert len(table.pieces) == 300 and table.pieces[299] == b"" and table.special[299]
    with pytest.raises(DataError, match="another model"):
        DecodingTable.of(tokenizer_json, 200)


def test_chat_templates_cannot_reach_out():
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat("{{ bos_token }}{{ messages[0].content }}", messages, "<s>") == "<s>hi"
    for hostile in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% if %}"):
        with pytest.raises(DataError):
            if render_chat(hostile, messages) == "":
                raise DataError("the sandbox made it nothing")


def test_dataset_round_trip(tmp_path, tokenizer_json):
    path = str(tmp_path / "set.h5")
    stored = StoredTokenizer(tokenizer_json, "{{ messages[0]['content'] }}</s>")
    prompter = Prompter(stored)
    texts = ["hello", "wörld", "x"]
    inputs = [prompter.prompt(text) for text in texts]
    assert inputs[0][0] == 258 and all(ids[-1] == 1 for ids in inputs)  # "he" merged, </s>
    write_dataset(path, "three", stored, inputs, [4, 0, 6], ["réf", "", "z"], texts)
    assert stores.wrong_chunks(path, stores.crc32c_slow) == []
    read = Dataset(path)
    assert [ids.tolist() for ids in read.inputs] == inputs and read.questions == texts
    assert read.references == ["réf", "", "z"] and read.output_lengths.tolist() == [4, 0, 6]
    assert read.vocab == 259 and read.tokenizer_sha256 == stored.sha256
    assert StoredTokenizer.read(path).table.decode(inputs[1]) == "wörld"
    with pytest.raises(DataError, match="already there"):
        write_dataset(path, "three", stored, inputs, [4, 0, 6])
    with pytest.raises(DataError, match="another model"):
        write_dataset(path, "bad", stored, [[9999]], [1], force=True)
    with pytest.raises(DataError, match="0 tokens"):
        write_dataset(path, "bad", stored, [[]], [1], force=True)
