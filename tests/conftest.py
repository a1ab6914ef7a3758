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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The built-in model with random weights, as a user's own directory: no warm start, milliseconds a step."""
    import common

    folder = tmp_path_factory.mktemp("model")
    tokenizer = common.tiny_tokenizer()
    common.tiny_model(tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Call of a script in this process with a command line: its exit status. The working folder is an empty one."""
    import common
    import grpo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "matrix_rate", lambda *_: 1e9)  # to measure it takes longer than these runs

    def call(*argv, module=grpo):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            common.run_script(module.main, module.Args)
        return end.value.code

    return call
