#!/usr/bin/env python3
"""A dataset of random token ids with lengths like Open Orca's; results with it are marked."""

import argparse
import os

from drover_data.cli import run
from drover_data.synthetic import make_synthetic
from drover_data.tokens import StoredTokenizer

LENGTHS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "openorca_lengths.csv")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="the model store whose ids to use")
    parser.add_argument("--out", required=True, help="the dataset to write")
    parser.add_argument("--lengths", default=LENGTHS, help="CSV of input_tokens,output_tokens "
                        "(default: Open Orca's)")
    parser.add_argument("--count", type=int, default=0, help="samples (default: the CSV's rows)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    tokenizer = StoredTokenizer.read(args.model)
    count = make_synthetic(args.lengths, args.out, tokenizer, args.count, args.seed, args.force)
    print(f"{args.out}: {count} samples")


if __name__ == "__main__":
    run(main)
