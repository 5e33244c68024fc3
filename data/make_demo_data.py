#!/usr/bin/env python3
"""The demo's dataset: real questions with human answers from the wheel chatterbot-corpus 1.3.3."""

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import zipfile

import yaml
from drover_data.cli import DataError, check_output, run, write_text_atomically
from drover_data.qa import import_qa
from drover_data.tokens import Prompter

CATEGORIES = ("trivia", "science", "history", "literature", "computers", "money", "movies",
              "politics", "psychology", "sports", "ai", "coding", "health", "food")
QUESTION_WORD = re.compile(r"^(who|whom|whose|what|when|where|why|how|which|is|are|was|were|do|"
                           r"does|did|can|could|should|would|will|has|have)\b", re.IGNORECASE)
SEED = "drover demo 1"


def is_question(text):
    """By its question mark, or by how it begins (much of the corpus leaves the mark out)."""
    return text.endswith("?") or bool(QUESTION_WORD.match(text))


def read_corpus(wheel):
    """{category: [(question, answer)]} without duplicates, in the corpus' own order."""
    pairs, seen = {}, set()
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheel} is not a wheel: {error}") from error
    for category in CATEGORIES:
        name = f"chatterbot_corpus/data/english/{category}.yml"
        try:
            content = yaml.safe_load(io.BytesIO(archive.read(name)))
        except KeyError as error:
            raise DataError(f"{wheel} lacks {name}; "
                            "chatterbot-corpus 1.3.3 was expected") from error
        pairs[category] = []
        for lines in content["conversations"]:
            if len(lines) < 2:
                continue
            question, answer = (" ".join(str(lines[0]).split()), str(lines[1]).strip())
            key = re.sub(r"\W+", " ", question.casefold()).strip()
            if not is_question(question) or not answer or is_question(answer) or key in seen:
                continue
            seen.add(key)
            pairs[category].append((question, answer))
    return pairs


def mixed(pairs):
    """One of each category in turn while it lasts, each category in an order fixed by SEED."""
    def place(pair):
        return hashlib.sha256(f"{SEED}:{pair[0]}".encode()).hexdigest()

    columns = [[(c, *pair) for pair in sorted(pairs[c], key=place)] for c in CATEGORIES]
    turns = itertools.zip_longest(*columns)
    return [entry for turn in turns for entry in turn if entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", help="chatterbot_corpus-1.3.3-py2.py3-none-any.whl")
    parser.add_argument("--model", required=True, help="the model store: tokenizer, template")
    parser.add_argument("--out", required=True, help="the dataset to write; the JSON lines go "
                        "beside it")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    check_output(args.out, args.force)
    rows = [{"question": question, "answer": answer, "category": category}
            for category, question, answer in mixed(read_corpus(args.wheel))]
    lines = os.path.splitext(args.out)[0] + ".jsonl"
    write_text_atomically(lines, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    prompter = Prompter.of_model(args.model)
    count = import_qa(lines, args.out, prompter, "chatterbot-corpus 1.3.3", force=args.force,
                      made_from=[args.wheel])
    print(f"{args.out}: {count} samples")


if __name__ == "__main__":
    run(main)
