"""The reference's answers (tests/goldens), and how far a run's logits are from exact ones."""

import dataclasses

import h5py
import numpy as np

import drover

# 32-bit throughout, on the CPU: what a golden's tokens are reproduced with.
EXACT = ("--backend", "cpu", "--activations", "f32", "--kv", "f32")


class Goldens:
    def __init__(self):
        with h5py.File(drover.GOLDENS) as f:
            offsets = f["prompt_offsets"][:]
            ids = f["prompt_ids"][:]
            self.prompts = [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
            lengths = f["lengths"][:]
            self.tokens = [t[:n].tolist() for t, n in zip(f["tokens"][:], lengths)]
            top = f["top2_logits"][:]
            self.margins = top[:, :, 0] - top[:, :, 1]
            self.top2_ids, self.top2_logits = f["top2_ids"][:], top
            self.last_logits = f["last_logits"][:]           # [8, vocab / 8]
            self.last_top64_ids = f["last_top64_ids"][:]
            self.last_top64_logits = f["last_top64_logits"][:]

    def teacher_forced(self):
        """For drover.logits: row i of a sequence is what chooses its token i."""
        return [(p + t[:-1], len(p) - 1) for p, t in zip(self.prompts, self.tokens)]


def margins(rows, count):
    """Distance of the two best logits of each row, for each sequence."""
    all_margins = []
    for i in range(count):
        best = np.partition(np.asarray(rows.sequence(i)), -2, axis=1)
        all_margins.append(best[:, -1] - best[:, -2])
    return all_margins


def kl(want, got):
    """KL divergence of the next-token distributions, in nats, of each row."""
    def log_softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))
    p, q = log_softmax(want), log_softmax(got)
    return (np.exp(p) * (p - q)).sum(1)


@dataclasses.dataclass
class Difference:
    """Of a run's logits from exact ones, row by row."""

    worst: float        # largest error of any logit
    same: int           # rows whose best token is the same
    rows: int
    divergence: np.ndarray
    margins: list       # of the exact ones' two best, where the best token is another

    @property
    def agreement(self):
        return self.same / self.rows

    def text(self):
        largest = f"{max(self.margins):.3f}" if self.margins else "none"
        return (f"worst logit error {self.worst:.3f}, top-1 agreement {self.agreement:.4f} of "
                f"{self.rows} (largest margin of another choice: {largest}), KL "
                f"{self.divergence.mean():.2e} (largest {self.divergence.max():.2e})")

    def check(self, bound, agreement):
        """The rule: another token only where the two best are closer than twice the worst error."""
        assert self.worst < bound
        assert all(margin < 2 * self.worst for margin in self.margins)
        assert self.agreement >= agreement


def difference(exact, run, sequences):
    """Of two drover.Logits over so many sequences."""
    worst, same, rows, divergence, other = 0.0, 0, 0, [], []
    for i in range(sequences):
        want = np.asarray(exact.sequence(i), dtype=np.float64)
        got = np.asarray(run.sequence(i), dtype=np.float64)
        assert np.isfinite(got).all(), f"sequence {i} has logits that are no numbers"
        worst = max(worst, float(np.abs(got - want).max()))
        divergence.append(kl(want, got))
        best = np.sort(np.partition(want, -2, axis=1)[:, -2:], axis=1)
        agree = got.argmax(1) == want.argmax(1)
        same += int(agree.sum())
        rows += len(agree)
        other += (best[:, 1] - best[:, 0])[~agree].tolist()
    return Difference(worst, same, rows, np.concatenate(divergence), other)
