#!/usr/bin/env python3
"""Question/answer JSON lines ({"question", "answer", optional "system"}) into a dataset."""

import argparse
import os

from drover_data.cli import run
from drover_data.qa import import_qa
from drover_data.tokens import Prompter, StoredTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", help="the JSON lines")
    parser.add_argument("--out", required=True, help="the dataset to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="take tokenizer and chat template of this model store")
    source.add_argument("--tokenizer", help="a tokenizer.json")
    parser.add_argument("--chat-template", help="a Jinja file, with --tokenizer")
    parser.add_argument("--name", help="the dataset's name (default: the input's)")
    parser.add_argument("--max-input", type=int, default=0, help="longest prompt allowed, in "
                        "tokens (default: no limit)")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    if args.model and args.chat_template:
        parser.error("--chat-template goes with --tokenizer; a model store has its own")
    name = args.name or os.path.splitext(os.path.basename(args.input))[0]
    if args.model:
        prompter = Prompter.of_model(args.model)
    else:
        template = ""
        if args.chat_template:
            with open(args.chat_template, encoding="utf-8") as file:
                template = file.read()
        with open(args.tokenizer, encoding="utf-8") as file:
            prompter = Prompter(StoredTokenizer(file.read(), template))
    count = import_qa(args.input, args.out, prompter, name, args.max_input, args.force)
    print(f"{args.out}: {count} samples")


if __name__ == "__main__":
    run(main)
