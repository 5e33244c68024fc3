"""ROUGE as MLPerf computes it, from LoadGen's accuracy log."""

import json
import multiprocessing
import os

import numpy as np
from rouge_score import rouge_scorer

from .cli import DataError

KINDS = ("rouge1", "rouge2", "rougeL")
# Reference figures and the allowed tokens a sample of MLPerf Inference (llama2-70b, FP16).
LIMITS = {"llama2-70b": {"rouge": {"rouge1": 44.4312, "rouge2": 22.0352, "rougeL": 28.6162},
                         "tokens_per_sample": (265.005, 323.895)}}
RESAMPLES, SEED = 10000, 1


def read_log(path):
    """{sample index: int32 token ids} of an mlperf_log_accuracy.json."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not whole ({error}): LoadGen closes it when a run ends, so "
                        "this run was killed or is still going; run the accuracy pass again") \
            from error
    out = {}
    for entry in entries:
        try:
            index, data = int(entry["qsl_idx"]), bytes.fromhex(entry["data"])
            count = entry.get("token_count", len(data) // 4)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: entry {len(out)} lacks qsl_idx or has data that is not "
                            f"hex: {error}") from error
        if len(data) % 4:
            raise DataError(f"{path}: sample {index} has {len(data)} bytes; int32 ids expected")
        if count != len(data) // 4:
            raise DataError(f"{path}: sample {index} says token_count {count} and has "
                            f"{len(data) // 4} ids")
        if index in out:
            raise DataError(f"{path}: sample {index} is there twice; an accuracy run answers "
                            "each sample once")
        out[index] = np.frombuffer(data, "<i4")
    return out


def check_complete(log, path, samples):
    """All of samples 0 to samples − 1, and no other."""
    beyond = [index for index in log if not 0 <= index < samples]
    if beyond:
        raise DataError(f"{path} has sample {beyond[0]}, and {samples} samples were expected; "
                        "another dataset, or another --samples?")
    missing = [index for index in range(samples) if index not in log]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of {samples} samples, the first is "
                        f"{missing[0]}; if the run took only the first ones of the dataset, say "
                        "how many with --samples")


_scorer = None


def score_pair(pair):
    """[rouge1, rouge2, rougeL], F-measures, of (reference, prediction)."""
    global _scorer
    if _scorer is None:  # one a process
        _scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
    found = _scorer.score(*pair)
    return [found[kind].fmeasure for kind in KINDS]


def rouge_of(log, references, table):
    """F-measures [samples, 3]; text as MLPerf has it: special ids skipped, stripped.

    Splitting into sentences, which MLPerf also does, changes only rougeLsum.
    """
    pairs = [(references[index].strip(), table.decode(log[index].tolist()).strip())
             for index in sorted(log)]
    workers = min(os.cpu_count() or 1, len(pairs) // 512 + 1)
    if workers == 1:
        return np.array([score_pair(pair) for pair in pairs])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.array(pool.map(score_pair, pairs, chunksize=64))


def means(scores):
    return {kind: round(float(value) * 100, 4) for kind, value in zip(KINDS, scores.mean(axis=0))}


def limits_of(reference, source, tokens_per_sample=None):
    """The 99 % and 99.9 % limits of a reference's ROUGE."""
    out = {"source": source, "reference": reference}
    for share in ("99", "99.9"):
        out[share] = {kind: round(reference[kind] * float(share) / 100, 5) for kind in KINDS}
    if tokens_per_sample:
        out["tokens_per_sample"] = list(tokens_per_sample)
    return out


def judge(rouge, tokens_per_sample, limits):
    """{"99": bool, "99.9": bool}"""
    low, high = limits.get("tokens_per_sample", (0, float("inf")))
    return {share: all(rouge[kind] >= limits[share][kind] for kind in KINDS)
            and low <= tokens_per_sample <= high for share in ("99", "99.9")}


def bootstrap_ratio(ours, theirs):
    """Ratio of mean ROUGE, ours to theirs, with its 95 % interval over samples (paired)."""
    random = np.random.default_rng(SEED)
    count = len(ours)
    ratios = np.empty((RESAMPLES, len(KINDS)))
    for at in range(RESAMPLES):
        chosen = random.integers(0, count, count)
        ratios[at] = ours[chosen].mean(axis=0) / np.maximum(theirs[chosen].mean(axis=0), 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5], axis=0)
    whole = ours.mean(axis=0) / np.maximum(theirs.mean(axis=0), 1e-12)
    return {kind: {"ratio": round(float(r), 5), "low": round(float(a), 5),
                   "high": round(float(b), 5)} for kind, r, a, b in zip(KINDS, whole, low, high)}
