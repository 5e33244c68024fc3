"""Question/answer JSON lines into a dataset."""

import json

from .cli import DataError, source_file
from .dataset_file import write_dataset


def read_lines(path):
    """[{question, answer, system?}]"""
    rows = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                good = isinstance(row["question"], str) and isinstance(row.get("answer", ""), str)
            except (ValueError, KeyError, TypeError, AttributeError):
                good = False
            if not good or not row["question"].strip():
                raise DataError(f'{path}:{number}: expected one JSON object a line like '
                                '{"question": "…", "answer": "…"} with an optional "system"')
            rows.append(row)
    return rows


def import_qa(path, out, prompter, name, max_input=0, force=False, made_from=()):
    """Writes the dataset OUT; questions longer than max_input tokens are an error (0: no limit).

    made_from: files that the JSON lines were made from, for the provenance.
    """
    rows = read_lines(path)
    inputs = [prompter.prompt(row["question"], row.get("system", "")) for row in rows]
    for row, ids in zip(rows, inputs):
        if max_input and len(ids) > max_input:
            raise DataError(f"a prompt has {len(ids)} tokens, more than --max-input {max_input}: "
                            f"{row['question'][:60]!r}")
    answers = [row.get("answer", "").strip() for row in rows]
    lengths = [len(prompter.raw(answer)) for answer in answers]
    write_dataset(out, name, prompter.stored, inputs, lengths, answers,
                  [row["question"] for row in rows],
                  [source_file(source) for source in (*made_from, path)], force=force)
    return len(rows)
