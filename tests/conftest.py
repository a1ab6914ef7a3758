"""Puts the repository's root on the search path, and gives the fixtures that several test files use."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels of common.py as plain Python, where Triton is installed
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore, and so their runs


@pytest.fixture(autouse=True)
def same_randomness_and_signals():
    """Each test starts from the same seed, and a `Run` made in it leaves no signal handler behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run():
    """A run on the CPU without a folder."""
    import helpers

    return helpers.make_run()
