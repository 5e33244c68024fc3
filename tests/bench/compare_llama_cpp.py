#!/usr/bin/env python3
"""Prompt and decode tokens/s of llama.cpp and of drover on the same model and the same cores.

    tests/bench/compare_llama_cpp.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf \
        --model build/demo/smollm2-135m.h5 --drover build/release/drover --threads 2

llama.cpp is llama-bench when that is on the PATH, else the Python package llama_cpp. Without
either it says so and ends with 77 (skipped, to ctest). Both run one sequence, greedy, with the same
numbers of tokens; drover also runs batches of 8 and 64, which llama-bench has no like of.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SKIPPED = 77


def with_llama_bench(tool, o):
    """llama-bench times prompts (pp) and answers (tg) apart, each from an empty context."""
    p = subprocess.run(
        [tool, "-m", o.gguf, "-p", str(o.prompt_tokens), "-n", str(o.new_tokens), "-t",
         str(o.threads), "-r", str(o.repeat), "-o", "json"],
        capture_output=True, text=True, check=False)
    if p.returncode != 0:
        sys.exit(f"{tool} ended with {p.returncode}:\n{p.stderr[-2000:]}")
    rows = json.loads(p.stdout)
    prompt = next(r["avg_ts"] for r in rows if r["n_gen"] == 0)
    decode = next(r["avg_ts"] for r in rows if r["n_prompt"] == 0)
    return prompt, decode, f"llama-bench, build {rows[0].get('build_commit', 'unknown')}"


def with_package(llama_cpp, o):
    """The low-level calls through the package's Llama, without its sampling."""
    llm = llama_cpp.Llama(model_path=o.gguf, n_ctx=o.prompt_tokens + o.new_tokens + 8,
                          n_threads=o.threads, n_threads_batch=o.threads, verbose=False)
    tokens = [100 + 7 * i % 1000 for i in range(o.prompt_tokens)]
    prompts, decodes = [], []
    for i in range(o.repeat + 1):
        llm.reset()
        begin = time.perf_counter()
        llm.eval(tokens)
        middle = time.perf_counter()
        for t in range(o.new_tokens):
            llm.eval([100 + t])
        end = time.perf_counter()
        if i > 0:  # the first is the warm-up
            prompts.append(o.prompt_tokens / (middle - begin))
            decodes.append(o.new_tokens / (end - middle))
    return (statistics.median(prompts), statistics.median(decodes),
            f"llama-cpp-python {llama_cpp.__version__}")


def llama_cpp(o):
    tool = shutil.which("llama-bench")
    if tool:
        return with_llama_bench(tool, o)
    try:
        import llama_cpp as package
    except ImportError:
        print("skipped: llama.cpp is not here (neither llama-bench on the PATH nor the Python "
              "package llama-cpp-python)")
        sys.exit(SKIPPED)
    return with_package(package, o)


def drover(o):
    root = pathlib.Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "bench.json"
        command = [str(root / "tests/mpi/mpirun.sh"), "1", o.drover, "bench", "step", "--model",
                   o.model, "--threads", str(o.threads), "--prompt-tokens", str(o.prompt_tokens),
                   "--new-tokens", str(o.new_tokens), "--batches", "1,8,64", "--repeat",
                   str(o.repeat), "--log-level", "warn", "--json", str(file)]
        p = subprocess.run(command, capture_output=True, text=True, check=False)
        if p.returncode != 0:
            sys.exit(f"drover ended with {p.returncode}:\n{p.stderr[-2000:]}")
        return json.loads(file.read_text())


def main():
    a = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--gguf", required=True, help="the file that the store was imported from")
    a.add_argument("--model", required=True, help="drover's model store")
    a.add_argument("--drover", required=True, help="the program")
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--prompt-tokens", type=int, default=128)
    a.add_argument("--new-tokens", type=int, default=64)
    a.add_argument("--repeat", type=int, default=3)
    o = a.parse_args()

    prompt, decode, name = llama_cpp(o)
    bench = drover(o)
    print(f"{o.prompt_tokens} prompt tokens, {o.new_tokens} new ones, {o.threads} threads\n")
    print(f"{'':<28} {'batch':>5} {'prompt tok/s':>13} {'decode tok/s':>13}")
    print(f"{name:<28} {1:>5} {prompt:>13.1f} {decode:>13.1f}")
    for f in bench["figures"]:
        print(f"{'drover, ' + bench['activations'] + ', KV ' + bench['kv']:<28} {f['batch']:>5} "
              f"{f['prompt_tokens_per_s']:>13.1f} {f['decode_tokens_per_s']:>13.1f}")


if __name__ == "__main__":
    main()
