from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small networks are slower on two threads, and the tests share their cores."""
    import torch

    torch.set_num_threads(1)
