#!/usr/bin/env python3
"""A Hugging Face folder (Llama; GPTQ INT4 or 16-bit safetensors) into a model store.

Goes on where an interrupted import of the same folder stopped.
"""

import argparse

from drover_data.cli import run
from drover_data.hf_source import import_hf


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="with config.json, tokenizer.json and *.safetensors")
    parser.add_argument("--out", required=True, help="the model store to write")
    parser.add_argument("--calibration", default="unknown", help="the calibration set, for the "
                        "store's provenance (default: unknown)")
    parser.add_argument("--license", default="unknown", help="of the weights (default: unknown)")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args()
    import_hf(args.folder, args.out, args.calibration, args.license, args.force)


if __name__ == "__main__":
    run(main)
