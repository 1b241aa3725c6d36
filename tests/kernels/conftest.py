"""Tests of the Triton kernels without a GPU, in their own environment: `make test-kernels`.

Triton decides when it is imported whether it interprets, so these tests need a process of their own and are left out of
any other.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    os.environ["MAMBA_DETERMINISTIC"] = "0"  # keep every autotune configuration: `configuration` chooses

    import pytest
    import torch

    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def configuration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
        """Each autotuned kernel runs with its configuration number `param` (modulo how many it has), without timing any."""
        from triton.runtime.autotuner import Autotuner

        number, run = getattr(request, "param", 0), Autotuner.run

        def run_one(self: Autotuner, *args: object, **kwargs: object) -> object:
            every = self.configs
            self.configs = [every[number % len(every)]]
            try:
                return run(self, *args, **kwargs)
            finally:
                self.configs = every

        monkeypatch.setattr(Autotuner, "run", run_one)
        return number
