#!/usr/bin/env python3
"""MLPerf's open_orca_gpt4_tokenized_llama.sampled_24576.pkl into a dataset.

The pickle is read by an unpickler that admits only what a pandas table needs.
"""

import argparse

from drover_data.cli import run
from drover_data.openorca import import_openorca
from drover_data.tokens import StoredTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", help="the pickle")
    parser.add_argument("--out", required=True, help="the dataset to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="take the tokenizer of this model store")
    source.add_argument("--tokenizer", help="Llama 2's tokenizer.json")
    parser.add_argument("--name", default="open-orca", help="the dataset's name")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    if args.model:
        tokenizer = StoredTokenizer.read(args.model)
    else:
        with open(args.tokenizer, encoding="utf-8") as file:
            tokenizer = StoredTokenizer(file.read())
    count = import_openorca(args.input, args.out, tokenizer, args.name, args.force)
    print(f"{args.out}: {count} samples")


if __name__ == "__main__":
    run(main)
