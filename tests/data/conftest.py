"""What the tests of the data tools share: the tools' folder on the path, small tokenizers."""

import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
DATA = os.path.join(ROOT, "data")
sys.path[:0] = [HERE, DATA]

import hf_folders  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer_json():
    return hf_folders.byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece_json():
    """Like Llama 2's: byte fallback, U+2581 for spaces, the first one stripped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581",
              *"abcdefghijklmnopqrstuvwxyz.", "\u2581a", "th", "\u2581th"]
    merges = [("\u2581", "a"), ("t", "h"), ("\u2581", "th")]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges,
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()
