#!/usr/bin/env python3
"""Text to token ids, as one line of JSON: [1, 9690, ...]. Without --text, reads stdin."""

import argparse
import json
import sys

from drover_data.cli import DataError, run
from drover_data.tokens import Prompter


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the model store: tokenizer, template")
    parser.add_argument("--text", help="the question (default: all of stdin)")
    parser.add_argument("--system", default="", help="a system message")
    parser.add_argument("--raw", action="store_true", help="no chat template, no special tokens")
    args = parser.parse_args()
    text = sys.stdin.read().removesuffix("\n") if args.text is None else args.text
    prompter = Prompter.of_model(args.model)
    ids = prompter.raw(text) if args.raw else prompter.prompt(text, args.system)
    if not ids:
        raise DataError("the text is empty; give some with --text or on stdin")
    print(json.dumps(ids))


if __name__ == "__main__":
    run(main)
