"""One thread, quiet transformers, no network: set before anything imports torch."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("lscollapse", deadline=None, max_examples=60)
settings.load_profile("lscollapse")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A test, or the code under test, may have changed it."""
    torch.set_num_threads(1)
