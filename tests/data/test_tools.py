"""The tools as commands: questions to datasets, encode, synthetic lengths, the demo's data."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from conftest import DATA
from drover_data.dataset_file import Dataset
from drover_data.model_store import StoreWriter
from drover_data.tokens import StoredTokenizer

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}"
            "{% endfor %}")


def tool(name, *args, text=None):
    return subprocess.run([sys.executable, os.path.join(DATA, name), *map(str, args)],
                          capture_output=True, text=True, input=text)


@pytest.fixture
def model(tmp_path, tokenizer_json):
    """A store without tensors: tokenizer, template and ends are there."""
    path = str(tmp_path / "model.h5")
    writer = StoreWriter(path)
    writer.begin({"family": "llama", "bos_id": 0, "eos_ids": [1]}, {},
                 StoredTokenizer(tokenizer_json, TEMPLATE), [])
    writer.finish()
    return path


def test_encode(model, tokenizer_json):
    plain = StoredTokenizer(tokenizer_json).table
    done = tool("encode.py", "--model", model, "--text", "he é")
    ids = json.loads(done.stdout)
    assert ids[0] == 0 and ids[-1] == 1 and plain.decode(ids) == "uhe é"
    assert json.loads(tool("encode.py", "--model", model, text="he é\n").stdout) == ids
    raw = json.loads(tool("encode.py", "--model", model, "--raw", "--text", "he").stdout)
    assert raw == [258]
    both = json.loads(tool("encode.py", "--model", model, "--text", "x", "--system", "y").stdout)
    assert plain.decode(both) == "syux" and both.count(1) == 2
    refused = tool("encode.py", "--model", __file__, "--text", "x")
    assert refused.returncode == 3 and "not a drover store" in refused.stderr


def test_import_qa(tmp_path, model):
    lines, out = tmp_path / "qa.jsonl", tmp_path / "qa.h5"
    lines.write_text('{"question": "he?", "answer": " yes "}\n\n{"question": "b", "answer": "c"}\n')
    done = tool("import_qa.py", lines, "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    read = Dataset(str(out))
    assert read.name == "qa" and read.references == ["yes", "c"]
    assert read.output_lengths.tolist() == [3, 1] and len(read.inputs[0]) == 5
    assert read.tokenizer_sha256 == StoredTokenizer.read(model).sha256
    assert tool("import_qa.py", lines, "--model", model, "--out", out).returncode == 3
    long = tool("import_qa.py", lines, "--model", model, "--out", out, "--force",
                "--max-input", 4)
    assert long.returncode == 3 and "more than --max-input 4" in long.stderr
    lines.write_text('{"question": "ok"}\n{"answer": "no question"}\n')
    bad = tool("import_qa.py", lines, "--model", model, "--out", out, "--force")
    assert bad.returncode == 3 and "qa.jsonl:2" in bad.stderr


def test_import_qa_with_a_tokenizer_file(tmp_path, sentencepiece_json):
    (tmp_path / "tokenizer.json").write_text(sentencepiece_json, encoding="utf-8")
    (tmp_path / "template.jinja").write_text("[{{ messages[0].content }}]")
    lines = tmp_path / "qa.jsonl"
    lines.write_text('{"question": "the cat"}\n')
    done = tool("import_qa.py", lines, "--tokenizer", tmp_path / "tokenizer.json",
                "--chat-template", tmp_path / "template.jinja", "--out", tmp_path / "qa.h5")
    assert done.returncode == 0, done.stderr
    table = StoredTokenizer.read(str(tmp_path / "qa.h5")).table
    assert table.decode(Dataset(str(tmp_path / "qa.h5")).inputs[0].tolist()) == "[the cat]"


def test_synthetic(tmp_path, model):
    out = tmp_path / "syn.h5"
    for _ in range(2):
        done = tool("make_synthetic.py", "--model", model, "--out", out, "--count", 2010,
                    "--seed", 3, "--force")
        assert done.returncode == 0, done.stderr
    read = Dataset(str(out))
    with open(os.path.join(DATA, "openorca_lengths.csv"), encoding="utf-8") as file:
        rows = [tuple(map(int, row.split(","))) for row in file.read().split()[1:]]
    assert len(rows) == 2000 and len(read) == 2010
    found = list(zip(map(len, read.inputs), read.output_lengths.tolist()))
    assert found == rows + rows[:10]
    assert min(ids.min() for ids in read.inputs) >= 2  # no special ids
    (tmp_path / "bad.csv").write_text("input_tokens,output_tokens\n5,x\n")
    bad = tool("make_synthetic.py", "--model", model, "--out", out, "--lengths",
               tmp_path / "bad.csv", "--force")
    assert bad.returncode == 3 and "bad.csv:2" in bad.stderr


CATEGORIES = ("trivia", "science", "history", "literature", "computers", "money", "movies",
              "politics", "psychology", "sports", "ai", "coding", "health", "food")


def test_demo_data(tmp_path, model):
    """Questions with answers only, once each, mixed over the categories, always the same."""
    wheel, out = tmp_path / "corpus.whl", tmp_path / "demo.h5"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in CATEGORIES:
            archive.writestr(f"chatterbot_corpus/data/english/{name}.yml", f"""
conversations:
- - What is {name} one?
  - First.
  - And more.
- - what  is {name.upper()} ONE
  - A second time.
- - who knows {name}
  - '1963'
- - What of {name}?
  - What do you mean?
- - Nice {name}
  - Not a question.
- - Why alone?
""")
    done = tool("make_demo_data.py", wheel, "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(CATEGORIES) == len(Dataset(str(out)))
    assert {row["category"] for row in rows[:14]} == set(CATEGORIES)
    assert {row["answer"] for row in rows} == {"First.", "1963"}
    again = tmp_path / "again.h5"
    assert tool("make_demo_data.py", wheel, "--model", model, "--out", again).returncode == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "demo.jsonl").read_text()
