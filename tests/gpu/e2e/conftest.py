import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "e2e")]

import gpus  # noqa: E402
from fixtures import exact_logits, goldens, needs, random  # noqa: E402, F401


# Where a mark `gpus(N)` asks for more GPUs than there are, the test is skipped. ctest looks for these
# words.
def pytest_collection_modifyitems(items):
    there = gpus.count()
    for item in items:
        mark = item.get_closest_marker("gpus")
        wanted = mark.args[0] if mark else 0
        if wanted > there:
            item.add_marker(pytest.mark.skip(
                reason="no GPU here" if there == 0 else f"{wanted} GPUs are needed, here is {there}"))
