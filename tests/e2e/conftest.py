import os

from fixtures import exact_logits, goldens, needs, random  # noqa: F401

# These are the CPU's, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
