"""Tokenizers: decoding tables, chat templates, and a tokenizer.json out of GGUF's lists."""

import dataclasses
import json
import re

import h5py
import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import hdf5
from .cli import DataError, sha256_bytes

BYTE_PIECE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def byte_level_alphabet():
    """GPT-2's map from printable characters to the bytes they stand for.

    Bytes that print stand for themselves; the others take the characters from U+0100 on.
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = [byte for byte in range(256) if byte not in prints]
    alphabet = {chr(byte): byte for byte in prints}
    alphabet.update({chr(0x100 + at): byte for at, byte in enumerate(shifted)})
    return alphabet


ALPHABET = byte_level_alphabet()


def byte_level_bytes(piece):
    if all(char in ALPHABET for char in piece):
        return bytes(ALPHABET[char] for char in piece)
    return piece.encode("utf-8")


def sentencepiece_bytes(piece):
    if found := BYTE_PIECE.match(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def nodes(tree):
    """All objects of a part of tokenizer.json that have a type."""
    if isinstance(tree, dict):
        if "type" in tree:
            yield tree
        for child in tree.values():
            yield from nodes(child)
    elif isinstance(tree, list):
        for child in tree:
            yield from nodes(child)


@dataclasses.dataclass
class DecodingTable:
    """Raw bytes of each token; ids that the model has and the tokenizer lacks are empty."""

    pieces: list
    special: np.ndarray  # uint8 [vocab]
    strip_leading_space: bool

    @classmethod
    def of(cls, tokenizer_json, vocab=0):
        tokenizer = load_tokenizer(tokenizer_json)
        tree = json.loads(tokenizer_json)
        steps = list(nodes(tree.get("decoder")))
        kinds = {step["type"] for step in steps}
        if "ByteLevel" in kinds:
            to_bytes, strip = byte_level_bytes, False
        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
            to_bytes = sentencepiece_bytes
            strip = any(step["type"] == "Strip" and step.get("start", 0) > 0
                        or step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"
                        for step in steps)
        else:
            raise DataError(f"the tokenizer's decoder ({sorted(kinds) or 'none'}) is neither "
                            "byte-level BPE nor SentencePiece-like; only these are supported")
        added = tokenizer.get_added_tokens_decoder()
        table = tokenizer.get_vocab(with_added_tokens=True)
        size = max([vocab, *(id + 1 for id in table.values())])
        if vocab and size > vocab:
            raise DataError(f"the tokenizer has {size} tokens and the model {vocab}; "
                            "this tokenizer belongs to another model")
        pieces, special = [b""] * size, np.ones(size, np.uint8)
        for piece, id in table.items():
            token = added.get(id)
            pieces[id] = piece.encode("utf-8") if token else to_bytes(piece)
            special[id] = bool(token and token.special)
        return cls(pieces, special, strip)

    def decode(self, ids):
        """Text of ids, special ones skipped, as MLPerf's scorer wants it."""
        known = [id for id in ids if 0 <= id < len(self.pieces) and not self.special[id]]
        text = b"".join(self.pieces[id] for id in known)
        if self.strip_leading_space and text.startswith(b" "):
            text = text[1:]
        return text.decode("utf-8", errors="replace")


def load_tokenizer(tokenizer_json):
    try:
        return Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer.json cannot be used: {error}") from error


class StoredTokenizer:
    """What group /tokenizer of both formats holds."""

    def __init__(self, tokenizer_json, chat_template="", vocab=0, table=None, sha256=None):
        self.json = tokenizer_json
        self.chat_template = chat_template
        self.table = table or DecodingTable.of(tokenizer_json, vocab)
        self.sha256 = sha256 or sha256_bytes(tokenizer_json.encode("utf-8"))

    def write(self, file):
        group = file.create_group("tokenizer")
        strip = int(self.table.strip_leading_space)
        hdf5.set_attributes(group, {"sha256": self.sha256, "strip_leading_space": strip})
        hdf5.write_bytes(group, "tokenizer_json", self.json.encode("utf-8"))
        hdf5.write_bytes(group, "chat_template", self.chat_template.encode("utf-8"))
        hdf5.write_bytes(group, "pieces", b"".join(self.table.pieces))
        hdf5.write_1d(group, "offsets", hdf5.offsets_of(self.table.pieces, np.uint32))
        hdf5.write_1d(group, "special", self.table.special)

    @classmethod
    def read(cls, path):
        """From a model store or a dataset."""
        try:
            with h5py.File(path, "r") as file:
                group = file["tokenizer"]
                for name in ("tokenizer_json", "chat_template", "pieces", "offsets", "special"):
                    if not hdf5.check_crcs(group, name):
                        raise DataError(f"{path}: /tokenizer/{name} does not match its checksum")
                blob, offsets = group["pieces"][...].tobytes(), group["offsets"][...].tolist()
                pieces = [blob[a:b] for a, b in zip(offsets, offsets[1:])]
                strip = bool(hdf5.attributes(group)["strip_leading_space"])
                table = DecodingTable(pieces, group["special"][...], strip)
                return cls(group["tokenizer_json"][...].tobytes().decode("utf-8"),
                           group["chat_template"][...].tobytes().decode("utf-8"),
                           table=table, sha256=hdf5.attributes(group)["sha256"])
        except FileNotFoundError as error:
            raise DataError(f"{path} is not there") from error
        except (KeyError, OSError) as error:
            raise DataError(f"{path} is not a drover store or dataset: {error}") from error


def render_chat(template, messages, bos_token="", eos_token=""):
    """A chat template's text, ending where the answer begins; the template is not trusted."""
    def give_up(message):
        raise DataError(f"the chat template says: {message}")

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = give_up
    env.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent)
    # No strftime_now: templates that ask whether it is there leave the date out, or take a fixed
    # one, so that a dataset made tomorrow has the same ids.
    try:
        return env.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos_token,
            eos_token=eos_token)
    except jinja2.exceptions.TemplateError as error:
        raise DataError(f"the chat template fails: {error}") from error


class Prompter:
    """Questions to token ids."""

    def __init__(self, stored, bos_id=-1, eos_ids=()):
        if not stored.json:
            raise DataError("this file holds no tokenizer.json; name the model store instead")
        self.stored = stored
        self.tokenizer = load_tokenizer(stored.json)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.bos = self.tokenizer.id_to_token(bos_id) if bos_id >= 0 else None
        self.eos = self.tokenizer.id_to_token(eos_ids[0]) if len(eos_ids) else None

    @classmethod
    def of_model(cls, path):
        stored = StoredTokenizer.read(path)
        with h5py.File(path, "r") as file:
            if "architecture" not in file:
                raise DataError(f"{path} is a dataset; name the model store instead")
            attributes = hdf5.attributes(file["architecture"])
            return cls(stored, int(attributes["bos_id"]), attributes["eos_ids"].tolist())

    def prompt(self, question, system=""):
        """Ids of a question in the chat template; without one, the bare text."""
        if not self.stored.chat_template:
            text = f"{system}\n\n{question}" if system else question
            return self.tokenizer.encode(text).ids
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        text = render_chat(self.stored.chat_template, messages, self.bos or "", self.eos or "")
        # The template writes the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def raw(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


DIGITS_THEN_WORDS = [pre_tokenizers.Digits(individual_digits=True),
                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(DIGITS_THEN_WORDS),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}
CONTROL, USER_DEFINED = 3, 4  # GGUF's token types


def tokenizer_json_of_gguf(fields):
    """A tokenizer.json from GGUF's tokenizer.ggml.* values (byte-level BPE)."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise DataError(f"the GGUF's tokenizer is '{model}' with pre-tokenizer '{pre}'; from "
                        f"'gpt2' with one of {sorted(PRE_TOKENIZERS)} a tokenizer.json can be "
                        "built; for others give the model's own file with --tokenizer")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as it is, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t, k in zip(tokens, types) if k == CONTROL]
    plain = [AddedToken(t, special=False, normalized=False)
             for t, k in zip(tokens, types) if k == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    if tokenizer.get_vocab_size() != len(tokens):
        raise DataError("the GGUF's token list has duplicates; the file is damaged")
    return tokenizer.to_str()
