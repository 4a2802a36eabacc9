"""What holds for every test: examples that hypothesis draws, threads, the compiler's cache, the random state."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

# One thread unless asked for more: `tests/matrix.py` does.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")  # scripts of the gallery show their figures; no window opens
    # The same examples in every run, so a failure in CI is a failure here; others with `--hypothesis-seed`.
    derandomize = config.getoption("--hypothesis-seed", default=None) is None
    settings.register_profile("fixpoint", derandomize=derandomize, database=None, deadline=None, max_examples=40)
    settings.load_profile("fixpoint")
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        # What was compiled with other instructions or another number of threads is not taken over.
        cache = tempfile.mkdtemp(prefix="fixpoint-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


@pytest.fixture(autouse=True)
def threads_and_seed() -> None:
    """What a test draws, and how sums are split, does not depend on the tests before it."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
