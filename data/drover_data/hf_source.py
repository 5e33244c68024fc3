"""A Hugging Face folder of a Llama model, GPTQ INT4 or 16-bit, as the store wants it."""

import json
import os

import numpy as np

from . import __version__
from .cli import DataError, Progress, read_json, sha256_file
from .gptq import GptqFormat, open_tensor
from .model_store import StoreWriter, TensorSpec
from .safetensors_files import read_folder
from .tokens import StoredTokenizer

ROWS_AT_ONCE = 2048  # a multiple of the chunk height; bounds the memory
LINEAR = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
          "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
          "down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SAME_INPUT = (("q", "k", "v"), ("gate", "up"))


def architecture_of(config, generation):
    """The attributes of /architecture, but `tied_embeddings`."""
    if config.get("model_type") != "llama":
        raise DataError(f"model_type is '{config.get('model_type')}'; 'llama' is supported")
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"hidden_act is '{config['hidden_act']}'; 'silu' is supported")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_size = config.get("head_dim") or hidden // heads
        rope = config.get("rope_parameters") or {}
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        bos = config.get("bos_token_id")
        if eos is None:
            raise DataError("neither generation_config.json nor config.json has eos_token_id")
        out = {
            "family": "llama", "layers": config["num_hidden_layers"], "hidden": hidden,
            "heads": heads, "kv_heads": config.get("num_key_value_heads") or heads,
            "head_size": head_size, "intermediate": config["intermediate_size"],
            "vocab": config["vocab_size"], "max_positions": config["max_position_embeddings"],
            "norm": "rms", "norm_epsilon": float(config["rms_norm_eps"]), "rope_pairing": "half",
            "rope_dims": head_size,
            "rope_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            "activation": "silu_gated", "eos_ids": eos if isinstance(eos, list) else [eos],
            "bos_id": -1 if bos is None else bos}
        return out | rope_scaling_of(config.get("rope_scaling") or rope, out)
    except KeyError as error:
        raise DataError(f"config.json lacks {error}") from error


def rope_scaling_of(scaling, architecture):
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {"rope_scaling": "none"}
    if kind not in ("linear", "llama3"):
        raise DataError(f"rope scaling '{kind}' is not supported; 'linear' and 'llama3' are")
    original = scaling.get("original_max_position_embeddings", architecture["max_positions"])
    return {"rope_scaling": kind, "rope_factor": float(scaling["factor"]),
            "rope_low_freq_factor": float(scaling.get("low_freq_factor", 1.0)),
            "rope_high_freq_factor": float(scaling.get("high_freq_factor", 1.0)),
            "rope_original_max_positions": original}


def optional_json(folder, name):
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}


def chat_template_of(folder):
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    found = (optional_json(folder, "tokenizer_config.json").get("chat_template")
             or optional_json(folder, "chat_template.json").get("chat_template") or "")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default", "")
    return found


class HfModel:
    """What a folder holds, planned and checked before a byte is written."""

    def __init__(self, folder):
        for name in ("config.json", "tokenizer.json"):
            if not os.path.exists(os.path.join(folder, name)):
                raise DataError(f"{folder} has no {name}; it is part of every Hugging Face "
                                "checkpoint (make tokenizer.json with transformers from a "
                                "tokenizer.model)")
        config = read_json(os.path.join(folder, "config.json"))
        self.tensors, self.paths = read_folder(folder)
        self.architecture = architecture_of(config, optional_json(folder, "generation_config.json"))
        quantization = (config.get("quantization_config")
                        or optional_json(folder, "quantize_config.json"))
        self.form = GptqFormat.of_config(quantization) if quantization else None
        tied = bool(config.get("tie_word_embeddings", False))
        self.architecture["tied_embeddings"] = int(tied)
        self.files = self._name_tensors(tied)
        self._check_biases()
        self._plan()
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            self.tokenizer = StoredTokenizer(file.read(), chat_template_of(folder),
                                             self.architecture["vocab"])

    def _name_tensors(self, tied):
        """{our name: (their name without its last part, rows, columns)}"""
        a = self.architecture
        hidden, wide = a["hidden"], a["intermediate"]
        queries, keys = a["heads"] * a["head_size"], a["kv_heads"] * a["head_size"]
        shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden),
                  "o": (hidden, queries), "gate": (wide, hidden), "up": (wide, hidden),
                  "down": (hidden, wide)}
        out = {"embed": ("model.embed_tokens", a["vocab"], hidden)}
        for layer in range(a["layers"]):
            theirs = f"model.layers.{layer}."
            for part, name in NORMS.items():
                out[f"layers.{layer}.{part}"] = (theirs + name, 1, hidden)
            for part, name in LINEAR.items():
                out[f"layers.{layer}.{part}"] = (theirs + name, *shapes[part])
        out["final_norm"] = ("model.norm", 1, hidden)
        if not tied:
            out["output"] = ("lm_head", a["vocab"], hidden)
        return out

    def _check_biases(self):
        """AutoGPTQ writes biases of zeros; any other bias is not of this family."""
        for name, tensor in self.tensors.items():
            if name.endswith(".bias") and np.asarray(tensor.map()).any():
                raise DataError(f"{name} is not zero; models with biases are not supported")

    def _plan(self):
        self.specs, symmetric, orders, layouts = {}, True, {}, {}
        for name, (theirs, rows, cols) in self.files.items():
            if f"{theirs}.qweight" not in self.tensors:
                continue
            if not self.form:
                raise DataError(f"{theirs} is quantized, but config.json has no "
                                "quantization_config and there is no quantize_config.json")
            tensor = open_tensor(theirs, self.tensors, self.form)
            check_shape(theirs, (tensor.rows, tensor.cols), (rows, cols))
            symmetric &= tensor.symmetric
            orders[name] = tensor.permutation
            layouts[name] = (tensor.group_size, tensor.scale_type)
        self.quantized = set(layouts)
        self._check_orders(orders)
        self.zero_kind = "symmetric" if symmetric else "zero_points"
        self.act_order = any(order is not None for order in orders.values())
        for name, (theirs, rows, cols) in self.files.items():
            if name in self.quantized:
                group, scale = layouts[name]
                self.specs[name] = TensorSpec(name, "int4", rows, cols, group, self.zero_kind,
                                              scale, orders[name] is not None)
            else:
                self.specs[name] = self._plain_spec(name, theirs, rows, cols)

    def _plain_spec(self, name, theirs, rows, cols):
        tensor = self.tensors.get(f"{theirs}.weight")
        if tensor is None:
            raise DataError(f"the checkpoint lacks {theirs}.weight")
        if tensor.dtype not in ("F16", "BF16", "F32"):
            raise DataError(f"{tensor.name} is of type {tensor.dtype}; F16, BF16 or F32 expected")
        check_shape(theirs, tensor.shape, (cols,) if rows == 1 else (rows, cols))
        return TensorSpec(name, tensor.dtype.lower(), rows, cols)

    def _check_orders(self, orders):
        """Parts that read the same activations must want them in the same order."""
        for layer in range(self.architecture["layers"]):
            for parts in SAME_INPUT:
                names = [f"layers.{layer}.{part}" for part in parts]
                found = [orders.get(name) for name in names]
                equal = all(same_order(found[0], other) for other in found[1:])
                if not equal:
                    raise DataError(f"{', '.join(names)} share their input but have different "
                                    "act-order permutations (g_idx); quantize with one order for "
                                    "parts of one input, as AutoGPTQ and GPTQModel do")

    def quantization(self):
        if not self.quantized:
            return "none"
        order = " act-order" if self.act_order else ""
        kind = "sym" if self.zero_kind == "symmetric" else "asym"
        group = "row" if self.form.group_size == -1 else self.form.group_size
        return f"GPTQ 4 bit g{group} {kind}{order} ({self.form.note})"

    def write_tensor(self, writer, name):
        spec, theirs = self.specs[name], self.files[name][0]
        if name in self.quantized:
            tensor = open_tensor(theirs, self.tensors, self.form)
            if tensor.permutation is not None:
                writer.write(name, "permutation", tensor.permutation[None, :])
        else:
            values = self.tensors[f"{theirs}.weight"].map().reshape(spec.rows, spec.cols)
        for begin in range(0, spec.rows, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, spec.rows)
            if name in self.quantized:
                fields = tensor.rows_of(begin, end, self.zero_kind)
            else:
                fields = {"values": values[begin:end]}
            for field, block in fields.items():
                writer.write(name, field, block, begin)
        writer.finish_tensor(name)


def same_order(a, b):
    return a is b or a is not None and b is not None and np.array_equal(a, b)


def check_shape(name, found, wanted):
    if tuple(found) != tuple(wanted):
        raise DataError(f"{name} is {tuple(found)}, config.json makes it {tuple(wanted)}; "
                        "do they belong together?")


def hash_sources(paths, journal):
    """source_files; hashes that an earlier attempt noted are taken over for unchanged files."""
    known = {tuple(entry["file"]): entry["hash"] for entry in journal.entries if "hash" in entry}
    progress = Progress(sum(os.path.getsize(path) for path in paths), "hash")
    out = []
    for path in paths:
        stat = os.stat(path)
        key = (os.path.basename(path), stat.st_size, stat.st_mtime_ns)
        if key in known:
            progress.add(stat.st_size)
        else:
            known[key] = sha256_file(path, progress)
            journal.add(hash=known[key], file=list(key))
        out.append({"name": key[0], "sha256": known[key], "bytes": stat.st_size})
    progress.close()
    return out


def import_hf(folder, out, calibration="unknown", license="unknown", force=False):
    """Writes the model store OUT; called again after an interruption, it goes on."""
    model = HfModel(folder)
    writer = StoreWriter(out, force)
    extra = [os.path.join(folder, name) for name in ("config.json", "tokenizer.json")]
    sources = hash_sources(extra + model.paths, writer.journal)
    origin = {"source_files": json.dumps(sources), "quantization": model.quantization(),
              "calibration_set": calibration, "license": license,
              "importer": f"import_hf {__version__}"}
    writer.begin(model.architecture, origin, model.tokenizer, model.specs.values())
    if writer.resumed:
        print(f"going on: {len(writer.finished)} of {len(model.specs)} tensors are there")
    progress = Progress(sum(spec.stored_bytes() for spec in model.specs.values()), "import")
    for name, spec in model.specs.items():
        if not writer.is_done(name):
            model.write_tensor(writer, name)
        progress.add(spec.stored_bytes())
    progress.close()
    writer.finish()
