"""Helpers of ppo.py and grpo.py: everything that carries no algorithm. Reading the scripts does not need this file.

Sections: run set-up · rollouts and the flat row · log-probabilities and values · sampling · Triton kernels · models and
tokenizers · torch.compile and processes · the built-in model and task · prompts · built-in rewards · reward functions ·
evaluation · micro-batches and optimiser steps · statistics · checkpoints
"""

import argparse
import ast
import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import http.client
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import json
import math
import numbers
import operator
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer

try:  # comes with PyTorch for GPUs
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# =============================================================================
# Run set-up: arguments, device, processes, signals
# =============================================================================


class UserError(Exception):
    """An error that the user can fix; the scripts print it as one line and exit with status 2."""

    met_by_all = False  # whether all processes raise it, at the same place


def one_line(error: BaseException) -> str:
    """Type and message of another library's error on one line, the message cut to 300 characters, for use in a UserError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


@contextlib.contextmanager
def explained_as(what: str, *kinds: type):
    """Context manager: an error that the block raises (of these `kinds`, by default any) becomes UserError "what: error"."""
    try:
        yield
    except (UserError, torch.cuda.OutOfMemoryError):  # callers handle the latter and name the flags to change
        raise
    except kinds or Exception as error:
        raise UserError(f"{what}: {one_line(error)}") from error


def flag(default=None, help="", *, tiny=None, real=None, at_least=None, above=None, at_most=None, choices=None):
    """A field of a script's `Args`. `tiny` and `real` are the defaults for the built-in model and for any other one."""
    if tiny is not None or real is not None:
        help += f" (default: {tiny} for the tiny model, {real} for others)"
    argument = {"help": help} | ({"choices": choices} if choices else {})
    metadata = {"argument": argument, "bounds": (at_least, above, at_most), "by_model": (tiny, real)}
    if isinstance(default, list):
        argument["action"] = "extend"  # --reward a --reward b
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def metadata_of(field) -> dict[str, Any]:
    """The metadata that `flag` gave a field of `Args`; a plain field, as in `name: float = 0.1`, has no bounds."""
    argument = {"action": "extend"} if callable(field.default_factory) else {}
    return {"argument": argument, "bounds": (None, None, None), "by_model": (None, None)} | field.metadata


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if "(default: " in (action.help or "") else super()._get_help_string(action)


class OneLineParser(HfArgumentParser):
    def error(self, message):
        raise UserError(message)

    def format_help(self):
        for action in self._actions:  # of --group-size and --group_size, which are both accepted, it shows the first
            action.option_strings = [form for form in action.option_strings if "_" not in form]
        return super().format_help()


# Flags that --resume may change: the course of training depends on none of them.
RESUME_MAY_CHANGE = {
    "resume", "device", "micro_batch_tokens", "compile", "gradient_checkpointing", "eval_every", "save_every",
    "keep_checkpoints", "log_samples", "reward_timeout",
}  # fmt: skip


def parse_args(Args, argv=None):
    """Parse the command line into a checked instance of the dataclass `Args`; accepts --group-size and --group_size.

    With --resume RUN the arguments are that run's, and only those in RESUME_MAY_CHANGE may differ.
    """
    plain, hints = [], typing.get_type_hints(Args)
    for f in dataclasses.fields(Args):  # HfArgumentParser would hand the bounds to argparse, so it gets a plain copy
        argument = metadata_of(f)["argument"] | ({"nargs": "?", "const": True} if hints[f.name] == bool | None else {})
        field = dataclasses.field(default=f.default, default_factory=f.default_factory, metadata=argument)
        plain.append((f.name, hints[f.name], field))
    parser = OneLineParser(
        dataclasses.make_dataclass("Arguments", plain),
        prog=Path(inspect.getfile(Args)).name,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    for f in dataclasses.fields(Args):  # HfArgumentParser gives --no-… only to flags whose default is True
        if bool in (hints[f.name], *typing.get_args(hints[f.name])) and f.default is not True:
            forms = {f"--no-{f.name.replace('_', '-')}", f"--no_{f.name}"}
            parser.add_argument(*sorted(forms), dest=f.name, action="store_false", help=argparse.SUPPRESS)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # Python before 3.14 takes -1e-3 for a flag
    parser.parse_args(argv)  # answers --help, which shows the defaults
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))  # only what stands on the command line
    if not given.get("resume"):
        return Args(**given)
    saved = saved_arguments(Path(given["resume"]))
    for name, value in given.items():
        if name not in RESUME_MAY_CHANGE and value != saved.get(name):
            may = ", ".join("--" + other.replace("_", "-") for other in sorted(RESUME_MAY_CHANGE - {"resume"}))
            raise UserError(
                f"--{name.replace('_', '-')} may not change on --resume: the run was started with {saved.get(name)}; "
                f"these may: {may}"
            )
    known = {f.name for f in dataclasses.fields(Args)}
    if set(saved) - known:
        raise UserError(
            f"--resume {given['resume']}: that run is not one of {parser.prog} (it has --{sorted(set(saved) - known)[0]})"
        )
    try:  # as if they stood on the command line: somebody may have edited the file
        saved = vars(parser.parse_args(as_flags(saved)))
    except UserError as error:
        raise UserError(f"--resume {given['resume']}: its args.json: {error}") from None
    return Args(**{**saved, **given})


def check_resumed(args):
    """Raises UserError unless an `Args(resume=...)` made in Python has the run's saved arguments, as `parse_args` ensures."""
    saved = parse_args(type(args), ["--resume", args.resume])
    for f in dataclasses.fields(args):
        mine, its = getattr(args, f.name), getattr(saved, f.name)
        if f.name not in RESUME_MAY_CHANGE and mine != its:
            how = f'common.parse_args(Args, ["--resume", {args.resume!r}]) makes those of the run'
            raise UserError(f"resume={args.resume!r}: {f.name} is {mine!r}, but the run was started with {its!r}; {how}")


def as_flags(values: dict[str, Any]) -> list[str]:
    """The command line that gives these arguments."""
    items = [(name, item) for name, value in values.items() for item in (value if isinstance(value, list) else [value])]
    return [f"--{name}={item}" for name, item in items if item is not None]


def check_args(args):
    """`__post_init__` of `Args`: sets defaults that depend on the model, checks numbers and choices; errors name the flag."""
    for f in dataclasses.fields(args):
        metadata = metadata_of(f)
        (at_least, above, at_most), by_model = metadata["bounds"], metadata["by_model"]
        if getattr(args, f.name) is None and by_model != (None, None):
            setattr(args, f.name, by_model[args.model != "tiny"])
        value = getattr(args, f.name)
        if isinstance(value, os.PathLike):  # from Python
            setattr(args, f.name, os.fspath(value))
        elif isinstance(value, str) and callable(f.default_factory):
            setattr(args, f.name, [value])
        given, name = getattr(args, f.name), "--" + f.name.replace("_", "-")
        for value in given if isinstance(given, list) else [given]:
            if value == "" and f.name != "system_prompt":
                raise UserError(f"{name} is empty")
            choices = metadata["argument"].get("choices")
            if choices and value is not None and value not in choices:  # the parser has refused it, but Python may have made it
                raise UserError(f"{name} must be one of {', '.join(choices)}, not {value}")
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            is_finite = abs(value) <= torch.finfo(torch.float32).max or isinstance(value, int)  # float32 has no 1e300
            if not is_finite and not ("clip" in f.name and value == math.inf):  # inf: no clipping
                raise UserError(f"{name} must be a finite number, not {value}")
            if at_least is not None and value < at_least:
                raise UserError(f"{name} must be at least {at_least}, not {value}")
            if above is not None and value <= above:
                raise UserError(f"{name} must be above {above}, not {value}")
            if at_most is not None and value > at_most:
                raise UserError(f"{name} must be at most {at_most}, not {value}")


def run_script(main, Args):
    """Entry point of `python script.py`: an error that the user can fix becomes one line on stderr and exit status 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    script, status, store, timed_out = Path(inspect.getfile(Args)).name, 0, None, False
    try:
        store = join_processes()
        status = main(parse_args(Args))
    except (UserError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) if isinstance(error, UserError) else lack_of_memory(error)
        if text is None:
            raise
        if store is None or store.add("errors", 1) == 1:  # the first process to fail prints its error and ends all
            print(f"{script}: error: {text}", file=sys.stderr, flush=True)
            if store is not None:
                store.set("ended", "")
        status, cause = 2, error
        while cause is not None:
            timed_out, cause = timed_out or isinstance(cause, RewardTimeout), cause.__cause__
    except KeyboardInterrupt:  # before the training loop, or the second one in it
        sys.stdout.flush()
        os._exit(128 + signal.SIGINT)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # os._exit, because the thread that watches the store may wake up while Python shuts down, which aborts the process, and
    # because Python would wait for threads in which a timed-out reward function may still run.
    if store is not None or timed_out:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def lack_of_memory(error: BaseException) -> str | None:
    """What to say of an error that shows a lack of memory (outside of the micro-batches, which shrink by themselves); None for
    any other error."""
    of_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
    if not of_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        return None
    advice = "take more processes or, in a new run, fewer --prompts-per-step, --max-new-tokens or --eval-samples"
    return f"out of {'GPU ' * of_gpu}memory: {advice} ({one_line(error)})"


def join_processes():
    """Under torchrun: join the process group, and exit with status 2 once any process reports an error. Returns the store."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    # By default there would be only nccl where there are GPUs. The timeout is a day, since the others wait while one process
    # writes a checkpoint or scores. torchrun notices a process that dies, the thread below one that reports an error.
    with explained_as("WORLD_SIZE is set, but not all that torchrun sets beside it", ValueError):
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    store = dist.distributed_c10d._get_default_store()

    def watch(connection):
        with contextlib.suppress(RuntimeError):  # the connection ends with the run
            connection.wait(["ended"], timedelta(days=1000))
            os._exit(2)

    threading.Thread(target=watch, args=[store.clone()], daemon=True).start()
    return store


def progress(iterable, desc, **options):
    """A progress bar on a terminal; nothing where the output is a file, since `Run.log` prints lines there."""
    is_hidden = os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
    return tqdm(iterable, desc=desc, disable=is_hidden, dynamic_ncols=True, **options)


def print_line(text):
    """To standard output, which may be gone: a closed terminal, or a pipe to a program that the same Ctrl-C has ended."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def inner_progress(iterable, desc):
    """A bar that shows up only where a phase takes longer than a few seconds."""
    return progress(iterable, desc, leave=False, delay=3)


def check_new_folder(folder):
    """Raises UserError unless `folder` is empty or can be made; makes nothing."""
    folder = Path(folder)
    # Path.exists would raise for a name that is too long, before Python 3.14.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output-dir {folder}: {there} is a file, or a folder that cannot be written to")
    if os.path.exists(folder / "args.json") and not checkpoints_of(folder) and not (folder / "final").exists():
        raise UserError(f"--output-dir {folder}: a run that has no checkpoint yet; if it has ended, remove the folder")
    if there == folder and any(folder.iterdir()):
        raise UserError(
            f"--output-dir {folder}: not empty, and nothing in it is overwritten (--resume goes on with a run)"
        )


def utf8(text: str) -> str:
    """The text with question marks in place of lone surrogates, which TensorBoard cannot write."""
    return text.encode(errors="replace").decode()


def make_new_folder(folder: Path) -> Path:
    """Create `folder`; if it exists (a run began in the same second), create one with a number after its name."""
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            new = folder if n == 1 else folder.with_name(f"{folder.name}-{n}")
            new.mkdir(parents=True)
            return new


def not_of_tensorboard(failure):
    """As `threading.excepthook`: print what ended a thread, except TensorBoard's, whose error `Run.log` reports in one line."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; anything else kept beside them is ignored."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def saved_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of the run in `folder`; UserError unless it has begun, has a checkpoint and has not finished."""
    path = folder / "args.json"
    if not path.is_file():
        hint = f"; take {folder.parent.parent}" if folder.parent.name == "checkpoints" else ""
        raise UserError(f"--resume {folder}: not the folder of a run (no args.json there){hint}")
    if (folder / "final").is_dir():
        raise UserError(f"--resume {folder}: that run has finished; its model is {folder / 'final'}")
    if not checkpoints_of(folder):
        raise UserError(f"--resume {folder}: no checkpoint there (--save-every writes them, and Ctrl-C)")
    with explained_as(f"--resume: {path} cannot be read", OSError, ValueError):
        saved = json.loads(path.read_text())
    if not isinstance(saved, dict):
        raise UserError(f"--resume {folder}: its args.json holds no arguments")
    return saved


class Run:
    """One run of a script: its device, processes and folder, what it says and logs, and whether it has to stop."""

    def __init__(self, args):
        self.args, self.started, self.folder, self.writer = args, time.time(), None, None
        # Large tensors on a CPU get huge pages, where Linux grants them: up to a tenth less time in sampling. Read at the
        # first tensor of the process.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        self.script = Path(inspect.getfile(type(args))).stem  # a copy runs, and resumes, under its own name
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ["RANK"]) if self.world > 1 else 0
        self.device = self.choose_device(args.device)
        self.compute_dtype = getattr(torch, args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        if args.resume:
            check_resumed(args)
        else:
            check_new_folder(args.output_dir or Path("runs", f"{self.script}__"))  # stands for the default name
        if args.prompts_per_step % (self.world * args.num_minibatches):
            parts = f"{self.world} processes and " * (self.world > 1) + f"--num-minibatches {args.num_minibatches}"
            raise UserError(f"--prompts-per-step {args.prompts_per_step} cannot be split evenly between {parts}")
        if args.model == "tiny" and self.device.type == "cpu":
            torch.set_num_threads(1)  # its matrices are too small to share between cores
        random.seed(args.seed), numpy.random.seed(args.seed), torch.manual_seed(args.seed)  # for reward functions
        self.stop_signal, self.bar, self.handlers = None, None, {}
        self.last_line, self.latest, self.said = 0.0, {}, set()
        self.micro_batch_tokens = args.micro_batch_tokens
        self.leaves_template_unused = False  # True: text prompts bypass the model's chat template
        self.skipped_updates = self.skipped_in_a_row = 0  # in this step; in a row up to now: 5 end the run
        self.seconds, self.current_phase, self.phase_started = {}, None, 0.0
        # What TRL's reward functions read: steps done so far, and in all.
        self.trainer_state = types.SimpleNamespace(global_step=0, max_steps=args.steps)
        if args.model != "tiny" and not args.resume:
            self.say_defaults()

    def say_defaults(self):
        """Print the defaults that differ from the tiny model's, since a user may expect the tiny model's."""
        by_model = {f.name: metadata_of(f)["by_model"] for f in dataclasses.fields(self.args)}
        same = [name for name, (tiny, real) in by_model.items() if tiny != real and getattr(self.args, name) == real]
        chosen = ", ".join(f"--{name.replace('_', '-')} {getattr(self.args, name)}" for name in same)
        self.say(textwrap.fill(f"defaults of models other than the tiny one: {chosen}", 79, break_on_hyphens=False))

    def choose_device(self, name):
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = name or next(kind for kind in available if available[kind])
        if not available.get(name.split(":")[0]):
            raise UserError(
                f"--device {name}: not available here (one of cuda, mps, cpu; by default the first that is there)"
            )
        if self.world > 1 and name not in ("cuda", "cpu"):
            raise UserError(f"--device {name}: several processes run on cuda (one GPU each) or on cpu")
        with explained_as(f"--device {name}"):
            device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are only {torch.cuda.device_count()} GPUs here, one a process")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # cuDNN's attention plans anew for each shape, and nearly every micro-batch has a shape of its own.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return device

    def autocast(self):
        """Autocast for bfloat16 matrix products over float32 weights; does nothing if `compute_dtype` is float32."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def uniforms(self, step: int, purpose: int, *shape) -> Tensor:
        """Random numbers in [0, 1) that depend on seed, step and purpose alone: a resumed run draws the same ones, and all
        processes do: `own_part` of one for each sequence gives each process its own.

        Purposes are 0 to 15: 1 to 5 are those of this file, 0 and 7 to 14 the scripts'; 6 and 15 are free.
        """
        if not 0 <= purpose < 16:
            raise UserError(f"Run.uniforms: purpose {purpose} is not one of 0 to 15")
        generator = torch.Generator().manual_seed((self.args.seed * 1_000_003 + step) * 16 + purpose)
        return torch.rand(*shape, generator=generator)

    def minibatches(self, number: int, prompts: int) -> list[Tensor]:
        """Random split of a rollout into --num-minibatches parts: for each, indices into this process's `prompts` prompts.

        `number` seeds the split: pass a new one for each epoch. Of every --num-minibatches neighbouring prompts one goes to
        each part, so the split does not depend on the number of processes, and all of them get equal work.
        """
        n, parts = prompts * self.world, self.args.num_minibatches
        if prompts % parts:
            raise UserError(f"a rollout of {prompts} prompts cannot be split evenly between --num-minibatches {parts}")
        part_of = self.own_part(self.uniforms(number, 1, n // parts, parts).argsort(dim=1).flatten())
        return [(part_of == part).nonzero()[:, 0] for part in range(parts)]

    def sum(self, *numbers):
        """The sum of each number over all processes; a sequence even for one number: run.sum(x)[0]."""
        if self.world == 1:
            return numbers
        return [sum(parts) for parts in zip(*self.gather([float(x) for x in numbers]))]

    def max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.gather(number))

    def gather(self, value) -> list:
        """A list of all processes' values, the same in each. A UserError that one passes as its value is raised in all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        for error in values:
            if isinstance(error, UserError):
                error.met_by_all = True
                raise error
        return values

    def own_part(self, items):
        """This process's part of `items`, which must be the same in all processes; their number must divide its length."""
        if len(items) % self.world:
            raise UserError(f"Run.own_part: {len(items)} items cannot be split evenly between {self.world} processes")
        size = len(items) // self.world
        return items[self.rank * size : (self.rank + 1) * size]

    def steps(self, first: int) -> Iterator[int]:
        """The numbers of the steps still to do, with a progress bar. From here on signals stop the run after a step."""
        form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # fits into 80 columns
        left, total = range(first, self.args.steps + 1), self.args.steps
        self.bar = progress(left, None, initial=first - 1, total=total, bar_format=form)
        self.trainer_state.global_step = first - 1
        self.catch_signals()
        try:
            yield from self.bar
        except GeneratorExit:  # the loop was left, by an error perhaps, which in a notebook does not end the process
            self.end_steps()
            raise

    def end_steps(self):
        if self.bar is not None:
            self.bar.close()
        if self.world == 1:  # else torchrun may still send a signal to the last to end
            self.give_signals_back()

    def phase(self, name: str | None):
        """Begin a phase of the step and end the one before, whose seconds become perf/<name>_seconds."""
        wait_for(self.device)
        now = time.perf_counter()
        if self.current_phase is not None:
            self.seconds[self.current_phase] = now - self.phase_started
        self.current_phase, self.phase_started = name, now

    # ---- the run's folder ----

    def open_folder(self, resumed_at: int = 0):
        """Make the run's folder, and its TensorBoard writer with the arguments as text."""
        from torch.utils.tensorboard import SummaryWriter

        args = self.args
        model, dataset = (re.sub(r"[^\w.-]+", "-", Path(name).name) for name in (args.model, args.dataset))
        name = f"{self.script}__{model}__{dataset}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.resume or args.output_dir or Path("runs") / name)
        with explained_as(f"--output-dir {self.folder}: cannot be written", OSError):
            if self.rank == 0 and not args.resume and not args.output_dir:
                self.folder = make_new_folder(self.folder)
            self.folder = self.gather(self.folder)[0]
            if self.rank > 0:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                with open(self.folder / "args.json", "x") as file:  # fails where another run has just begun there
                    json.dump(dataclasses.asdict(args), file, indent=2)
            while any(self.folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.05)  # TensorBoard reads the files by name, second by second: this one has to come last
            self.writer = SummaryWriter(self.folder, purge_step=resumed_at + 1 if resumed_at else None)
            threading.excepthook = not_of_tensorboard
        rows = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(args).items())
        self.writer.add_text("arguments", utf8(f"| flag | value |\n|---|---|\n{rows}"), resumed_at)

    # ---- signals ----

    def catch_signals(self):
        """The first Ctrl-C, SIGTERM or SIGHUP stops the run after the current step; a second has its usual effect.

        Except for SIGHUP: closing a terminal sends two of them, one from the shell to its jobs and one from Linux.
        """
        process, terminals = os.getpid(), [output for output in (1, 2) if os.isatty(output)]

        def stop(number, frame):
            if os.getpid() != process:  # forked by a reward function: SIGTERM ends it, Ctrl-C is for its parent
                if number != signal.SIGINT:
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                return
            if self.stop_signal and number != signal.SIGHUP:
                self.give_signals_back()
                return os.kill(process, number)
            self.stop_signal = number
            if number == signal.SIGHUP:  # the terminal is gone, and writing to it would be an error
                null = os.open(os.devnull, os.O_WRONLY)
                for output in terminals:
                    os.dup2(null, output)
            with contextlib.suppress(RuntimeError):  # Python refuses to print in the middle of another print
                self.say("stopping after this step, with a checkpoint; once more stops at once")

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self.handlers[number] = signal.signal(number, stop)

    def give_signals_back(self):
        """Restore the signal handlers, so that Ctrl-C works as usual in a notebook afterwards."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def must_stop(self) -> bool:
        """Whether any process was told to stop, or 5 updates in a row were skipped; the same answer in all processes."""
        number = self.max(self.stop_signal or 0)
        if number:
            self.stop_signal = number
        return number > 0 or self.skipped_in_a_row >= 5

    # ---- what it says ----

    def say(self, text):
        if self.rank == 0:
            with tqdm.external_write_mode(file=sys.stdout):
                print_line(text)

    def to_go_on(self) -> str:
        """The command that resumes the run, after the words "to go on"."""
        command = [os.path.relpath(inspect.getfile(type(self.args))), "--resume", str(self.folder)]
        launcher = "python" if self.world == 1 else "torchrun ..."  # which options it had is not known here
        return f"to go on: {launcher} {shlex.join(command)}"

    def say_stopped(self, step) -> int:
        """After `must_stop`: print how to resume and return the exit status; UserError unless a signal stopped the run."""
        self.close()
        if self.stop_signal:
            self.say(f"stopped after step {step}; {self.to_go_on()}")
        self.gather(None)  # torchrun ends the other processes as soon as one has ended
        if not self.stop_signal:
            found = f"{self.skipped_in_a_row} gradients in a row were not finite: try a lower --learning-rate, or --dtype float32"
            raise UserError(f"{found}; the weights are saved in {self.folder / 'checkpoints'}")
        return 128 + self.stop_signal

    def say_done(self, state) -> int:
        """The last line of a finished run; returns the exit status."""
        self.close()
        before, after = state["accuracy_before"], state["accuracy"]
        seconds = time.time() - self.started
        accuracy = f"eval/accuracy_before={before:.3f} eval/accuracy={after:.3f}"
        self.say(f"done steps={state['step']} {accuracy} seconds={seconds:.1f} run={self.folder}")
        self.gather(None)  # the others wait for the first process, which writes the model
        return 0

    def close(self):
        if self.writer is not None:
            self.writer.close()
        self.end_steps()

    def warn(self, text):
        self.say(f"warning: {text}")

    def warn_once(self, text):
        if text not in self.said:
            self.said.add(text)
            self.warn(text)

    def log(self, step, metrics):
        """Scalars to TensorBoard, and a line (or the bar's postfix) with what matters most."""
        if self.rank > 0:
            return
        with explained_as(f"--output-dir {self.folder}: TensorBoard's events cannot be written", OSError):
            for name, value in metrics.items():
                self.writer.add_scalar(utf8(name), float(value), step)
            self.writer.flush()  # a checkpoint may follow: the scalars of its steps must survive if the process is killed
        self.advise(metrics)
        short = {"acc": "eval/accuracy", "reward": "reward/mean", "kl": "objective/kl", "tok/s": "perf/tokens_per_second"}
        self.latest |= {name: float(metrics[scalar]) for name, scalar in short.items() if scalar in metrics}
        line = " ".join(f"{k} {v:.0f}" if k == "tok/s" else f"{k} {v:.3g}" for k, v in self.latest.items())
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(line, refresh=False)
        elif time.time() - self.last_line > 5 or step == self.args.steps:
            self.last_line = time.time()
            print_line(f"step {step}/{self.args.steps} {line}")

    def advise(self, metrics):
        """Say in plain words, once each, what the first rollout shows and what keeps a run from learning."""
        if "reward/mean" not in metrics:
            return
        cut, equal = metrics["completions/truncated_ratio"], metrics.get("reward/frac_zero_std", 0.0)
        if "first rollout" not in self.said:
            self.said.add("first rollout")
            groups = f", {equal:.0%} of groups with equal scores" if "reward/frac_zero_std" in metrics else ""
            found = "no scores" if math.isnan(cut) else f"mean score {metrics['reward/mean']:.3g}, {cut:.0%} cut off"
            self.say(f"first rollout{' since resuming' if self.args.resume else ''}: {found}{groups}")
        template = ', or use the chat template: --system-prompt ""' if self.leaves_template_unused else ""
        advice = {
            f"no completion ends: the end token was never sampled; raise --max-new-tokens{template}": cut == 1,
            "most completions are cut off at --max-new-tokens; raise it": 0.5 < cut < 1,
            "no reward function applied to any completion (all gave None), so nothing is learned; look at --reward":
                math.isnan(metrics["reward/mean"]),
            "all scores are equal, so nothing is learned; unless all answers are already right, "
            "look at --reward and the prompts": metrics["reward/std"] == 0,
            "most groups have equal scores; take easier or harder prompts, or a larger --group-size": (
                equal > 0.8 and metrics["reward/std"] > 0
            ),
            "losses/policy_loss or objective/kl is no number: some log-probs or advantages are NaN; in a loss they teach nothing":
                not math.isnan(metrics["reward/mean"])
                and any(math.isnan(metrics.get(name, 0.0)) for name in ("losses/policy_loss", "objective/kl")),
            "the policy is more than 1 nat a token from the reference; raise --kl-coef or lower --learning-rate":
                metrics.get("objective/kl_seq", 0.0) > metrics["completions/mean_length"],
        }  # fmt: skip
        for text, holds in advice.items():
            if holds:
                self.warn_once(text)

    def log_samples(self, step, prompts, completions, scores, extra):
        """Log a table of completions from prompts spread over the rollout, with scores and the columns of `extra`. After the
        last step, also print it, without those columns."""
        if self.rank > 0 or self.args.log_samples == 0:
            return
        n, head = min(self.args.log_samples, len(prompts)), ["prompt", "completion", "score", *extra]
        rows = []
        for i in [part * len(prompts) // n for part in range(n)]:
            prompt = prompts[i].prompt
            if not isinstance(prompt, str):
                prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
            cells = [prompt, completions[i], f"{scores[i].item():.3g}", *(column[i] for column in extra.values())]
            # Without line breaks, tabs and the commands that terminals obey, all of which a model may write.
            rows.append(["".join(c if c.isprintable() else " " for c in str(cell)) for cell in cells])
        # An answer stands at the end of a completion: of a long text the beginning and the end are logged.
        short = [[cell if len(cell) <= 2000 else f"{cell[:1000]} ... {cell[-1000:]}" for cell in row] for row in rows]
        table = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *short)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in table)
        self.writer.add_text("completions/samples", utf8(text), step)
        if step == self.args.steps:
            for prompt, completion, score, *_ in (head, *rows):
                self.say(f"{score:>8} {prompt[-30:]:>30} {completion[:38]}")


# =============================================================================
# Rollouts and the flat row
# =============================================================================
# Every forward pass of this project, in sampling and in training, sees one row of tokens, (1, n), from many
# sequences and without padding. All layers of a transformer except attention work token by token, so only attention
# has to know which token belongs to which sequence. This project's attention is registered with transformers as
# "flat_row" and reads this from the `layout` that callers pass through the model.


@dataclass
class Rollout:
    """The completions of one step: the only thing that flows through a training loop.

    Column t of every (B, C) tensor is completion token t. Two completions of one prompt, where 2 is the end token and C is 4:

        completion_ids  [[7, 8, 2, 2],     completion_mask  [[1, 1, 1, 0],     lengths  [3, 4]
                         [7, 9, 4, 8]]                       [1, 1, 1, 1]]     truncated  [False, True]

    Lengths and `prompt_index` stay on the CPU, where the index arithmetic is done; the other tensors are on the device.
    Fields with a default are filled on the way.
    """

    prompt_ids: Tensor  # (B, P) left-padded
    prompt_lengths: Tensor  # (B,)
    prompt_index: Tensor  # (B,) sequences with the same number continue the same prompt, which is read from one of them
    completion_ids: Tensor  # (B, C)
    completion_mask: Tensor  # (B, C) True up to and including the first end token
    lengths: Tensor  # (B,) valid tokens of each completion
    truncated: Tensor  # (B,) True where no end token was sampled
    sampler_logprobs: Tensor  # (B, C) of the sampled tokens, as the sampler saw them
    sampler_entropy: Tensor  # (B, C) of the distributions they were drawn from; NaN where the sampler is not exact
    temperature: float | None = None  # at which a `Sampler` drew the tokens; None: from `rollout_of`
    scores: Tensor | None = None  # (B,)
    advantages: Tensor | None = None  # (B, 1) in GRPO, (B, C) in PPO
    old_logprobs: Tensor | None = None  # (B, C)
    ref_logprobs: Tensor | None = None  # (B, C)
    values: Tensor | None = None  # (B, C) PPO
    returns: Tensor | None = None  # (B, C) PPO

    def __len__(self):
        return len(self.lengths)

    def select(self, rows: Tensor) -> "Rollout":
        """The sequences `rows` (CPU indices, or booleans), with columns trimmed to the longest completion among them.

        Fields that a script adds, as in `rollout.weights = ...`, are selected, too: tensors (B,), (B, 1) or (B, C) and lists
        of length B; numbers and texts are kept. UserError for anything else.
        """
        B, C = self.completion_ids.shape
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        columns = max(int(self.lengths[rows].max()), 1)
        device_rows, picked = to_device(rows, self.completion_ids.device), copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, list) and len(x) == B:
                setattr(picked, name, [x[i] for i in rows.tolist()])
            elif isinstance(x, Tensor) and x.shape[:1] == (B,) and (x.shape[1:2] in ((), (1,), (C,)) or name == "prompt_ids"):
                x = x[rows] if x.device == rows.device else x[device_rows]
                is_by_token = x.shape[1:2] == (C,) and name != "prompt_ids"
                setattr(picked, name, x[:, :columns] if is_by_token else x)
            elif not isinstance(x, (numbers.Real, str, type(None))) and getattr(x, "shape", None) != ():
                allowed = f"a tensor ({B},), ({B}, 1) or ({B}, {C}), a list of {B} things, a number or a text"
                given = type(x).__name__ + (f" {tuple(x.shape)}" if hasattr(x, "shape") else "")
                raise UserError(f"rollout.{name} has to be {allowed}, not {given}")
        return picked

    def join(self, other: "Rollout") -> "Rollout":
        """These sequences, followed by those of `other`. A prompt that occurs in both counts as two."""
        joined = copy.copy(self)
        for name in vars(self) | vars(other):
            mine, new = getattr(self, name, None), getattr(other, name, None)
            if (mine is None) != (new is None):
                raise UserError(f"Rollout.join: only one of the two has {name}")
            if name == "prompt_index":
                new = new + mine.max() + 1
            if isinstance(mine, Tensor) and mine.dim() == 2:
                if name != "prompt_ids" and mine.shape[1] != new.shape[1]:  # one number a sequence stands for all its tokens
                    mine = mine.expand(-1, self.completion_ids.shape[1]) if mine.shape[1] == 1 else mine
                    new = new.expand(-1, other.completion_ids.shape[1]) if new.shape[1] == 1 else new
                width, on_the_left = max(mine.shape[1], new.shape[1]), name == "prompt_ids"
                mine, new = (
                    F.pad(x, (width - x.shape[1], 0) if on_the_left else (0, width - x.shape[1])) for x in (mine, new)
                )
            if isinstance(mine, Tensor):
                setattr(joined, name, torch.cat([mine, new]))
            elif isinstance(mine, list):
                setattr(joined, name, mine + new)
            elif mine != new:
                raise UserError(f"Rollout.join: {name} is {mine} in one and {new} in the other")
        return joined

    def replace(self, rows: Tensor, other: "Rollout"):
        """Put the sequences of `other` in the places of `rows` (CPU indices)."""
        places = torch.arange(len(self))
        places[rows] = len(self) + torch.arange(len(other))
        vars(self).update(vars(self.join(other).select(places)))

    def leave_out(self, rows: Tensor):
        """Empty the masks of `rows`, a boolean (B,), so that none of their tokens counts in a loss or mean. Their scores still
        count in groups and reward/mean, unless they are NaN."""
        self.lengths = self.lengths.masked_fill(rows.cpu(), 0)
        self.completion_mask = self.completion_mask & ~to_device(rows, self.completion_mask.device)[:, None]

    def slots(self) -> Tensor:
        """Indices of the valid tokens in a flattened (B, C) tensor, sequence by sequence."""
        row, column = grid(self.lengths)
        return to_device(row * self.completion_ids.shape[1] + column, self.completion_ids.device)


def grid(lengths):
    """Row and column of each filled cell of a table whose row i has its first lengths[i] cells filled."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return row, torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]


def wait_for(device):
    """Wait until a GPU has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def to_device(x, device):
    """Move without waiting for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def flat_row_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, layout=None, **kwargs):
    """Attention for transformers: query (1, H, n, D), key and value (1, H_kv, n, D) -> (1, n, H, D)."""
    window_of_module = getattr(module, "sliding_window", None)  # some families put it only into the mask, which is ignored here
    has_more = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if layout is None or has_more or (window_of_module and sliding_window is None):
        raise UserError(f"the attention of {type(module).__name__} is of a kind that this project does not run")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary positions leave query and key in float32 under autocast; the cache and the kernels want the compute dtype.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (n, heads, D)
    return layout.attend(module.layer_idx, query, key, value, scaling, sliding_window)[None], None


AttentionInterface.register("flat_row", flat_row_attention)


def is_short(query, key):
    """Whether two plain products are faster, up to 3x, than the fused kernel, which on a CPU is set up for each head."""
    return query.device.type == "cpu" and (query.shape[2] == 1 or key.shape[2] <= 128)


def dot_product_attention(query, key, value, scaling, mask=None):
    """softmax(Q K^T) V; query (b, H, q, D), key and value (b, H_kv, k, D), additive mask (b or 1, 1, q, k), None: causal."""
    b, heads, q, dim = query.shape
    kv_heads, k = key.shape[1:3]
    repeats = heads // kv_heads
    if is_short(query, key):
        mask = additive(torch.ones(q, k, dtype=torch.bool).tril(), query.dtype)[None, None] if mask is None else mask
        query = (query * scaling).reshape(b, kv_heads, repeats * q, dim)  # heads that share a key head become its queries
        weights = (query @ key.transpose(2, 3)).add_(mask if q == 1 else mask.repeat(1, 1, repeats, 1))
        return (weights.softmax(dim=-1) @ value).view(b, heads, q, -1)
    if repeats > 1 and q == 1:  # the same: no key is copied
        query = query.reshape(b, -1, repeats, dim)
    elif repeats > 1:
        key, value = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (key, value))
    is_causal = mask is None and q > 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling)
    return out.reshape(b, heads, q, value.shape[-1])


def has_flash_attention(query, value) -> bool:
    """Whether PyTorch's FlashAttention 2 takes tensors like these: bfloat16 or float16, on NVIDIA GPUs from Ampere on."""
    dim = query.shape[-1]
    if query.dtype == torch.float32 or dim != value.shape[-1] or dim > 192 or dim % 8:  # wider heads train on some cards only
        return False
    return is_recent_nvidia(query.device) and torch.backends.cuda.is_flash_attention_available()


def flash_attention(query, key, value, scaling, window, query_ends, key_ends, longest_query, longest_key):
    """Causal attention of sequences that lie one after the other: query (q, H, D), key and value (k, H_kv, D) -> (q, H, D).

    Sequence i has queries query_ends[i] to query_ends[i + 1], the last of its tokens, and keys key_ends[i] to
    key_ends[i + 1]. torch.nn.attention.varlen calls this operator, too, but its signature differs between versions of PyTorch.
    """
    ends, longest, back = (query_ends, key_ends), (longest_query, longest_key), -1 if window is None else window - 1
    options = {"scale": scaling, "window_size_left": back, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(query, key, value, *ends, *longest, 0.0, True, False, **options)[0]


def flat_forward(model, tokens, positions, layout, embedded=None):
    """The transformer without its head on one flat row: tokens (n,), or their embeddings (1, n, hidden), and positions (n,)
    -> hidden states (n, hidden)."""
    inputs = {"input_ids": tokens[None]} if embedded is None else {"inputs_embeds": embedded}
    return model.base_model(**inputs, position_ids=positions[None], use_cache=False, layout=layout).last_hidden_state[0]


class PackedLayout:
    """Layout of one flat row: all prompts, then all completions. A prompt that several completions share is there once.

    A shared prompt is computed once, and its completions attend to its keys and values. This is exact: causal attention
    never lets a prompt see what follows it. `predictors` are the indices of the hidden states that predict the completion
    tokens, sequence by sequence. If a `cache` is given, the prompts' keys and values are stored in it.

    FlashAttention takes the row as it is. Without it attention pads: the row holds the completions by length, longest
    first, and those of similar length attend together, so that a few long ones do not make tables of mostly padding.

    Arguments, all on the CPU: prompt_lengths (n,) of the distinct prompts; group (b,), the prompt that each completion
    continues; lengths (b,) of the completions. A completion's last token is no input, since nothing is predicted from it.
    """

    SPLIT_FROM = 2**16  # attention scores a head; smaller tables are not split

    def __init__(self, prompt_lengths, group, lengths, device, cache=None):
        self.n, self.P, self.cache, self.masks = len(prompt_lengths), int(prompt_lengths.max()), cache, {}
        inputs, order = (lengths - 1).clamp(min=0).sort(descending=True, stable=True)
        self.prompt_row, self.prompt_column = grid(prompt_lengths)
        self.prompt_tokens = len(self.prompt_row)
        row, self.input_column = grid(inputs)
        self.input_row = order[row]
        positions = torch.cat([self.prompt_column, prompt_lengths[group][self.input_row] + self.input_column])
        # The one place that shifts by a token: completion token 0 is predicted by its prompt's last token, token t by
        # completion token t - 1.
        prompt_end = prompt_lengths.cumsum(0)[group] - 1
        completion_start = (self.prompt_tokens + inputs.cumsum(0) - inputs)[order.argsort()]
        row, column = grid(lengths)
        predictors = torch.where(column == 0, prompt_end[row], completion_start[row] + column - 1)

        self.positions, self.predictors = to_device(positions, device), to_device(predictors, device)
        self.prompt_slots = to_device(self.prompt_row * self.P + self.prompt_column, device)
        self.device, self.prompt_lengths, self.group, self.inputs = device, prompt_lengths, group[order], inputs

    @functools.cached_property
    def parts(self) -> list["Part"]:
        """The completions in groups of similar length, each padded to a table of its own."""
        inputs, device, parts, first, token = self.inputs, self.device, [], 0, self.prompt_tokens
        while first < len(inputs) and inputs[first] > 0:
            C, end = int(inputs[first]), len(inputs)
            if (end - first) * C * (self.P + C) >= self.SPLIT_FROM:
                end = first + int((inputs[first:] > C // 2).sum())
            own, group = inputs[first:end], self.group[first:end]
            if device.type == "cuda":
                C += -(self.P + C) % 16  # else attention copies the mask in every layer, to align its rows
            row, column = grid(own)
            slots, starts = to_device(row * C + column, device), to_device(self.prompt_lengths[group], device)
            tokens = slice(token, token + len(row))
            parts.append(Part(tokens, to_device(group, device), starts, C, slots))
            first, token = end, tokens.stop
        return parts

    @functools.cached_property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """For `flash_attention`: indices of the key tokens in the row, sequence by sequence; where the queries of each end and
        where the keys; the most queries and the most keys of a sequence."""
        inputs = self.inputs[self.inputs > 0]
        group = self.group[: len(inputs)]
        before = torch.cat([torch.zeros_like(self.prompt_lengths), self.prompt_lengths[group]])  # keys from the prompt
        own = torch.cat([self.prompt_lengths, inputs])
        starts = own.cumsum(0) - own
        starts_before = torch.cat([starts[: self.n], starts[group]])
        row, column = grid(before + own)
        keys = torch.where(column < before[row], starts_before[row] + column, starts[row] + column - before[row])
        ends = (F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (own, before + own))
        return *(to_device(x, self.device) for x in (keys, *ends)), int(own.max()), int((before + own).max())

    def attend(self, layer, query, key, value, scaling, window):
        """query (n, H, D), key and value (n, H_kv, D) of all tokens in the flat row -> (n, H, D)."""
        if self.cache is not None:
            self.cache.fill(layer, self.prompts(key), self.prompts(value))
        if has_flash_attention(query, value):
            keys, *sequences = self.sequences
            key, value = (x.index_select(0, keys) for x in (key, value))
            return flash_attention(query, key, value, scaling, window, *sequences)
        prompt_mask, masks = self.mask(window, query.dtype)
        q, k, v = map(self.prompts, (query, key, value))
        out = [unpad(dot_product_attention(q, k, v, scaling, prompt_mask), self.prompt_slots)]
        for part, mask in zip(self.parts, masks):
            q, own_k, own_v = (pad(x[part.tokens], part.slots, len(part.group), part.C) for x in (query, key, value))
            part_k, part_v = (torch.cat([x.index_select(0, part.group), own], dim=2) for x, own in ((k, own_k), (v, own_v)))
            out.append(unpad(dot_product_attention(q, part_k, part_v, scaling, mask), part.slots))
        return torch.cat(out)

    def prompts(self, x):
        """The prompt tokens of x (n, heads, D) as a padded table (prompts, heads, P, D)."""
        return pad(x[: self.prompt_tokens], self.prompt_slots, self.n, self.P)

    def mask(self, window, dtype):
        """Additive masks: of the prompts, (1, 1, P, P), or None if plainly causal; and of each part, (b, 1, C, P + C).

        window: how many tokens each one sees, itself included; None: all before it.
        """
        if (window, dtype) not in self.masks:
            p, prompt_mask = torch.arange(self.P, device=self.positions.device), None
            if window is not None and window < self.P:
                back = p[:, None] - p
                prompt_mask = additive((back >= 0) & (back < window), dtype)[None, None]
            self.masks[window, dtype] = prompt_mask, [additive(part.allowed(p, window)[:, None], dtype) for part in self.parts]
        return self.masks[window, dtype]


@dataclass
class Part:
    """Completions of a flat row that attend together, padded to C tokens."""

    tokens: slice  # of the flat row
    group: Tensor  # (b,) the prompt that each continues
    starts: Tensor  # (b,) the length of that prompt
    C: int
    slots: Tensor  # cells of a (b, C) table that the tokens fill

    def allowed(self, p: Tensor, window: int | None) -> Tensor:
        """What each token may attend to: first the prompt's positions p (P,), then its own completion's: (b, C, P + C)."""
        c, start = torch.arange(self.C, device=p.device), self.starts[:, None, None]
        b = len(self.starts)
        allowed = torch.cat([(p < start).expand(-1, self.C, -1), (c <= c[:, None]).expand(b, -1, -1)], dim=2)
        if window is not None:
            allowed = allowed & (start + c[:, None] - torch.cat([p.expand(b, 1, -1), start + c], dim=2) < window)
        return allowed


def additive(allowed, dtype):
    """0 where allowed, the lowest number elsewhere (not -inf: a row with nothing allowed must not give NaN)."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def pad(x, slots, rows, columns):
    """Tokens (n, heads, D) to their slots of a table (rows, heads, columns, D), zeros elsewhere."""
    if len(x) < rows * columns:
        x = x.new_zeros(rows * columns, *x.shape[1:]).index_copy_(0, slots, x)
    return x.reshape(rows, columns, *x.shape[1:]).transpose(1, 2)


def unpad(x, slots):
    """The inverse of `pad`: (rows, heads, columns, D) -> (n, heads, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if len(slots) == len(x) else x.index_select(0, slots)


# =============================================================================
# Log-probabilities and values of completion tokens
# =============================================================================


def flat_row(batch: Rollout) -> tuple[Tensor, PackedLayout]:
    """All input tokens of `batch` as one flat row (n,), and the layout of that row."""
    device = batch.completion_ids.device
    first, group = distinct(batch.prompt_index)
    layout = PackedLayout(batch.prompt_lengths[first], group, batch.lengths, device)
    P, C = batch.prompt_ids.shape[1], batch.completion_ids.shape[1]
    prompt = first[layout.prompt_row]
    prompt_cells = prompt * P + P - batch.prompt_lengths[prompt] + layout.prompt_column  # left-padded
    input_cells = layout.input_row * C + layout.input_column
    prompt_tokens = batch.prompt_ids.flatten()[to_device(prompt_cells, device)]
    input_tokens = batch.completion_ids.flatten()[to_device(input_cells, device)]
    return torch.cat([prompt_tokens, input_tokens]), layout


def distinct(index):
    """First position of each distinct number in `index`, and for each position which of these (sorted) numbers it holds."""
    numbers, group = torch.unique(index, return_inverse=True)
    first = torch.full((len(numbers),), len(index)).scatter_reduce(0, group, torch.arange(len(index)), "amin")
    return first, group


def with_whole_parameters(function):
    """Decorator for functions of a model that `shard` may have split: FSDP gathers its parameters around the call."""

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        around = getattr(model, "with_whole_parameters", lambda whole: whole())
        return around(lambda: function(model, *args, **kwargs))

    return call


@with_whole_parameters
def completion_logprobs(model, batch: Rollout, temperature: float, with_entropy=False, from_sampler=False):
    """Log-probabilities of the completion tokens at `temperature`: (B, C) float32, 0 outside the mask, differentiable.

    With `with_entropy` also the entropies of the distributions, (B, C), differentiable, too. The vocabulary head runs on
    the valid completion tokens only, for a range of the vocabulary at a time, so that no (B, C, V) tensor exists.

    from_sampler: pass True only if `model` has not changed since it sampled `batch` in float32. The values are then the
    sampler's, and only their gradient is computed, which saves one of the four products with the vocabulary's weight.
    Tokens given to `rollout_of` have no such values: both are computed.
    """
    embedding, head, slots = model.get_input_embeddings(), model.get_output_embeddings(), batch.slots()
    tokens, layout = flat_row(batch)
    weight, embedded = head.weight, None
    if torch.is_grad_enabled():
        weight.packed = None  # the gradient needs the memory
    if weight is embedding.weight and type(embedding) is nn.Embedding and not embedding._forward_hooks:
        weight, embedded = TiedWeight.apply(weight, tokens[None])
    states = flat_forward(model, tokens, layout.positions, layout, embedded).index_select(0, layout.predictors)
    targets = batch.completion_ids.flatten()[slots]
    scale = logit_scale(model) / temperature
    was_sampled = from_sampler and batch.temperature is not None
    known = [x.flatten()[slots] for x in (batch.sampler_logprobs, batch.sampler_entropy)] if was_sampled else None
    logprobs, entropy = HeadLogprobs.apply(states, weight, head.bias, targets, scale, with_entropy, known)
    logprobs = from_slots(logprobs, slots, batch.completion_ids.shape)
    return (logprobs, from_slots(entropy, slots, batch.completion_ids.shape)) if with_entropy else logprobs


@with_whole_parameters
def completion_values(critic, batch: Rollout):
    """The critic's value before each completion token: (B, C) float32, 0 outside the mask."""
    tokens, layout = flat_row(batch)
    states = flat_forward(critic.backbone, tokens, layout.positions, layout).index_select(0, layout.predictors).float()
    with torch.autocast(states.device.type, enabled=False):  # rounding to bfloat16 would move a value of 10 by up to 0.03
        values = critic.head(states).squeeze(-1)
    return from_slots(values, batch.slots(), batch.completion_ids.shape)


def from_slots(x, slots, shape):
    """Put the numbers of the valid tokens, (n,), into a (B, C) table with zeros elsewhere."""
    return x.new_zeros(shape).put(slots, x)


def logit_scale(model):
    """What some families multiply their logits by (Cohere: logit_scale, Granite: 1 / logits_scaling)."""
    return (getattr(model.config, "logit_scale", None) or 1.0) / (getattr(model.config, "logits_scaling", None) or 1.0)


def add_product(out, a, b, keep=1):
    """out = keep * out + a @ b in float32: rounding logits to bfloat16 would add noise of some 0.03 to every log-prob."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            product = torch.mm(a, b, out_dtype=torch.float32, out=None if keep else out)
            return out.add_(product) if keep else product
        return out.addmm_(a.float(), b.float(), beta=keep)


def head_logits(states, weight, bias, scale, out):
    """Logits (n, V) in float32 for hidden states (n, hidden)."""
    logits = add_product(out, states, weight.t(), keep=0)
    if bias is not None:
        logits += bias
    return logits if scale == 1.0 else logits.mul_(scale)


class TiedWeight(torch.autograd.Function):
    """A weight (V, hidden) that head and embedding share: returns it for the head, and tokens (1, n) embedded, (1, n, hidden).

    A lookup by itself has a second (V, hidden) gradient, nearly all zeros. Here its rows are added to the head's gradient, the
    pad's row included, which nn.Embedding leaves out (padding_idx): in a flat row a pad is a token like any other.
    """

    @staticmethod
    def forward(ctx, weight, tokens):
        ctx.save_for_backward(tokens)
        return weight.view_as(weight), F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, grad_weight, grad_rows):
        (tokens,) = ctx.saved_tensors
        return grad_weight.index_add_(0, tokens[0], grad_rows[0].to(grad_weight.dtype)), None


class HeadLogprobs(torch.autograd.Function):
    """log softmax(scale (h W^T + bias))[target] and its entropy for hidden states h (n, hidden), block by block.

    A block is all rows by a range of the vocabulary; all blocks use the same memory for their logits. On a CPU a block stays
    in the cache while its softmax or gradient is computed, so that each weight is read, and its gradient written, only once.
    The backward pass recomputes each block's softmax. With log-probs that are `known` the forward pass has no blocks to do.
    """

    BLOCK = 2**20  # numbers in a block on a CPU (4 MiB); a GPU's products want to be large: 1/80 of its memory

    @staticmethod
    def blocks(states, vocabulary):
        """Ranges of the vocabulary, and memory for the logits of the largest."""
        memory = torch.cuda.get_device_properties(states.device).total_memory if states.is_cuda else 0
        size = max((memory // 320 or HeadLogprobs.BLOCK) // max(len(states), 1) // 64, 2) * 64  # aligned rows
        blocks = [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]
        return blocks, states.new_empty(len(states) * blocks[0].stop, dtype=torch.float32)

    @staticmethod
    def logits(block, memory, states, weight, bias, scale):
        """Logits of `states` (n, hidden) for the tokens of a block: (n, columns)."""
        shape = len(states), block.stop - block.start
        out = memory[: shape[0] * shape[1]].view(shape)
        return head_logits(states, weight[block], None if bias is None else bias[block], scale, out)

    @staticmethod
    def within(block, targets):
        """Columns (n, 1) of the targets in a block, and whether they are in it."""
        inside = (targets >= block.start) & (targets < block.stop)
        return (targets - block.start).clamp(0, block.stop - block.start - 1)[:, None], inside[:, None]

    @staticmethod
    def over_all_blocks(states, weight, bias, targets, scale, with_entropy):
        """Log-probs of the targets (n,), entropies log Z - sum of p z (n,), and log Z (n, 1)."""
        chosen, totals, means = states.new_zeros(len(states), 1, dtype=torch.float32), [], []
        blocks, memory = HeadLogprobs.blocks(states, len(weight))
        has_kernels = can_run_kernels(states.device)
        other = torch.empty_like(memory) if with_entropy and not has_kernels else memory
        for block in blocks:
            z = HeadLogprobs.logits(block, memory, states, weight, bias, scale)
            column, inside = HeadLogprobs.within(block, targets)
            chosen = torch.where(inside, z.gather(1, column), chosen)
            if has_kernels:
                log_total, mean = sums_of_logits(z)
            else:
                highest = z.amax(dim=-1, keepdim=True)
                weights = torch.exp(z.sub_(highest), out=other[: z.numel()].view_as(z))
                total = weights.sum(dim=-1, keepdim=True)
                log_total, mean = highest + total.log(), None
                if with_entropy:  # the mean logit; nothing reads the logits after it
                    mean = highest + z.mul_(weights).sum(dim=-1, keepdim=True) / total
            totals.append(log_total), means.append(mean)
        totals = torch.cat(totals, dim=1)  # (n, blocks)
        log_z = totals.logsumexp(dim=1, keepdim=True)
        shares = (totals - log_z).exp()  # the probability of each block
        entropy = log_z[:, 0] - (shares * torch.cat(means, dim=1)).sum(dim=1) if with_entropy else log_z[:, 0]
        return (chosen - log_z)[:, 0], entropy, log_z

    @staticmethod
    def forward(ctx, states, weight, bias, targets, scale, with_entropy, known=None):
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.states_dtype, ctx.scale, ctx.is_known = states.dtype, scale, known is not None
        states, low_weight = states.to(ctx.dtype), weight.to(ctx.dtype)
        if known is None:
            logprobs, entropy, log_z = HeadLogprobs.over_all_blocks(states, low_weight, bias, targets, scale, with_entropy)
        else:  # log Z is the target's logit less its log-prob
            logprobs, entropy = (x.clone() for x in known)
            logits = (states * low_weight[targets]).sum(dim=1, dtype=torch.float32)
            logits = scale * (logits if bias is None else logits + bias[targets])
            log_z = (logits - logprobs)[:, None]
        ctx.save_for_backward(states, weight, bias, targets, log_z, entropy)
        ctx.set_materialize_grads(False)  # None for an output that the loss does not use
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        states, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        low_weight, (blocks, memory) = weight.to(ctx.dtype), HeadLogprobs.blocks(states, len(weight))
        grad_states = torch.zeros(states.shape, device=states.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if bias is not None else None
        # d logprob / d logits = scale (onehot - p), d entropy / d logits = -scale p (log p + entropy)
        g = (torch.zeros_like(log_z) if grad_logprobs is None else grad_logprobs[:, None]) * ctx.scale
        h = None if grad_entropy is None else grad_entropy[:, None] * ctx.scale
        is_checked, seen = ctx.is_known and not states.is_cuda, 0.0  # reading a number would wait for a GPU
        has_kernels = can_run_kernels(states.device)
        for block in blocks:
            z = HeadLogprobs.logits(block, memory, states, low_weight, bias, ctx.scale)
            column, inside = HeadLogprobs.within(block, targets)
            if has_kernels:
                grad = gradient_of_logits(z, log_z, g, h, entropy, torch.where(inside, column, -1), ctx.dtype)
            else:
                log_p = z.sub_(log_z)
                factor = -g if h is None else -g - h * (log_p + entropy[:, None])
                p = log_p.exp_()
                if is_checked:
                    seen = seen + p.sum(dim=1)
                grad = p.mul_(factor).scatter_add_(1, column, g * inside)
            if grad_bias is not None:
                grad_bias[block] = grad.sum(dim=0, dtype=torch.float32)
            grad = grad.to(ctx.dtype)
            add_product(grad_states, grad, low_weight[block])
            if grad_weight is not None:
                add_product(grad_weight[block], grad.t(), states, keep=0)
        if is_checked and (seen - 1).abs().sum() > 0.01 * len(states):  # probabilities add up to 1, unless they are NaN
            raise UserError(
                "completion_logprobs(from_sampler=True): the model is not the one that sampled; "
                "for other rollouts than its last, and after an update, leave from_sampler out"
            )
        return grad_states.to(ctx.states_dtype), grad_weight, grad_bias, None, None, None, None


# =============================================================================
# Sampling
# =============================================================================


class DecodeLayout:
    """KV cache and attention for decoding, one new token a row. The cache is written in place and read through views.

    Column j of the cache is prompt token j for j < P, then completion token j - P; columns that a shorter prompt leaves
    empty stay masked. All tensors are static, so that a decoding step can be captured in a CUDA graph. The number of columns
    that a step reads grows by `block` at a time, so that there are few graphs.
    """

    def __init__(self, capacity, C, device, dtype, block):
        self.capacity, self.block, self.device = capacity, block, device
        rows, _, P = capacity  # the most rows, prompts, and tokens of a prompt
        self.columns = -(-(P + C) // block) * block
        self.keys, self.values = {}, {}
        self.mask = torch.zeros(rows, 1, 1, self.columns, dtype=dtype, device=device)  # additive
        self.key_positions = torch.zeros(rows, 1, 1, self.columns, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the new tokens
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # that the new tokens are written to
        self.live = self.used = 0  # rows and columns that a step works on

    def start(self, prompt_lengths, group_size, rows, P):
        """Reset the cache for prompts of these lengths (N,), each for `group_size` rows; surplus rows continue the first."""
        group = torch.arange(len(prompt_lengths)).repeat_interleave(group_size)
        self.P, self.live, self.used, self.masks = P, rows, P, {}
        self.group = to_device(F.pad(group, (0, rows - len(group))), self.device)
        start, column = prompt_lengths[self.group][:, None], torch.arange(self.columns, device=self.device)
        self.mask[:rows, 0, 0] = additive(column < start, self.mask.dtype)
        self.key_positions[:rows, 0, 0] = torch.where(column < P, column, start + column - P)
        self.positions[:rows] = start[:, 0]
        self.column.fill_(P)

    def use(self, tokens):
        """Set what a step works on once `tokens` completion tokens are there; returns all that its shapes depend on."""
        self.used = min(-(-(self.P + tokens) // self.block) * self.block, self.columns)
        return self.live, self.used

    def fill(self, layer, key, value):
        """Store the prompts' keys and values, (N, H_kv, P, D), once for every row that continues them."""
        for cache, x in ((self.keys, key), (self.values, value)):
            if layer not in cache:
                cache[layer] = x.new_zeros(self.capacity[0], x.shape[1], self.columns, x.shape[3])
            cache[layer][: self.live, :, : self.P] = x.index_select(0, self.group)

    def attend(self, layer, query, key, value, scaling, window):
        """query (live, H, D), key and value (live, H_kv, D) of the new tokens -> (live, H, D)."""
        keys, values = self.keys[layer][: self.live], self.values[layer][: self.live]
        keys.index_copy_(2, self.column, key[:, :, None])
        values.index_copy_(2, self.column, value[:, :, None])
        keys, values = keys[:, :, : self.used], values[:, :, : self.used]
        return dot_product_attention(query[:, :, None], keys, values, scaling, self.window_mask(window))[:, :, 0]

    def window_mask(self, window):
        """Additive mask (live, 1, 1, used), once a step for all layers; window: how many tokens back each one sees, None: all."""
        if not self.masks:
            self.mask[: self.live].index_fill_(3, self.column, 0.0)
        if window not in self.masks:
            mask = self.mask[: self.live, :, :, : self.used]
            if window is not None:
                back = self.positions[: self.live, None, None, None] - self.key_positions[: self.live, :, :, : self.used]
                mask = mask.masked_fill(back >= window, torch.finfo(mask.dtype).min)
            self.masks[window] = mask
        return self.masks[window]

    def advance(self):
        self.column += 1
        self.positions[: self.live] += 1
        self.masks = {}

    def shrink(self, live, source, target):
        """Copy rows `source` over rows `target`, then go on with the first `live` rows only."""
        for tensor in (self.mask, self.key_positions, self.positions):
            tensor[target] = tensor[source]
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[target, :, : self.used] = tensor[source, :, : self.used]
        self.live = live


class SharedPromptLayout:
    """The same as `DecodeLayout`, by two Triton kernels a layer (`attend_to_prompts`, `attend_to_completions`).

    A prompt's keys and values are stored once, and read once a step, for all rows that continue it; columns without a token
    are not read. Memory reads bound a decoding step's attention: on an H200 (256 rows, 1024 tokens, the shape of Qwen2.5-0.5B)
    PyTorch's kernel with a mask took 94 us a layer, where reading each row's keys and values separately needs 32.
    """

    def __init__(self, capacity, C, device):
        self.capacity, self.C, self.device = capacity, C, device
        rows, prompts, _ = capacity
        self.prompt_keys, self.prompt_values, self.keys, self.values, self.partial = {}, {}, {}, {}, {}
        self.prompt_lengths, self.members = (torch.zeros(n, dtype=torch.int32, device=device) for n in (prompts, 2 * rows))
        self.place = torch.zeros(rows, dtype=torch.long, device=device)  # of each row in `members`
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the new tokens
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the cache of completions, for the new tokens
        self.live = self.used = 0  # rows that a step works on, and columns that hold completion tokens

    def start(self, prompt_lengths, group_size, rows, P):
        """Reset the cache for prompts of these lengths (N,), each for `group_size` rows; surplus rows have empty prompts."""
        self.n, self.group_size, self.live, self.used = -(-rows // group_size), group_size, rows, 0
        self.place[:rows] = torch.arange(rows, device=self.device)
        self.regroup()
        self.group = (self.place[:rows] // group_size).clamp(max=len(prompt_lengths) - 1)
        self.prompt_lengths.zero_()[: len(prompt_lengths)] = prompt_lengths
        self.positions[:rows] = prompt_lengths[self.group]
        self.column.zero_()

    def use(self, tokens):
        """Set what a step works on once `tokens` completion tokens are there; returns all that its shapes depend on."""
        self.used = tokens
        return self.live, self.n, self.group_size

    def fill(self, layer, key, value):
        """Store the prompts' keys and values, (N, H_kv, P, D)."""
        rows, prompts, P = self.capacity
        for prompt_cache, cache, x in ((self.prompt_keys, self.keys, key), (self.prompt_values, self.values, value)):
            if layer not in cache:
                prompt_cache[layer] = x.new_zeros(prompts, x.shape[1], P, x.shape[3])
                cache[layer] = x.new_zeros(rows, x.shape[1], self.C, x.shape[3])
            prompt_cache[layer][: len(x), :, : x.shape[2]] = x

    def attend(self, layer, query, key, value, scaling, window):
        """query (live, H, D), key and value (live, H_kv, D) of the new tokens -> (live, H, D)."""
        (live, heads, dim), (_, kv_heads, value_dim) = query.shape, value.shape
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        width, value_width = (max(triton.next_power_of_2(n), 16) for n in (dim, value_dim))
        repeats = heads // kv_heads
        of_group = self.group_size * repeats
        tile = min(max(triton.next_power_of_2(of_group), 16), max(4096 // max(width, value_width), 16))
        block = min(max(8192 // (max(width, value_width) * key.element_size()), 16), 64)
        # A program waits for each block that it reads, so a long prompt is split between several: a GPU runs some 256 at once.
        rows, tiles = self.capacity[0], triton.cdiv(of_group, tile)
        splits = max(min(256 // (self.n * kv_heads * tiles), self.capacity[2] // (2 * block), 8), 1)
        if (heads, value_dim, splits) not in self.partial:
            shapes = [(splits, rows, heads, *last) for last in ((), (), (value_dim,))]
            self.partial[heads, value_dim, splits] = [torch.zeros(shape, device=self.device) for shape in shapes]
        partial, out = self.partial[heads, value_dim, splits], query.new_empty(live, heads, value_dim)
        shape = dict(REPEATS=repeats, DIM=dim, VALUE_DIM=value_dim, WIDTH=width, VALUE_WIDTH=value_width, BLOCK=block)
        # num_stages: blocks read ahead; fewer if heads are wide, since four would not fit into a consumer GPU's shared memory.
        shape |= dict(SPLITS=splits, num_stages=4 if max(width, value_width) * key.element_size() <= 512 else 2)
        window = 2**30 if window is None else window
        attend_to_prompts[self.n, kv_heads, tiles * splits](
            query, self.prompt_keys[layer], self.prompt_values[layer], *partial, self.members, self.prompt_lengths, self.positions,
            scaling, window, *query.stride()[:2], *self.prompt_keys[layer].stride()[:2], *self.prompt_values[layer].stride()[:2], rows,
            GROUP=self.group_size, TILE=tile, **shape,
        )  # fmt: skip
        attend_to_completions[live, kv_heads](
            query, key, value, self.keys[layer], self.values[layer], *partial, out, self.column,
            scaling, window, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], self.C, rows,
            TILE=max(triton.next_power_of_2(repeats), 16), **shape,
        )  # fmt: skip
        return out

    def advance(self):
        self.column += 1
        self.positions[: self.live] += 1

    def shrink(self, live, source, target):
        """Copy rows `source` over rows `target`, then go on with the first `live` rows only."""
        for tensor in (self.place, self.positions):
            tensor[target] = tensor[source]
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[target, :, : self.used] = tensor[source, :, : self.used]
        self.live = live
        self.regroup()

    def regroup(self):
        """Set `members`: for each prompt the rows that continue it, with -1 in place of those that have left."""
        self.members.fill_(-1)
        self.members[self.place[: self.live]] = torch.arange(self.live, dtype=torch.int32, device=self.device)


class PlainForward:
    """`flat_forward` of Llama, Qwen2 and Qwen3 without gradients. A third as many operations: their number bounds decoding.

    One matrix product gives queries, keys and values, another the MLP's gate and up; norms and rotary positions are fused,
    and with --compile everything between the products. The weights are the model's own. Other models, and changed ones (an
    adapter, a hook, a subclass, another `forward`), sample through `flat_forward`. `check_model` compares whichever is used
    with transformers.
    """

    MODULES = ("torch.nn.", "transformers.activations", *(f"transformers.models.{x}." for x in ("llama", "qwen2", "qwen3")))

    def __init__(self, model):
        self.backbone, self.layers = model.base_model, []
        for layer in self.backbone.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
            joint = [[side_by_side(linears, name) for name in ("weight", "bias")] for linears in (qkv, gate_up)]
            self.layers.append((layer, *joint))
        if is_compiled(model):
            self.before_attention, self.after_attention = fused(self.before_attention), fused(self.after_attention)

    @classmethod
    def fits(cls, model) -> bool:
        embedding = model.get_input_embeddings()
        return all(
            type(module).__module__.startswith(cls.MODULES)
            and (module is embedding or not (module._forward_hooks or module._forward_pre_hooks))
            and "forward" not in vars(module)
            for module in model.base_model.modules()
        )

    def __call__(self, tokens, positions, layout):
        """tokens and positions (n,) -> hidden states (n, hidden)."""
        x = self.backbone.embed_tokens(tokens)
        cos, sin = (table[0, :, None] for table in self.backbone.rotary_emb(x[None], positions[None]))  # (n, 1, D)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        query_key_value = self.before_attention(self.layers[0], x, cos, sin)
        for this, following in zip(self.layers, [*self.layers[1:], None]):
            attention = this[0].self_attn
            window = getattr(attention, "sliding_window", None)
            out = layout.attend(attention.layer_idx, *query_key_value, attention.scaling, window)
            x, query_key_value = self.after_attention(this, x, out, following, cos, sin)
        return rms_norm(x, self.backbone.norm)

    @staticmethod
    def before_attention(this, x, cos, sin):
        """x (n, hidden) -> query (n, H, D), key and value (n, H_kv, D), with the rotary positions in them."""
        layer, (weight, bias), _ = this
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        qkv = F.linear(rms_norm(x, layer.input_layernorm), weight, bias).view(len(x), -1, dim)
        heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if hasattr(attention, "q_norm"):
            qk = torch.cat([rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)], dim=1)
        else:
            qk = qkv[:, : heads + kv_heads]
        turned = torch.cat(qk.split(dim // 2, dim=-1)[::-1], dim=-1)  # not roll, which on a GPU would copy qk first
        qk = (qk * cos).addcmul_(turned, sin).to(value.dtype)  # addcmul itself would be autocast
        return *qk.split([heads, kv_heads], dim=1), value

    @staticmethod
    def after_attention(this, x, out, following, cos, sin):
        """Add attention's output (n, H, D), projected, and then the MLP's to x (n, hidden); returns x and what the following
        layer's `before_attention` makes of it (None after the last layer)."""
        layer, _, (weight, bias) = this
        x = x + layer.self_attn.o_proj(out.flatten(1))
        gate, up = F.linear(rms_norm(x, layer.post_attention_layernorm), weight, bias).chunk(2, dim=-1)
        x = x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        return x, following and PlainForward.before_attention(following, x, cos, sin)


def rms_norm(x, norm):
    return F.rms_norm(x.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.variance_epsilon)


def side_by_side(linears, name):
    """The weights (or biases) of `linears` as one tensor. They become consecutive views of it, so nothing is stored twice."""
    parameters = [getattr(linear, name) for linear in linears]
    if parameters[0] is None:
        return None
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters]
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(storages) > 1 or ends[:-1] != [parameter.data_ptr() for parameter in parameters[1:]]:
        whole = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters])):
            parameter.data = part
    first = parameters[0].detach()
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


PACK_FROM = 2**24  # numbers; smaller weights stay in the cache


def packed(weight, rows):
    """A large float32 weight in oneDNN's packed order, which halves the time of products of few rows on a CPU; else None.

    Packed again for each rollout, and kept until the weight's gradient reuses its memory. Freed earlier, the memory goes back
    to the host of a virtual machine after some seconds, and touching it again took 6 % of a step.
    """
    is_large = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= PACK_FROM
    if not is_large or not torch.backends.mkldnn.is_available():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def draw(logits, uniform):
    """Tokens (n,) from softmax(logits (n, V)), by inverting the CDF at uniform (n,) in [0, 1), and their log-probs (n,).

    Takes one random number a row instead of V. A block of tokens is drawn first, then a token within it: a running sum
    over the whole vocabulary is slow on a GPU and loses precision.
    """
    blocks = vocabulary_blocks(logits)
    among = log_sum_exp(blocks).log_softmax(dim=-1)
    block, rest = invert(among.exp(), uniform[:, None])
    within = of_block(blocks, block).log_softmax(dim=-1)
    token, _ = invert(within.exp(), rest)
    return (block * blocks.shape[2] + token)[:, 0], (among.gather(1, block) + within.gather(1, token))[:, 0]


def draw_with_entropy(logits, uniform):
    """Tokens and log-probs as from `draw`, and entropies log Z - sum of p z: all (n,).

    A CPU takes a few rows at a time: these stay in its cache, and there is no second (n, V) table beside the logits.
    """
    size, parts = len(logits) if logits.is_cuda else max(HeadLogprobs.BLOCK // logits.shape[1], 1), []
    for z, u in zip(logits.split(size), uniform.split(size)):
        z = z - z.amax(dim=-1, keepdim=True)
        weights = z.exp()
        blocks = vocabulary_blocks(weights)
        totals = blocks.sum(dim=-1)
        block, rest = invert(totals, u[:, None])
        index, _ = invert(of_block(blocks, block), rest)
        token, total = block * blocks.shape[2] + index, totals.sum(dim=-1)
        logprob = z.gather(1, token)[:, 0] - total.log()
        parts.append((token[:, 0], logprob, total.log() - weights.mul_(z).sum(dim=-1) / total))
    return tuple(torch.cat(part) for part in zip(*parts))


def log_sum_exp(logits):
    """The log of the sum of the exponentials over the last dimension, reading the logits once where a kernel can be built."""
    if torch.compiler.is_compiling() or not can_run_kernels(logits.device):  # torch.compile builds one of its own
        return logits.logsumexp(dim=-1)
    return sums_of_logits(logits.flatten(0, -2))[0].view(logits.shape[:-1])


def vocabulary_blocks(table):
    """Numbers of all tokens (n, V) in blocks of up to 128, (n, blocks, tokens of a block)."""
    size = max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if table.shape[1] % n == 0)
    return table.view(len(table), -1, size)


def of_block(blocks, block):
    """The entries of one block a row, with index `block` (n, 1): (n, tokens of a block)."""
    return blocks.gather(1, block[:, :, None].expand(-1, 1, blocks.shape[2]))[:, 0]


def invert(weights, share):
    """Inverse CDF of weights (n, k) at share (n, 1) in [0, 1): the index, and the share within that weight, both (n, 1)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64)
    point = share * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    rest = (point - cumulative.gather(1, index) + weight) / weight
    return index, rest.clamp(0, 1 - 2**-24)


class Sampler:
    """Samples completions from a model, without `generate` and so without its inherited defaults.

    Each prompt is prefilled once, and the rows of its group attend to its keys and values: to copies (`DecodeLayout`), or
    all to the same (`SharedPromptLayout`). Finished rows leave the batch, and the last live rows move into their places: at
    once on a CPU; on a GPU, where a step is a CUDA graph of static shape, when half of the rows can leave. A token is found
    by inverting the CDF at a number drawn beforehand for its sequence and position, so it does not depend on the batch that
    it is sampled in. Nothing but `temperature` changes the distribution.
    """

    def __init__(self, policy, end_ids, temperature, max_new_tokens, compute_dtype=torch.float32, own_copy=False):
        self.is_exact = compute_dtype == torch.float32  # else the trainer's log-probs differ a little from the sampler's
        self.has_copy = own_copy or not self.is_exact
        self.model = frozen_copy(policy, compute_dtype) if self.has_copy else policy
        self.pad_id, self.temperature, self.C = min(end_ids), temperature, max_new_tokens
        self.device = next(policy.parameters()).device
        self.end_ids = torch.tensor(sorted(end_ids), device=self.device)
        self.compute_dtype, self.cache, self.graphs, self.pool, self.stream = compute_dtype, None, {}, None, None
        self.is_cuda = self.device.type == "cuda"

    def refresh(self, policy):
        """Sample from this policy from now on: from a copy if sampling needs the weights in another precision or unsharded,
        else from `policy` itself."""
        if self.has_copy:
            copy_weights(policy, self.model)
        else:
            self.model = policy

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], group_size: int, uniforms: Tensor | None) -> Rollout:
        """Sample `group_size` completions of each of the N prompts (token ids): a Rollout of B = N * group_size.

        uniforms (B, max_new_tokens): numbers in [0, 1) that decide the tokens; None takes the likeliest ones (greedy).
        """
        if uniforms is not None and uniforms.shape[1] != self.C:
            what = f"{uniforms.shape[1]} random numbers for each completion, but up to {self.C} tokens"
            raise UserError(f"Sampler.sample: {what}; set args.max_new_tokens and sampler.C together")
        prompt_lengths = torch.tensor([len(ids) for ids in prompts])
        B, P, greedy = len(prompts) * group_size, int(prompt_lengths.max()), uniforms is None
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        # Rows are rounded up to one of 4 numbers per power of 2, so that few shapes occur; surplus rows start as finished.
        step = 2 ** max(B.bit_length() - 3, 0) if self.is_cuda else 1
        rows = -(-B // step) * step
        self.allocate(rows, -(-rows // group_size), P, uniforms)
        self.finished[B:rows] = True
        was_training = self.model.training
        weight = self.model.get_output_embeddings().weight
        weight.packed = packed(weight, B)
        is_plain = PlainForward.fits(self.model)
        self.forward = PlainForward(self.model) if is_plain else functools.partial(flat_forward, self.model)
        self.draw = fused(draw) if is_compiled(self.model) else draw
        self.model.eval()  # in training gradient checkpointing reads the random state, which a graph cannot capture
        # cache_enabled=False: PyTorch asks for it where a graph captures; the copy's weights are in bfloat16 already.
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=not self.is_exact, cache_enabled=False):
            self.cache.start(to_device(prompt_lengths, self.device), group_size, rows, P)
            self.prefill(prompts, prompt_lengths, greedy)
            for t in inner_progress(range(1, self.C), "sampling"):
                if not self.is_cuda or t % 16 == 1:  # reading `finished` waits for a GPU: not at every step
                    self.drop_finished()
                if self.cache.live == 0:
                    break
                shape = self.cache.use(t)
                self.step(greedy) if not self.is_cuda else self.replay(shape, greedy)
        self.model.train(was_training)
        return self.rollout(prompts, prompt_lengths, group)

    def allocate(self, B, prompts, P, uniforms):
        """Make the static tensors that a step reads and writes; a GPU reuses those of the last call if large enough."""
        block = 128 if self.is_cuda else 1
        needed = (B, prompts, -(-(P + self.C) // block) * block - self.C)
        if self.cache is None or self.ids.shape[1] != self.C or any(there < need for there, need in zip(self.cache.capacity, needed)):
            if self.cache is not None:  # calls of two sizes must not take turns at making each other's cache anew
                needed = tuple(map(max, needed, self.cache.capacity))
            self.free()  # the old cache before the new one
            if self.is_cuda and can_run_kernels(self.device):
                self.cache = SharedPromptLayout(needed, self.C, self.device)
            else:
                self.cache = DecodeLayout(needed, self.C, self.device, self.compute_dtype, block)
            B = needed[0]
            self.tokens, self.cell = (torch.zeros(B, dtype=torch.long, device=self.device) for _ in range(2))
            self.finished = torch.zeros(B, dtype=torch.bool, device=self.device)
            self.ids = torch.zeros(B, self.C, dtype=torch.long, device=self.device)
            self.logprobs, self.entropy, self.uniforms = (torch.zeros(B, self.C, device=self.device) for _ in range(3))
        for tensor in (self.logprobs, self.entropy, self.finished):
            tensor.zero_()
        self.ids.fill_(self.pad_id)
        self.cell[:B] = self.C * torch.arange(B, device=self.device)  # of each row's next token in the flattened tables
        if uniforms is not None:
            self.uniforms[: len(uniforms)] = to_device(uniforms, self.device)

    def free(self):
        """Give up the cache and the CUDA graphs that use it; the next call makes them anew."""
        self.graphs, self.pool, self.cache = {}, None, None

    def prefill(self, prompts, prompt_lengths, greedy):
        """Fill the cache from the prompts and choose the first token of every sequence."""
        lengths = torch.ones_like(prompt_lengths)  # one token to predict, none to feed
        layout = PackedLayout(prompt_lengths, torch.arange(len(prompts)), lengths, self.device, self.cache)
        tokens = to_device(torch.tensor([token for ids in prompts for token in ids]), self.device)
        states = self.forward(tokens, layout.positions, layout).index_select(0, layout.predictors)
        self.choose(self.logits(states).index_select(0, self.cache.group), greedy)

    def step(self, greedy):
        """Feed the newest token of every live row and choose the next: works on static tensors only."""
        cache = self.cache
        states = self.forward(self.tokens[: cache.live], cache.positions[: cache.live], cache)
        self.choose(self.logits(states), greedy)
        cache.advance()

    def logits(self, states):
        head, scale = self.model.get_output_embeddings(), logit_scale(self.model) / self.temperature
        if head.weight.packed is not None:
            logits = torch.ops.mkldnn._linear_pointwise(states, head.weight.packed, head.bias, "none", [], "")
            return logits if scale == 1.0 else logits.mul_(scale)
        logits = states.new_empty(len(states), len(head.weight), dtype=torch.float32)
        return head_logits(states.to(head.weight.dtype), head.weight, head.bias, scale, out=logits)

    def choose(self, logits, greedy):
        """Choose and record a token for each live row from logits (live, V)."""
        live = slice(self.cache.live)
        cell, finished = self.cell[live], self.finished[live]
        if greedy:
            tokens = logits.argmax(dim=-1)
            logprobs = logits.gather(1, tokens[:, None])[:, 0] - log_sum_exp(logits)
        else:
            uniforms = self.uniforms.view(-1).index_select(0, cell)
            if self.is_exact:  # the trainer may take over what is seen here
                tokens, logprobs, entropy = draw_with_entropy(logits, uniforms)
                self.entropy.view(-1).index_copy_(0, cell, entropy.masked_fill_(finished, 0.0))
            else:
                tokens, logprobs = self.draw(logits, uniforms)
        self.tokens[live] = tokens.masked_fill_(finished, self.pad_id)
        self.ids.view(-1).index_copy_(0, cell, tokens)
        self.logprobs.view(-1).index_copy_(0, cell, logprobs.masked_fill_(finished, 0.0))
        finished |= (tokens[:, None] == self.end_ids).any(dim=-1)
        cell += 1

    def replay(self, shape, greedy):
        """One step as a CUDA graph, captured the first time that its shape is seen."""
        key = (*shape, greedy, self.temperature, self.model)
        if key not in self.graphs:
            # What a step changes, to be restored after the warm-up. Cache cells are not: the replay writes them again.
            ours = [self.tokens, self.finished, self.cell, self.ids, self.logprobs, self.entropy]
            changed = [*ours, self.cache.positions, self.cache.column]
            saved = [x.clone() for x in changed]
            # One stream for all warm-ups and captures: cuBLAS keeps a workspace for each stream that it has seen.
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(greedy)  # warms up what must not happen during the capture
            torch.cuda.current_stream().wait_stream(self.stream)
            for x, old in zip(changed, saved):
                x.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(greedy)
            self.graphs[key], self.pool = graph, graph.pool()
        self.graphs[key].replay()

    def drop_finished(self):
        """Let finished rows leave: the last live rows move into the places of finished ones."""
        finished = self.finished[: self.cache.live].cpu()
        live = int((~finished).sum())
        if self.is_cuda:  # by halves, so that few shapes occur
            halved = self.cache.live
            while live and live <= halved // 2 and halved >= 32:  # fewer rows than 16 hardly save any time
                halved //= 2
            live = halved if live else 0
        if live == self.cache.live:
            return
        holes = to_device(finished[:live].nonzero()[:, 0], self.device)
        movers = to_device(live + (~finished[live:]).nonzero()[:, 0], self.device)
        holes = holes[: len(movers)]
        for tensor in (self.tokens, self.cell, self.finished):
            tensor[holes] = tensor[movers]
        self.cache.shrink(live, movers, holes)

    def rollout(self, prompts, prompt_lengths, group) -> Rollout:
        B = len(group)
        # (B, C). Where nothing was sampled stands the pad, which is an end token.
        is_end = (self.ids[:B, :, None] == self.end_ids).any(dim=-1)
        lengths = ((is_end.cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=self.C).cpu()  # the first end token included
        C = int(lengths.max())
        prompt_ids = padded(prompts, side="left", value=self.pad_id)
        device_lengths = to_device(lengths, self.device)[:, None]
        rollout = Rollout(
            prompt_ids=to_device(prompt_ids[group], self.device),
            prompt_lengths=prompt_lengths[group],
            prompt_index=group,
            completion_ids=self.ids[:B, :C].clone(),
            completion_mask=torch.arange(C, device=self.device) < device_lengths,
            lengths=lengths,
            truncated=~is_end.any(dim=1),
            sampler_logprobs=self.logprobs[:B, :C].clone(),
            sampler_entropy=self.entropy[:B, :C].clone() if self.is_exact else self.entropy.new_full((B, C), math.nan),
            temperature=self.temperature,
        )
        if not self.is_cuda:
            self.free()  # the update wants the memory
        return rollout


def padded(rows: list[list[int]], side: str, value: int = 0) -> Tensor:
    """Token ids as a table, (rows, tokens of the longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in rows], True, value, side)


def rollout_of(
    prompts: list[list[int]], completions: list[list[int]], device, prompt_index: list[int] | None = None
) -> Rollout:
    """A Rollout of given token ids: one prompt and one completion for each sequence; completions include their end token.

    No sampler has seen them: `sampler_logprobs` and `sampler_entropy` are NaN.
    """
    lengths, prompt_lengths = (torch.tensor([len(ids) for ids in rows]) for rows in (completions, prompts))
    prompt_ids, completion_ids = padded(prompts, side="left"), padded(completions, side="right")
    mask = torch.arange(completion_ids.shape[1]) < lengths[:, None]
    return Rollout(
        prompt_ids=prompt_ids.to(device),
        prompt_lengths=prompt_lengths,
        prompt_index=torch.arange(len(prompts)) if prompt_index is None else torch.tensor(prompt_index),
        completion_ids=completion_ids.to(device),
        completion_mask=mask.to(device),
        lengths=lengths,
        truncated=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        sampler_logprobs=torch.full(mask.shape, math.nan, device=device),
        sampler_entropy=torch.full(mask.shape, math.nan, device=device),
    )


# =============================================================================
# Triton kernels: what a GPU runs in place of many passes over the same numbers
# =============================================================================


def is_recent_nvidia(device) -> bool:
    """An NVIDIA GPU from Ampere on (A100, RTX 30): what FlashAttention 2 and the kernels below are for."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def can_run_kernels(device) -> bool:
    """Whether Triton can build kernels for this device, tested by building one: it needs a C compiler and Python's headers.
    If it cannot, plain PyTorch does the same."""
    if triton is None or not is_recent_nvidia(device):
        return False
    try:
        sums_of_logits(torch.zeros(1, 64, device=device))
    except Exception as error:  # whatever a compiler or a driver may raise
        print_line(f"warning: Triton builds no kernels here, so a step takes longer ({one_line(error)})")
        return False
    return True


def sums_of_logits(logits):
    """The log-sum-exp of each row of logits (n, columns), and the mean logit under its softmax: both (n, 1)."""
    (n, columns), block = logits.shape, min(max(triton.next_power_of_2(logits.shape[1]), 16), 4096)
    log_totals, means, rows = logits.new_empty(n, 1), logits.new_empty(n, 1), 4096 // block  # of a program
    log_sums[(triton.cdiv(n, rows),)](logits, log_totals, means, n, columns, ROWS=rows, BLOCK=block, num_warps=8)
    return log_totals, means


def gradient_of_logits(logits, log_z, g, h, entropy, target, dtype):
    """Gradient of g log p[target] + h entropy with respect to the logits (n, columns), in `dtype`. The other tensors are (n, 1)
    or (n,); h may be None; a target of -1 is in no column."""
    out, (n, columns) = torch.empty_like(logits, dtype=dtype), logits.shape
    numbers = (x.contiguous() for x in (log_z, g, g if h is None else h, entropy, target))
    logit_gradients[n, triton.cdiv(columns, 4096)](logits, out, *numbers, columns, HAS_ENTROPY=h is not None, BLOCK=4096)
    return out


if triton is not None:
    # Softmax in parts (online softmax): a part holds its highest score, the sum of its weights exp(score - highest), and the
    # weighted sum of its values. Indices: n queries of a tile, d elements of a key, e elements of a value, j keys of a block.

    @triton.jit
    def attend_block(
        q, keys, values, column, end, allowed, scaling, highest, total, weighted,
        DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Add the keys in these columns, as far as they are before `end`, to the part so far."""
        d, e, is_there = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), column < end
        k = tl.load(keys + column[None, :] * DIM + d[:, None], mask=is_there[None, :] & (d < DIM)[:, None], other=0.0)
        v_at = values + column[:, None] * VALUE_DIM + e[None, :]
        v = tl.load(v_at, mask=is_there[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        allowed = allowed & is_there[None, :]
        scores = tl.where(allowed, tl.dot(q, k, input_precision="ieee") * scaling, -1e30)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights, decay = tl.where(allowed, tl.exp(scores - new[:, None]), 0.0), tl.exp(highest - new)
        weighted = weighted * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        return new, total * decay + tl.sum(weights, 1), weighted

    @triton.jit
    def attend_to_prompts(
        query, keys, values, highest_out, total_out, weighted_out, members, prompt_lengths, positions, scaling, window,
        query_row, query_head, keys_prompt, keys_head, values_prompt, values_head, rows,
        GROUP: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, REPEATS: tl.constexpr, BLOCK: tl.constexpr,
        DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ):  # fmt: skip
        """A program for each part of a prompt, key head and tile of queries (those of all rows that continue the prompt)."""
        prompt, kv_head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * REPEATS
        tile, part = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
        n, d, e, j = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, BLOCK)
        row = tl.load(members + prompt * GROUP + n // REPEATS, mask=n < GROUP * REPEATS, other=-1).to(tl.int64)
        head, is_there = kv_head * REPEATS + n % REPEATS, row >= 0
        length = tl.where(tl.max(row, 0) >= 0, tl.load(prompt_lengths + prompt), 0)  # all its rows may have left
        position = tl.load(positions + row, mask=is_there, other=0)
        q_at = query + row[:, None] * query_row + head[:, None] * query_head + d[None, :]
        q = tl.load(q_at, mask=is_there[:, None] & (d < DIM)[None, :], other=0.0)
        keys += prompt * keys_prompt + kv_head * keys_head
        values += prompt * values_prompt + kv_head * values_head
        highest, total = tl.full([TILE], -1e30, tl.float32), tl.zeros([TILE], tl.float32)
        weighted = tl.zeros([TILE, VALUE_WIDTH], tl.float32)
        of_part = tl.cdiv(length, SPLITS * BLOCK) * BLOCK
        for start in range(part * of_part, tl.minimum((part + 1) * of_part, length), BLOCK):
            column = start + j
            highest, total, weighted = attend_block(
                q, keys, values, column, length, position[:, None] - column[None, :] < window, scaling, highest, total, weighted,
                DIM, VALUE_DIM, WIDTH, VALUE_WIDTH,
            )  # fmt: skip
        at = (part * rows + row) * heads + head
        tl.store(highest_out + at, highest, mask=is_there)
        tl.store(total_out + at, total, mask=is_there)
        weighted_at = weighted_out + at[:, None] * VALUE_DIM + e[None, :]
        tl.store(weighted_at, weighted, mask=is_there[:, None] & (e < VALUE_DIM)[None, :])

    @triton.jit
    def attend_to_completions(
        query, key, value, keys, values, highest_in, total_in, weighted_in, out, step, scaling, window,
        query_row, query_head, key_row, key_head, value_row, value_head, C, rows,
        TILE: tl.constexpr, SPLITS: tl.constexpr, REPEATS: tl.constexpr, BLOCK: tl.constexpr,
        DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ):  # fmt: skip
        """A program for each row and key head: stores the new key and value, and combines the parts that the row attends to."""
        row, kv_head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1) * REPEATS
        n, d, e, j = tl.arange(0, TILE), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, BLOCK)
        head, is_there, t = kv_head * REPEATS + n, n < REPEATS, tl.load(step).to(tl.int32)
        is_number = is_there[:, None] & (e < VALUE_DIM)[None, :]
        q_at = query + row * query_row + head[:, None] * query_head + d[None, :]
        q = tl.load(q_at, mask=is_there[:, None] & (d < DIM)[None, :], other=0.0)
        k = tl.load(key + row * key_row + kv_head * key_head + d, mask=d < DIM, other=0.0)
        v = tl.load(value + row * value_row + kv_head * value_head + e, mask=e < VALUE_DIM, other=0.0)
        keys += (row * tl.num_programs(1) + kv_head) * C * DIM
        values += (row * tl.num_programs(1) + kv_head) * C * VALUE_DIM
        tl.store(keys + t * DIM + d, k, mask=d < DIM)
        tl.store(values + t * VALUE_DIM + e, v, mask=e < VALUE_DIM)
        # The new token itself ...
        highest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
        total, weighted = tl.full([TILE], 1.0, tl.float32), tl.zeros([TILE, VALUE_WIDTH], tl.float32) + v.to(tl.float32)[None, :]
        # ... the prompt, in parts ...
        for part in tl.static_range(SPLITS):
            at = (part * rows + row) * heads + head
            highest_there = tl.load(highest_in + at, mask=is_there, other=-1e30)
            total_there = tl.load(total_in + at, mask=is_there, other=0.0)
            weighted_there = tl.load(weighted_in + at[:, None] * VALUE_DIM + e[None, :], mask=is_number, other=0.0)
            new = tl.maximum(highest, highest_there)
            decay, decay_there = tl.exp(highest - new), tl.exp(highest_there - new)
            total = total * decay + total_there * decay_there
            weighted = weighted * decay[:, None] + weighted_there * decay_there[:, None]
            highest = new
        # ... and the completion's tokens before.
        for start in range(tl.maximum(t - window + 1, 0) // BLOCK * BLOCK, t, BLOCK):
            column = start + j
            highest, total, weighted = attend_block(
                q, keys, values, column, t, is_there[:, None] & (t - column < window)[None, :], scaling, highest, total, weighted,
                DIM, VALUE_DIM, WIDTH, VALUE_WIDTH,
            )  # fmt: skip
        tl.store(out + (row * heads + head)[:, None] * VALUE_DIM + e[None, :], weighted / total[:, None], mask=is_number)

    @triton.jit
    def log_sums(logits, log_totals, means, n, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """A program for some rows of logits: the log-sum-exp of each, and its mean under the softmax."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        highest, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
        mean = tl.zeros([ROWS], tl.float32)  # the sum of weight * (logit - highest)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            is_there = (row < n)[:, None] & (column < columns)[None, :]
            z = tl.load(logits + row[:, None] * columns + column[None, :], mask=is_there, other=float("-inf"))
            new = tl.maximum(highest, tl.max(z, 1))
            above = z - new[:, None]
            weights, decay = tl.exp(above), tl.exp(highest - new)
            mean = decay * (mean + (highest - new) * total) + tl.sum(tl.where(weights > 0, weights * above, 0.0), 1)
            total = total * decay + tl.sum(weights, 1)
            highest = new
        tl.store(log_totals + row, highest + tl.log(total), mask=row < n)
        tl.store(means + row, highest + mean / total, mask=row < n)

    @triton.jit
    def logit_gradients(
        logits, out, log_z, of_logprob, of_entropy, entropy, target, columns,
        HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program for each row and range of columns: gradient of g log p[target] + h entropy with respect to the logits."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        log_p = tl.load(logits + row * columns + column, mask=column < columns, other=float("-inf")) - tl.load(log_z + row)
        g = tl.load(of_logprob + row)
        factor = -g
        if HAS_ENTROPY:
            factor = tl.where(log_p > -1e30, -g - tl.load(of_entropy + row) * (log_p + tl.load(entropy + row)), 0.0)
        grad = tl.exp(log_p) * factor + tl.where(column == tl.load(target + row), g, 0.0)
        tl.store(out + row * columns + column, grad, mask=column < columns)


# =============================================================================
# Models and tokenizers
# =============================================================================


def load_tokenizer_and_config(args):
    """Tokenizer and config of --model. Prompts need nothing else, so errors in prompts are found before the weights load."""
    if args.model == "tiny":
        tokenizer = tiny_tokenizer()
        return tokenizer, tiny_config(tokenizer)
    tokenizer, config = load_tokenizer(args.model, "--model", args), load_config(args.model, "--model", args)
    with explained_as(f"--model {args.model}: its {type(config).__name__} is not that of a causal language model"):
        operator.index(config.get_text_config().vocab_size)  # models of sounds, pictures, ... have none
    return tokenizer, config


def load_policy(args, run, tokenizer):
    """The policy in float32 and the set of its end tokens. The tiny model comes warm-started."""
    if args.model == "tiny":
        policy, end_ids = tiny_model(tokenizer, args.seed).to(run.device), {tokenizer.eos_token_id}
        if not args.resume and run.rank == 0:
            warm_start(policy, tokenizer, run)
        if run.world > 1:
            for parameter in policy.parameters():
                dist.broadcast(parameter.data, 0)
    else:
        policy = load_model(AutoModelForCausalLM, args.model, "--model", args).to(run.device)
        end_ids = end_tokens(args.model, tokenizer, policy)
    if args.gradient_checkpointing:
        checkpoint_layers(policy)
    policy.names_when_loaded = set(weights_of(policy))
    return policy, end_ids


def end_tokens(name, tokenizer, model) -> set[int]:
    """All end tokens that tokenizer or configs name (chat models have several) and the model's vocabulary has."""
    sources = (tokenizer, model.config, model.config.get_text_config(), model.generation_config)
    ends = [getattr(source, "eos_token_id", None) for source in sources]
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end])]
    vocabulary = model.config.get_text_config().vocab_size
    known = {i for i in ends if type(i) is int and 0 <= i < vocabulary}
    if not known:
        raise UserError(f"--model {name}: tokenizer and configs name no end token (eos_token) among its {vocabulary} tokens")
    return known


def load_pretrained(auto_class, name, flag_name, args, **options):
    """`auto_class.from_pretrained` of what the user gave as `flag_name`."""
    find_hub(name, flag_name)
    try:
        return auto_class.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # transformers checks little of what stands in a config: anything may come of it
        why = one_line(error)
        if "trust_remote_code" in str(error):
            why = "it comes with code of its own; --trust-remote-code lets that run on this machine"
        if error.args == ("flat_row",):  # KeyError: the family has its own table of attentions
            why = "its family keeps to attention of its own, which this project does not run"
        if not os.path.exists(name):
            why += f" (there is no such folder in {os.getcwd()} either)"
        raise UserError(f"{flag_name} {name}: cannot be loaded: {why}") from error


def load_tokenizer(name, flag_name, args):
    tokenizer = load_pretrained(AutoTokenizer, name, flag_name, args)
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):  # what transformers makes of missing files
        raise UserError(f"{flag_name} {name}: its tokenizer knows no tokens; is its tokenizer.json there?")
    return tokenizer


def load_config(name, flag_name, args):
    return load_pretrained(AutoConfig, name, flag_name, args)


def load_model(auto_class, name, flag_name, args, dtype=torch.float32, attention="flat_row"):
    """A transformers model from safetensors, by default in float32 and with this project's attention; dropout is off."""
    config = load_config(name, flag_name, args)
    model, report = load_pretrained(
        auto_class, name, flag_name, args, config=without_noise(config), dtype=dtype, attn_implementation=attention,
        use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    for weight, there, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{flag_name} {name}: its {weight} is {tuple(there)} in the file, but {tuple(wanted)} by its config.json")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{flag_name} {name}: weights of a {type(model).__name__} are missing: {', '.join(missing[:3])}")
    model.config_to_save = config
    model.get_input_embeddings().padding_idx = None  # the pad, where a flat row has one, is a token like any other and learns
    for module in model.modules():
        # These choose rotary frequencies by the sequence's length, which would wait for a GPU and break CUDA graphs. They need
        # not: no sequence is longer than `positions_of`.
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            module.rope_type = "default"
    return without_dropout(model)


def find_hub(name, flag_name):
    """Call before loading `name`: if it is no path and the hub cannot be reached, sets the hub's client to use its cache only.

    Otherwise the client would try ten times, which takes up to a minute, and print every try. Raises UserError for a name
    that is neither a path nor a hub id.
    """
    if os.path.exists(name):
        return
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):  # begins with \w, so that ./name is no id
        raise UserError(f"{flag_name} {name}: there is no such file or folder")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # of httpx or requests, whichever this version of the client is made with
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def without_noise(config):
    """A copy without dropout and router jitter, for families that read these at each call instead of in an nn.Dropout."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
    return config


def without_dropout(model):
    """Turn dropout off: the ratio would compare two different masks. Train mode stays on, for gradient checkpointing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def checkpoint_layers(model):
    """Keep no activations inside the layers: the backward pass recomputes them. transformers 5.23 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook for reentrant checkpointing; it would rule out `TiedWeight`


class Critic(nn.Module):
    """A transformer with a scalar head in place of the vocabulary's: the expected return before each token."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)


def load_critic(args, run, policy) -> Critic:
    """A critic whose backbone starts from --critic-model, or else from the policy's weights; its head starts at 0."""
    if args.critic_model is None:
        backbone = copy.deepcopy(policy.base_model)
    else:
        backbone = load_model(AutoModel, args.critic_model, "--critic-model", args)
        if backbone.get_input_embeddings().num_embeddings < policy.get_input_embeddings().num_embeddings:
            raise UserError(
                f"--critic-model {args.critic_model}: its vocabulary is smaller than the policy's; take one of its tokens"
            )
        name = f"--critic-model {args.critic_model}: {type(backbone).__name__}"
        check_flat_row(run, backbone.to(run.device), name)
        if args.gradient_checkpointing:
            checkpoint_layers(backbone)
    return Critic(backbone).to(run.device)


def frozen_copy(model, compute_dtype=torch.float32):
    """A copy that is never trained.

    If `compute_dtype` is lower than float32, matrices and their biases are stored in it. This takes half the memory and gives
    nearly the same results as float32 weights under autocast, which casts all of these except the embeddings. Norms and the
    residual stream stay float32.
    """
    cast = {}  # by id, as deepcopy wants it: what it finds there it does not copy
    if compute_dtype != torch.float32:
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            matrices = [parameter for parameter in own if parameter.dim() > 1]
            # Biases are cast with their matrix, except the head's, since logits are float32.
            for parameter in own if matrices and module is not model.get_output_embeddings() else matrices:
                cast[id(parameter)] = nn.Parameter(parameter.detach().to(compute_dtype), requires_grad=False)
    frozen = copy.deepcopy(model, cast).requires_grad_(False).eval()
    if compute_dtype != torch.float32:
        frozen.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    return frozen


@torch.no_grad()
def copy_weights(source, target):
    """Copy the parameters of `source` into those of `target`, whatever the precision of the two."""
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.copy_(placed(whole(a), b))


def check_model(run, model, sampler, tokenizer):
    """Compare log-probs of sampler, trainer and transformers' own attention on random tokens, and print the result.

    Raises UserError for a model family that this project cannot run, or whose log-probs differ here from transformers'.
    """
    name = f"--model {run.args.model}: {type(model).__name__}"
    check_flat_row(run, model, name)
    head = model.get_output_embeddings()
    if type(head).forward is not nn.Linear.forward or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        raise UserError(f"{name}: only weight and bias of the head are used, so it takes no adapter or hook ({type(head).__name__})")
    if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        raise UserError(f"{name} caps its logits, which this project does not run")
    with explained_as(f"{name} is of a kind that this project does not run"):
        family_gap, sampler_gap = logprob_gaps(run, model, sampler)
    if not family_gap < 1e-2:  # float32 rounds off some 1e-4 in a deep model, and a wrong family is off by far more
        raise UserError(
            f"{name} has a cache, positions or head of a kind that this project does not run (its log-probs differ by "
            f"{family_gap:.2g} from those of transformers)"
        )
    ends = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in sampler.end_ids.tolist())
    run.say(f"end tokens: {ends}; sampler and trainer differ by at most {sampler_gap:.1e} in log-prob")
    if sampler_gap > 0.1:
        run.warn("sampler and trainer disagree: --dtype float32 makes them agree")


@torch.no_grad()
def check_flat_row(run, model, name):
    """Raises UserError, which begins with `name`, unless the flat row gives the same hidden states as transformers, which runs
    one sequence at a time; also for a model that applies an attention window only through masks."""
    config, windows = model.config.get_text_config(), set()
    n = min(run.args.max_new_tokens, 4)  # of each completion
    prompts, completions = random_prompts(run, config, n), random_prompts(run, config, n, n)
    tokens, layout = flat_row(rollout_of(prompts, completions, run.device))
    attend = layout.attend
    layout.attend = lambda *args: windows.add(args[-1]) or attend(*args)
    with explained_as(f"{name} is of a kind that this project does not run"):
        try:
            ours, theirs = flat_forward(model, tokens, layout.positions, layout).index_select(0, layout.predictors), []
        except UserError as error:  # of `flat_row_attention`, which does not know whose it is
            raise UserError(f"{name}: {error}") from None
        with transformers_attention(model):
            for prompt, completion in zip(prompts, completions):
                ids = torch.tensor([prompt + completion[:-1]], device=run.device)
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                theirs.append(states[0, len(prompt) - 1 :])
        gap = float((ours - torch.cat(theirs)).norm() / ours.norm())
    if not gap < 1e-3:
        raise UserError(f"{name} is of a kind that this project does not run: its hidden states differ by {gap:.2g} of their norm")
    # These sequences are too short to show a window that a family applies only through masks, which are ignored here.
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or ["sliding_attention"]
    is_used = window and window < run.args.max_prompt_tokens + run.args.max_new_tokens and "sliding_attention" in kinds
    if is_used and windows == {None}:
        raise UserError(f"{name} has a window of {window} tokens of a kind that this project does not run")


def random_prompts(run, config, room_after: int, length: int | None = None) -> list[list[int]]:
    """Two random prompts, of 5 and 9 tokens at most or both of `length`, with positions left for `room_after` more."""
    room = (positions_of(config) or math.inf) - room_after
    return [(run.uniforms(0, 3, length or min(n, room)) * config.vocab_size).long().tolist() for n in (5, 9)]


@contextlib.contextmanager
def transformers_attention(model):
    """Context manager: the block runs transformers' own attention, in plain PyTorch ("eager")."""
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("flat_row")


@torch.no_grad()
def logprob_gaps(run, model, sampler) -> tuple[float, float]:
    """Largest log-prob differences: of this project from transformers, both in float32, and of sampler from trainer.

    Call it before `shard`: sharded layers always compute in --dtype, and only float32 tells a wrong family from rounding.
    """
    temperature, C = sampler.temperature, min(sampler.C, 16)  # enough to tell
    prompts, uniforms = random_prompts(run, model.config.get_text_config(), C), run.uniforms(0, 4, 4, C)
    sampler = copy.copy(sampler)  # its tables are made anew
    sampler.C = C
    rollout = sampler.sample(prompts, 2, uniforms)
    with run.autocast():
        trainer = completion_logprobs(model, rollout, temperature)
    sampler_gap = (trainer - rollout.sampler_logprobs).abs().max()
    if not sampler.is_exact:  # rounding would hide an error of a bfloat16 sampler: compare a float32 one
        rollout = Sampler(model, set(sampler.end_ids.tolist()), temperature, C).sample(prompts, 2, uniforms)
    ours = completion_logprobs(model, rollout, temperature)
    theirs = torch.zeros_like(ours)
    with transformers_attention(model):
        for b, n in enumerate(rollout.lengths.tolist()):
            prompt = prompts[b // 2]
            ids = torch.tensor([prompt + rollout.completion_ids[b, :n].tolist()], device=run.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
            theirs[b, :n] = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    gaps = [(x - theirs).abs().max() for x in (ours, rollout.sampler_logprobs)]
    return float(torch.stack(gaps).max()), float(sampler_gap)


def positions_of(config) -> int | None:
    """How many tokens a text config has positions for; None: no bound is known (XLNet's -1 is none).

    With longrope (Phi-3, Phi-4-mini) the original number: a longer sequence would change the positions of the whole batch.
    """
    positions, rope = getattr(config, "max_position_embeddings", None) or 0, getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        positions = rope.get("original_max_position_embeddings") or positions
    return positions if positions > 0 else None


# =============================================================================
# torch.compile, and models split between processes
# =============================================================================


@functools.cache
def fused(function):
    """torch.compile of the function, made once for all samplers that come and go; one program serves all numbers of rows."""
    compiled = torch.compile(function)

    def call(*args):
        for x in args:
            if isinstance(x, Tensor):
                torch._dynamo.maybe_mark_dynamic(x, 0)  # else the first number of rows gets a program of its own
        return compiled(*args)

    return call


def is_compiled(model) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def compile_layers(*models):
    """Let torch.compile fuse the operations between the matrix products of each layer; attention is not compiled.

    Layers of a kind share their programs: one with gradients, one without, one frozen.
    Raises UserError where no program can be built: torch.compile needs a C or C++ compiler.
    """
    with explained_as("--compile: torch.compile does not work here"):
        torch.compile(torch.neg)(torch.ones(2, device=next(models[0].parameters()).device))
    # One program for each kind of layer, with and without gradients, for one row and for many: the default limit of eight a
    # function is too low for some families, and whatever exceeds it would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    AttentionInterface.register("flat_row", torch.compiler.disable(flat_row_attention))
    for module in nn.ModuleList(model for model in models if model is not None).modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def shard(run, model):
    """Split the model's parameters, and so its gradients and optimiser state, between all processes (FSDP2); returns it.

    With one process nothing happens. Gradients are summed: the denominators of the losses count all processes already.
    """
    if run.world == 1:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh(run.device.type, (run.world,))
    # Layers are gathered as autocast would cast them: all but their norms, which like embeddings and head stay float32.
    low = None if run.compute_dtype == torch.float32 else run.compute_dtype
    layer_policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in reversed(list(model.modules())):  # children first
        own, is_layer = list(module.parameters(recurse=False)), type(module).__name__ in layers
        is_norm = bool(own) and all(parameter.dim() == 1 for parameter in own)
        if module is model or is_layer or (low is not None and is_norm):
            policy = layer_policy if is_layer else MixedPrecisionPolicy()
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.with_whole_parameters = lambda function: function()
    register_fsdp_forward_method(model, "with_whole_parameters")
    return model


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which have to call this together; any other one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# =============================================================================
# The built-in model and task
# =============================================================================


def tiny_tokenizer():
    """A tokenizer whose tokens are single characters."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *"0123456789+="])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def tiny_config(tokenizer):
    """Of a Llama with 107,712 weights."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def tiny_model(tokenizer, seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(tokenizer), attn_implementation="flat_row").train()


def addition_rows(split):
    """The built-in task: the sum of two numbers of two digits, with operands and answer written units first.

    `74+28=` asks for 47 + 82, and `921` is right. Easy: no column carries; hard: at least one does. The sets "warm start",
    "train" and "test" are disjoint and the same for every seed; a sum and its mirror image 82 + 47 are in the same set.
    """
    sets, shuffler = {"test": [], "warm start": [], "train": []}, random.Random(0)
    for level, sizes in (("easy", {"test": 250, "warm start": 1400}), ("hard", {"test": 250, "warm start": 600})):
        sums = [(a, b) for a in range(100) for b in range(a, 100)]
        sums = [(a, b) for a, b in sums if (a % 10 + b % 10 < 10 and a // 10 + b // 10 < 10) == (level == "easy")]
        shuffler.shuffle(sums)
        filled = Counter()
        for a, b in sums:
            name = next((name for name, size in sizes.items() if filled[name] < size), "train")
            for x, y in sorted({(a, b), (b, a)}):
                filled[name] += 1
                sets[name].append(
                    {"prompt": f"{x:02}"[::-1] + "+" + f"{y:02}"[::-1] + "=", "answer": f"{a + b:03}"[::-1], "level": level}
                )
    for rows in sets.values():
        shuffler.shuffle(rows)
    return sets[split]


def warm_start(model, tokenizer, run, target=0.22, batch_size=64, max_steps=1000):
    """Supervised steps on the tiny model until its greedy accuracy on training prompts reaches `target`.

    This makes it partly competent, as a pretrained model is. The result is the reference policy; all later training learns
    from rewards of 0 or 1 alone.
    """
    started = time.time()
    rows, probe = addition_rows("warm start"), addition_rows("train")
    probe = [probe[i] for i in run.uniforms(0, 1, len(probe)).argsort()[:256]]
    probe_prompts = tokenizer([row["prompt"] for row in probe]).input_ids
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    answers = tokenizer([row["answer"] + tokenizer.eos_token for row in rows]).input_ids
    sampler = Sampler(model, {tokenizer.eos_token_id}, 1.0, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(max_steps):
        if step % 2 == 0 and step >= 50:
            texts = tokenizer.batch_decode(sampler.sample(probe_prompts, 1, None).completion_ids, skip_special_tokens=True)
            accuracy = sum(text == row["answer"] for text, row in zip(texts, probe)) / len(probe)
            if accuracy >= target:
                break
        chosen = run.uniforms(step, 2, len(rows)).argsort()[:batch_size].tolist()
        batch = rollout_of([prompts[i] for i in chosen], [answers[i] for i in chosen], run.device)
        (-completion_logprobs(model, batch, temperature=1.0).sum() / batch.lengths.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.say(
        f"warm start: {step} supervised steps in {time.time() - started:.1f} s, accuracy on training prompts {accuracy:.2f}"
    )


# =============================================================================
# Prompts
# =============================================================================

GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
)
GSM8K_SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


@dataclass
class Prompt:
    ids: list[int]  # tokens, with the special tokens of the chat template or of the tokenizer
    prompt: str | list[dict]  # what reward functions receive: the text, or the chat
    columns: dict[str, Any]  # the row's other columns, passed to reward functions by name


class Row(dict):
    """A row of a dataset that knows where it was read."""

    place = ""


def load_rows(dataset: str, split: str, prompt_column: str = "prompt", answer_column: str = "answer") -> list[dict]:
    """Reads a dataset into rows that all have the same columns, "prompt" (text or chat) among them.

    dataset: "addition", "gsm8k", a JSON-lines file (the whole file, whatever the split) or a hub
    dataset "id" or "id:config". split: "train" or "test". The prompt and answer columns are copied
    to "prompt" and "answer", over columns that had these names; the originals stay, so that a
    reward function may use either name. A column that a row lacks is None.
    Raises UserError naming file and line for anything that is not a prompt.
    """
    if dataset == "addition":
        return addition_rows(split)
    if dataset == "gsm8k":
        prompt_column = "question" if prompt_column == "prompt" else prompt_column
        source = read_jsonl(fetch_gsm8k(split))
    elif dataset.endswith(".jsonl") or os.path.isfile(dataset):
        source = read_jsonl(dataset)
    else:
        source = read_hub_dataset(dataset, split)
    rows = []
    for place, given in source:
        if prompt_column not in given:
            raise UserError(
                f"{place}: no column '{prompt_column}' (it has {', '.join(given) or 'none'}); "
                f"name the right one with --prompt-column"
            )
        check_prompt(given[prompt_column], place)
        row = Row(given, prompt=given[prompt_column])
        if answer_column != "answer":
            row["answer"] = given.get(answer_column)
        row.place = place
        rows.append(row)
    if not rows:
        raise UserError(f"{dataset} holds no prompts")
    if answer_column != "answer" and all(row["answer"] is None for row in rows):
        raise UserError(f"{dataset}: no row has the column '{answer_column}' of --answer-column")
    columns = dict.fromkeys(name for row in rows for name in row)
    for row in rows:
        for name in columns:
            row.setdefault(name, None)
    return rows


def check_prompt(prompt: Any, place: str):
    """Raises UserError unless the prompt is a text or a chat with something in it."""
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        texts = [turn["content"] for turn in prompt]
    else:
        raise UserError(f'{place}: the prompt must be a text or a list of {{"role": text, "content": text}}')
    if not "".join(texts).strip():
        raise UserError(f"{place}: the prompt is empty")
    with explained_as(f"{place}: the prompt is no text", UnicodeEncodeError):
        "".join(texts).encode()  # JSON can spell half a surrogate pair ("\ud800"), which no tokenizer takes


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Yields ("file:line", object) for each line that is not blank; UserError names a broken one."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                with explained_as(f"{path}:{number}: not one JSON object a line", ValueError, RecursionError):
                    row = json.loads(line)  # of bytes: UTF-8, with a byte-order mark or without
                if not isinstance(row, dict):
                    raise UserError(f'{path}:{number}: not an object; write one {{"prompt": ...}} a line')
                yield f"{path}:{number}", row
    except OSError as error:
        raise UserError(f"dataset {path}: {error.strerror}") from None


def fetch_gsm8k(split: str) -> Path:
    """The authors' file of GSM8K's split, fetched once into the Hugging Face cache folder."""
    path = Path(huggingface_hub.constants.HF_HOME, "gsm8k", f"{split}.jsonl")
    if path.exists():
        if file_digest(path) != GSM8K_SHA256[split]:
            raise UserError(f"{path} is not GSM8K as its authors published it; delete it to fetch it again")
        return path
    # Behind a firewall that drops packets the default, no time limit, looks like a hang.
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(f"{GSM8K_URL}/{path.name}", str(path), hash_prefix=GSM8K_SHA256[split])
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"could not fetch gsm8k ({one_line(error)}); put train.jsonl and test.jsonl of {GSM8K_URL} into {path.parent}"
        ) from None
    finally:
        socket.setdefaulttimeout(default_timeout)
    return path


def read_hub_dataset(dataset: str, split: str) -> Iterator[tuple[str, dict]]:
    """Yields ("id row n", row) of a hub dataset "id" or "id:config", through the datasets library."""
    name, _, config = dataset.partition(":")
    flag_name = "--dataset" if split == "train" else "--eval-dataset"
    find_hub(name, flag_name)
    try:
        import datasets  # after find_hub: reads HF_HUB_OFFLINE at import
    except ImportError:
        raise UserError(
            f"dataset {dataset} is neither built in (addition, gsm8k) nor a file here; "
            f"to read it from the Hugging Face hub: pip install datasets"
        ) from None
    with explained_as(f"{flag_name} {dataset}, split {split}"):  # a wrong id, config or split, or no network
        loaded = datasets.load_dataset(name, config or None, split=split)
    for number, row in enumerate(loaded):
        yield f"{dataset} row {number}", dict(row)


def tokenize_prompts(
    rows: list[dict], tokenizer, system_prompt: str | None, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """Tokenises rows; returns the prompts and how many were dropped.

    A prompt longer than max_prompt_tokens is dropped, never cut: a question without its end asks
    something else. A chat, or a text with a system prompt, goes through the chat template (an empty
    system prompt: the template without a system message); a chat's own system message wins. Where the
    template has no place for a system message, it goes in front of the user's text.
    Raises UserError for a template that is missing or refuses, and when nothing is left.
    """
    texts = [with_system_prompt(row["prompt"], system_prompt) for row in rows]
    if any(map(begins_with_system, texts)) and not shows_system_message(tokenizer):
        texts = [system_in_user_turn(text) for text in texts]
    places = [  # what an error begins with; nothing for a text that --system-prompt made a chat: its row is not to blame
        f"{row.place}: " if getattr(row, "place", "") and isinstance(row["prompt"], type(text)) else ""
        for row, text in zip(rows, texts)
    ]
    check_roles([(place, text) for place, text in zip(places, texts) if isinstance(text, list)], tokenizer)
    plain_ids = iter(text_ids([text for text in texts if isinstance(text, str)], tokenizer))
    prompts = []
    for row, prompt, place in zip(rows, texts, places):
        ids = chat_ids(prompt, tokenizer, place) if isinstance(prompt, list) else next(plain_ids)
        if not ids:
            raise UserError(f"{place}the prompt {str(prompt)[:60]!r} gives no tokens with this model's tokenizer")
        prompts.append(Prompt(ids, prompt, {name: value for name, value in row.items() if name != "prompt"}))
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_tokens]
    if not kept:
        raise UserError(
            f"all {len(prompts)} prompts to train or evaluate on are longer than --max-prompt-tokens {max_prompt_tokens}; "
            f"the shortest has {min(len(prompt.ids) for prompt in prompts)} tokens"
        )
    return kept, len(prompts) - len(kept)


def with_system_prompt(prompt: str | list[dict], system_prompt: str | None) -> str | list[dict]:
    if system_prompt is None:
        return prompt
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system_prompt or begins_with_system(chat):
        return chat
    return [{"role": "system", "content": system_prompt}, *chat]


def begins_with_system(prompt: str | list[dict]) -> bool:
    return isinstance(prompt, list) and prompt[0]["role"] == "system"


def shows_system_message(tokenizer) -> bool:
    """Whether the chat template takes a system message: some refuse it (Gemma), and some leave it out without a word."""
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    try:
        return chat_ids(chat, tokenizer) != chat_ids(chat[1:], tokenizer)
    except UserError:
        return False


def system_in_user_turn(prompt: str | list[dict]) -> str | list[dict]:
    """A chat with its system message moved to the front of the user message that follows; any other prompt unchanged."""
    if not begins_with_system(prompt) or len(prompt) < 2 or prompt[1]["role"] != "user":
        return prompt
    system, user, *rest = prompt
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def check_roles(chats: list[tuple[str, list[dict]]], tokenizer):
    """Raises UserError for a role whose messages the chat template leaves out; looks at the first message of each."""
    seen = set()
    for place, chat in chats:
        for i, message in enumerate(chat):
            if message["role"] not in seen:
                seen.add(message["role"])
                longer = [*chat[:i], message | {"content": message["content"] + " and so on"}, *chat[i + 1 :]]
                if chat_ids(longer, tokenizer, place) == chat_ids(chat, tokenizer, place):
                    raise UserError(f"{place}the chat template leaves out messages of the role {message['role']!r}")


def chat_ids(chat: list[dict], tokenizer, place: str = "") -> list[int]:
    """Tokens of a chat up to where the reply begins, or continues if the chat ends with an assistant's message."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{place}this model's tokenizer has no chat template, which chats and --system-prompt need: "
            "give prompts as texts and leave --system-prompt out, or take a chat model"
        )
    begun = chat[-1]["role"] == "assistant"
    with explained_as(f"{place}the chat template refuses the prompt {str(chat)[:60]!r}"):  # in words of its own
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=not begun, continue_final_message=begun, return_dict=False
        )


def text_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Tokens of texts with the tokenizer's special tokens, but without a second begin token if the text spells one, and
    without an end token that the tokenizer appends, since the model has to continue the prompt."""
    # A thousand at a time, since what a tokenizer makes beside the ids of a million texts takes gigabytes.
    parts = inner_progress(range(0, len(texts), 1000), "tokenizing")
    all_ids = [ids for start in parts for ids in tokenizer(texts[start : start + 1000])["input_ids"]]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for i, (text, ids) in enumerate(zip(texts, all_ids)):
        if ids[:2] == [begin, begin] or ids[-1:] == [end]:
            bare = tokenizer(text, add_special_tokens=False)["input_ids"]
            if bare[:1] == [begin] and ids[: len(bare) + 1] == [begin, *bare]:
                ids = ids[1:]
            while ids[-1:] == [end] and ids[-len(bare) :] != bare:
                ids = ids[:-1]
            all_ids[i] = ids
    return all_ids


def held_out_split(rows: list[dict], count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows): holds out min(count, a tenth) of the distinct prompts, at random by seed.

    Distinct, since some datasets repeat prompts; none is on both sides. Rows stay in file order. Of fewer than 10 distinct
    prompts none are held out: the evaluation rows are training rows.
    """
    prompts, first_rows = [json.dumps(row["prompt"]) for row in rows], {}
    for prompt, row in zip(prompts, rows):
        first_rows.setdefault(prompt, row)
    if len(first_rows) < 10:
        return rows, rows[:count]
    held = set(random.Random(seed).sample(list(first_rows), min(count, len(first_rows) // 10)))
    train_rows = [row for prompt, row in zip(prompts, rows) if prompt not in held]
    return train_rows, [row for prompt, row in first_rows.items() if prompt in held]


def load_train_and_eval_rows(args, rewards: list["Reward"], eval_reward: "Reward") -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to evaluate on, checked against what the reward functions need.

    No prompt is in both, unless --eval-dataset repeats it, or there is no --eval-dataset and fewer than 10 prompts.
    """
    train_rows = load_rows(args.dataset, "train", args.prompt_column, args.answer_column)
    if args.eval_dataset or args.dataset in ("addition", "gsm8k"):
        eval_rows = load_rows(args.eval_dataset or args.dataset, "test", args.prompt_column, args.answer_column)
        count = min(len(eval_rows), args.eval_prompts)
        eval_rows = [eval_rows[i * len(eval_rows) // count] for i in range(count)]  # from all over the file, which may be sorted
    else:
        train_rows, eval_rows = held_out_split(train_rows, args.eval_prompts, args.seed)
    check_rewards(rewards, train_rows, args.system_prompt)
    check_rewards([eval_reward], eval_rows, args.system_prompt)
    return train_rows, eval_rows


def as_question(row: dict) -> dict:
    """Put a text prompt into "Question: ... Answer:" form, for models without a chat template; leave a chat as it is."""
    return row | {"prompt": f"Question: {row['prompt']}\nAnswer:"} if isinstance(row["prompt"], str) else row


GSM8K_INSTRUCTION = "Solve the problem step by step. Then write #### and the final number."


def tokenize_train_and_eval(args, run, tokenizer, config, train_rows, eval_rows) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and prompts to evaluate on; says how many were dropped and how GSM8K is asked."""
    system_prompt = args.system_prompt
    if args.dataset == "gsm8k" and system_prompt is None:
        if tokenizer.chat_template:
            system_prompt = GSM8K_INSTRUCTION
            run.say(f"gsm8k: --system-prompt is {system_prompt!r}")
        else:
            train_rows, eval_rows = ([as_question(row) for row in rows] for rows in (train_rows, eval_rows))
            run.say("gsm8k: no chat template, so prompts are 'Question: ...' and 'Answer:'")
    given = [row["prompt"] for row in train_rows + eval_rows]
    has_system = system_prompt or any(map(begins_with_system, given))
    if has_system and tokenizer.chat_template and not shows_system_message(tokenizer):
        run.say("the chat template has no place for a system message: it goes in front of the user's text")
    if args.model == "tiny" and any(set(str(prompt)) - set("0123456789+=") for prompt in given):
        run.warn("--model tiny reads digits, + and = only: whatever else the prompts hold is one unknown token to it")
    asking = {"exact", "gsm8k"}.intersection(args.reward or ([] if args.reward_model else ["exact"]))
    missing = sum(row.get("answer") is None for row in train_rows)
    if asking and missing:
        run.warn(f"{missing} of {len(train_rows)} rows have no answer and are not scored by {' and '.join(sorted(asking))}")
    begun = sum(isinstance(prompt, list) and prompt[-1]["role"] == "assistant" for prompt in given)
    if begun:
        run.say(f"{begun} chats end with a message of the assistant, which completions go on with: cut it off if it is the answer")
    has_text = system_prompt is None and any(isinstance(prompt, str) for prompt in given)
    run.leaves_template_unused = has_text and bool(tokenizer.chat_template)
    if run.leaves_template_unused:
        run.say('prompts that are texts do not go through the chat template; with --system-prompt "" they do')
    train, dropped = tokenize_prompts(train_rows, tokenizer, system_prompt, args.max_prompt_tokens)
    evaluation, eval_dropped = tokenize_prompts(eval_rows, tokenizer, system_prompt, args.max_prompt_tokens)
    if dropped + eval_dropped:
        run.warn(f"{dropped + eval_dropped} prompts longer than --max-prompt-tokens {args.max_prompt_tokens} were dropped")
    trained = {json.dumps(row["prompt"]) for row in train_rows}
    shared = sum(json.dumps(row["prompt"]) in trained for row in eval_rows)
    if shared:
        run.warn(f"{shared} of {len(eval_rows)} evaluation prompts are training prompts, too")
    check_model_takes(train + evaluation, args, config, f"--model {args.model}")
    return train, evaluation


def check_model_takes(prompts: list[Prompt], args, config, name: str):
    """Raises UserError for tokens that the model `name` does not have, and for more tokens than it has positions for."""
    config = config.get_text_config()
    largest, longest = max(max(prompt.ids) for prompt in prompts), max(len(prompt.ids) for prompt in prompts)
    if largest >= config.vocab_size:
        what = f"the tokenizer gives token {largest}, and the model has only {config.vocab_size}"
        raise UserError(f"{name}: {what}: they do not belong together")
    room = positions_of(config)
    if room and longest + args.max_new_tokens > room:
        what = f"with a prompt of {longest} more than the {room} positions of {name}"
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: {what}")


def check_critic_model(args, tokenizer, prompts: list[Prompt]):
    """Raises UserError, before any model loads, for a --critic-model that cannot read the prompts as the policy does."""
    name = f"--critic-model {args.critic_model}"
    check_model_takes(prompts, args, load_config(args.critic_model, "--critic-model", args), name)
    try:
        own = load_tokenizer(args.critic_model, "--critic-model", args).get_vocab()
    except UserError:  # it comes without a tokenizer
        return
    known = tokenizer.get_vocab()
    shared = known.keys() & own.keys()
    if not shared or any(known[token] != own[token] for token in shared):
        raise UserError(f"{name}: its tokenizer has other numbers for the policy's tokens; take a model with the same tokenizer")


class PromptStream:
    """Prompts without end: every epoch in a new order, each prompt once an epoch.

    The order depends on the seed alone, so `position` (prompts taken so far) is all that a resumed
    run needs to set.
    """

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed, self.position = prompts, seed, 0
        self._epoch, self._order = -1, []
        digest = hashlib.sha256()  # of the prompts and their columns: a resumed run notices that they have changed
        for prompt in prompts:
            row = json.dumps([prompt.ids, prompt.columns], default=lambda other: type(other).__name__, skipkeys=True)
            digest.update(row.encode())
        self.digest = digest.hexdigest()

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts; what an epoch lacks comes from the next one."""
        batch = []
        for _ in range(n):
            epoch, offset = divmod(self.position, len(self.prompts))
            if epoch != self._epoch or len(self._order) != len(self.prompts):  # a script may set other prompts
                self._epoch, self._order = epoch, list(range(len(self.prompts)))
                random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            batch.append(self.prompts[self._order[offset]])
            self.position += 1
        return batch


# =============================================================================
# Built-in rewards
# =============================================================================
# Completions are the model's text and may be anything. They are parsed, never executed, and every step of this takes time
# linear in their length.


def completion_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def in_answer_tags(text: str) -> str | None:
    """What stands in the last <answer>...</answer> of a text; None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def given_answer(completion: str | list[dict]) -> str:
    """The text of a completion, or as much of it as stands in answer tags, which --reward format asks for."""
    text = completion_text(completion)
    inside = in_answer_tags(text)
    return text if inside is None else inside


def wanted_answer(answer: Any) -> str:
    """The answer of a dataset's row as text; 3.0, which is what some programs make of a column of integers, as 3."""
    if isinstance(answer, (list, dict)):
        raise ValueError(f"the answer {str(answer)[:60]!r} is no text or number; name the right column with --answer-column")
    return str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)


def exact_reward(completions, answer, **_) -> list[float | None]:
    """1.0 if the completion, or what it has in answer tags, is the answer, white space around both aside."""
    return [
        None if want is None else float(given_answer(got).strip() == wanted_answer(want).strip())
        for got, want in zip(completions, answer, strict=True)
    ]


# NUMBER begins with digits, which keeps the search fast. SIGN matches what precedes them: a minus
# (unless it follows an operand, as in 10-5), a currency sign, a leading point.
NUMBER = re.compile(r"(?:([0-9]+) (?=[0-9]+/[0-9]))?([0-9]+(?:[,_][0-9]{3}(?![0-9]))*(?:\.[0-9]+)?)(?:/([0-9]+))?")
MINUS = "[-\u2010\u2011\u2212\u2013]"
SIGN = re.compile(rf"((?<![^\W_])(?<![)\]}}%.]){MINUS})?(?:\\?[$€£¥₹])?((?<![\w.])\.)?\Z")
# What after or before a number shows that it is part of an expression (10^3, 2\sqrt{3}, 6 * 7, 6 x 7, 5:30, 1e3, 10 000) and so
# not the answer. Units, degrees and the stars of *emphasis* do not count.
GOES_ON = re.compile(
    r"\s*(?:\^(?!\{?\\circ)|\\(?!text|math|mbox|rm|circ|deg|q?quad|right|approx|implies|checkmark|end)[A-Za-z])"
    r"|\s*[-+*/×÷\u2212\u2013]\s*\\?[$€£¥₹]?[0-9(]|\s?\*\*[0-9(]|[²³¹⁰-⁹¼-¾⅐-⅞]|[_.,:'][0-9]|[eE][-+]?[0-9]|\s[0-9]|\([0-9]"
    r"|\s?[xX]\s?[0-9]|[A-Za-z]/[0-9]|/-?\.?[0-9]"
)
BEGAN_BEFORE = re.compile(
    r"(?:(?:[^\W_]|[)}\]])(?:[*/×÷+_]| [*/×÷+] )|\^\{?|[0-9](?:[.:']|[eE][-+]?| ?[xX] ?)"
    r"|\\(?:sqrt|[dt]?frac|binom|log|ln|sin|cos|tan|pi|times|cdot|div|pm) ?[{\[]?)\Z"
)


def gsm8k_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with, exactly; None if it has none.

    It is searched for inside the last \boxed{...} if there is one, else in the first line of what
    follows the last ####, else anywhere. In the first two it is the first number after the last "=" that has
    one after it, so a unit may follow; else it is the last number of the text. If that number is part
    of an expression, as in 10^3, the result is None. Thousands separators, currency and percent signs
    are ignored; a/b, \frac{a}{b} and 4\frac{1}{2} are fractions; 42, 42.0 and \$42.00 are equal.
    """
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\u2044", "/")  # TeX's spacing in 10{,}000
    text = re.sub(r"\\[ :;]|~", " ", text)
    text = re.sub(r"\\[cdt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))", fraction_as_text, text)
    boxed = last_match(r"\\boxed\s*\{", text)
    if boxed:
        region = re.sub(rf"^\s*({MINUS})\s*(?:\\text)?[\s({{]*", r"\1", braced(text, boxed.end()))  # - 5 and -{5}
    else:
        closed = text.rstrip("# \t\r\n")  # #### 42 ####
        text = closed if "####" in closed else text
        region = text.rpartition("####")[2].strip().partition("\n")[0]
    if boxed or "####" in text:
        region = re.sub(r"(?<=\S) +\([^()=]*=[^()]*\)", "", region)  # a remark: 18 (9 = 3*3)
        found = next(filter(None, map(NUMBER.search, reversed(region.split("=")))), None)
    else:
        found = last_match(NUMBER, text)
    # A hundred digits are enough: Python refuses to convert thousands, and int() is quadratic.
    if not found or len(found[0]) > 100 or (found[3] and int(found[3]) == 0):
        return None
    text, start = found.string, found.start()
    before = SIGN.search(text, max(0, start - 5), start)
    if GOES_ON.match(text, found.end()) or BEGAN_BEFORE.search(text[max(0, start - 20) : before.start()]):
        return None
    if before[2] and (found[1] or "." in found[2]):  # .5.5
        return None
    value = Fraction((before[2] or "") + re.sub("[,_]", "", found[2])) / int(found[3] or 1) + int(found[1] or 0)
    return -value if before[1] else value


def fraction_as_text(found: re.Match) -> str:
    r"""\frac{1}{2} as 1/2, and after a digit, in 4\frac{1}{2}, with a space before it."""
    space = " " if found.string[found.start() - 1 : found.start()].isdigit() else ""
    return f"{space}{found[1] or found[2] or ''}/{found[3] or found[4] or ''}"


def last_match(pattern: str | re.Pattern, text: str) -> re.Match | None:
    found = None
    for found in re.finditer(pattern, text):
        pass
    return found


def braced(text: str, start: int) -> str:
    """The text from `start` up to the matching closing brace; empty if there is none within 1000 characters."""
    depth = 1
    for i, char in enumerate(text[start : start + 1000], start):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:i]
    return ""


def gsm8k_reward(completions, answer, **_) -> list[float | None]:
    """1.0 if the completion, or what it has in answer tags, ends with the answer's number; see `gsm8k_number`."""
    scores = []
    for completion, want in zip(completions, answer, strict=True):
        number = None if want is None else gsm8k_number(wanted_answer(want))
        if want is not None and number is None:
            what = f"no number in the answer {str(want)[:60]!r}"
            raise ValueError(f"{what}; mend the row, or name the right column with --answer-column")
        scores.append(None if want is None else float(gsm8k_number(given_answer(completion)) == number))
    return scores


def countdown_reward(completions, target=None, nums=None, answer=None, numbers=None, **_) -> list[float | None]:
    """1.0 for an equation that makes the target from the numbers, each used exactly once.

    It is read inside the last <answer>...</answer>, else on the last line, and may end with
    "= target". Columns: target (or answer) and nums (or numbers), a list of integers from 0 on.
    """
    target, nums = target if target is not None else answer, nums if nums is not None else numbers
    if target is None or nums is None:
        raise ValueError("countdown needs the columns target (or answer) and nums (or numbers)")
    scores = []
    for completion, want, given in zip(completions, target, nums, strict=True):
        if want is None or given is None:
            scores.append(None)
            continue
        equation, equals, claim = countdown_equation(completion_text(completion)).partition("=")
        given = [Fraction(number) for number in given]
        if any(number.denominator > 1 or number < 0 for number in given):  # -2 would be read as an operation on 2
            raise ValueError(f"the numbers {', '.join(map(str, given))} are not all integers from 0 on")
        made = arithmetic(equation, given) == Fraction(want)
        scores.append(float(made and (not equals or gsm8k_number(claim) == Fraction(want))))
    return scores


def countdown_equation(text: str) -> str:
    inside = in_answer_tags(text)
    text = text.strip().rpartition("\n")[2] if inside is None else inside
    return text.translate(str.maketrans("×·÷\u2010\u2011\u2212\u2013\xa0\t", "**/----  ")).strip().rstrip(".")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def arithmetic(expression: str, given: list[Fraction]) -> Fraction | None:
    """Value of + - * / and parentheses over exactly the given integers; None for anything else."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):  # an int: the characters admitted below spell no other
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not arithmetic")

    if not re.fullmatch(r"[0-9+\-*/() ]{1,300}", expression):
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        # Compared before anything is computed: from the given numbers alone nothing can grow.
        return value(tree) if sorted(literals) == sorted(given) else None
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


NO_TAG = "(?:(?!</?(?:think|answer)>).)*"
FORMAT = re.compile(rf"(?:<think>)?{NO_TAG}</think>\s*<answer>{NO_TAG}</answer>", re.DOTALL)


def format_reward(completions, **_) -> list[float]:
    """1.0 if the completion is <think>...</think><answer>...</answer> and nothing else, else 0.0.

    White space may stand around either block. The opening <think> may be missing, for some chat
    templates end the prompt with it.
    """
    return [float(bool(FORMAT.fullmatch(completion_text(completion).strip()))) for completion in completions]


BUILTIN_REWARDS = {
    "exact": exact_reward,
    "gsm8k": gsm8k_reward,
    "countdown": countdown_reward,
    "format": format_reward,
}


# =============================================================================
# Reward functions: loading, calling, checking
# =============================================================================


@dataclass
class Reward:
    name: str  # distinct within a run: it names the scalar in the log
    function: Callable
    weight: float = 1.0


@dataclass
class Scores:
    total: Tensor  # (B,) float32, weighted sum over the functions that apply, NaN where none does; weight 0: only logged
    by_function: dict[str, Tensor]  # (B,) float32 each, unweighted, dense ones summed, NaN for None
    # For each sample a list of weighted rewards, one a completion token: a plain score is on the last token, and None is
    # where no step ends. None in place of the list where no function applies.
    dense: list[list[float | None] | None]
    has_lists: bool  # whether a function of weight other than 0 returned a list, one number a token, for a sample
    metrics: dict[str, list[float]]  # what functions gave to log_metric(name, value), call by call
    extra: dict[str, list]  # what functions gave to log_extra(column, values), B values a column

    def replace(self, rows: list[int], other: "Scores"):
        """Put the scores of `other` in the places of `rows`."""
        self.total[rows] = other.total
        for name, values in self.by_function.items():
            values[rows] = other.by_function[name]
        for row, values in zip(rows, other.dense):
            self.dense[row] = values
        self.has_lists |= other.has_lists
        for name, values in other.metrics.items():
            self.metrics[name] += values
        for column in {**self.extra, **other.extra}:
            mine = self.extra.setdefault(column, [None] * len(self.total))
            for row, value in zip(rows, other.extra.get(column, [None] * len(rows))):
                mine[row] = value


def load_rewards(names: list[str], modules: dict[str, types.ModuleType] | None = None) -> list[Reward]:
    """Rewards by name: a built-in one, or "file.py:function", whose file is executed once and then kept in `modules`.

    Raises UserError for a name, file or function that does not exist.
    """
    rewards, modules = [], {} if modules is None else modules
    # Other scalars, reward/mean and so on, have these names.
    taken = {"mean", "std", "frac_zero_std", "resampled_groups", "reward_model"}
    for name in names:
        path, colon, attribute = name.rpartition(":")
        if name in BUILTIN_REWARDS:
            function, attribute = BUILTIN_REWARDS[name], name
        elif colon and path.endswith(".py"):
            if path not in modules:
                modules[path] = import_file(path)
            function = getattr(modules[path], attribute, None)
            if not callable(function):
                raise UserError(f"reward {name}: {path} defines no function '{attribute}'")
        else:
            raise UserError(f"no reward '{name}': take {', '.join(BUILTIN_REWARDS)} or file.py:function")
        log_names = (attribute if n == 1 else f"{attribute}_{n}" for n in itertools.count(1))
        log_name = next(candidate for candidate in log_names if candidate not in taken)
        taken.add(log_name)
        rewards.append(Reward(log_name, function))
    return rewards


def load_all_rewards(args, run) -> tuple[list[Reward], Reward]:
    """The rewards to train on (--reward, then --reward-model), and the one that evaluation uses."""
    names = args.reward or ([] if args.reward_model else ["gsm8k" if args.dataset == "gsm8k" else "exact"])
    count = len(names) + bool(args.reward_model)
    weights = args.reward_weights or [1.0] * count
    if len(weights) != count:
        raise UserError(f"--reward-weights has {len(weights)} numbers for {count} rewards; give one each")
    modules = {}
    rewards = load_rewards(names, modules)
    if args.reward_model:
        rewards.append(Reward("reward_model", load_reward_model(args, run)))
    # Evaluation uses the reward without its weight: a score of 1 means right, whatever its weight in training.
    eval_reward = load_rewards([args.eval_reward], modules)[0] if args.eval_reward else rewards[0]
    return [dataclasses.replace(reward, weight=weight) for reward, weight in zip(rewards, weights)], eval_reward


def load_reward_model(args, run) -> Callable:
    """A sequence-classification model with one label as a reward function; it uses its own tokenizer."""
    name, classifier = f"--reward-model {args.reward_model}", AutoModelForSequenceClassification
    tokenizer = load_tokenizer(args.reward_model, "--reward-model", args)
    model = load_model(classifier, args.reward_model, "--reward-model", args, run.compute_dtype, attention=None)
    model.to(run.device).eval()
    if model.config.num_labels != 1:
        raise UserError(f"{name}: has {model.config.num_labels} labels; a reward is a single number")

    config, known = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    room = positions_of(config) or 0
    if 0 < room <= args.max_new_tokens:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: {name} has {room} positions")
    if config.pad_token_id is None:  # transformers would refuse more than one row at a time
        config.pad_token_id = -1  # no token's id: rows of one length need no pad

    takes_system = bool(tokenizer.chat_template) and shows_system_message(tokenizer)

    def ids_of(prompt, completion):
        if isinstance(prompt, str):
            ids = tokenizer(prompt + completion).input_ids
            ids = ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids  # the text spells the begin token itself
        elif not tokenizer.chat_template:
            raise UserError(f"{name}: has no chat template, but the prompts are chats")
        else:
            chat = prompt if takes_system else system_in_user_turn(prompt)
            if chat[-1]["role"] == "assistant":  # the completion goes on with that message
                *chat, begun = chat
                completion = [begun | {"content": begun["content"] + completion_text(completion)}]
            ids = tokenizer.apply_chat_template([*chat, *completion], return_dict=False)
        if 0 < room < len(ids):
            what = f"has {room} positions, but a prompt with its completion {len(ids)} tokens"
            raise UserError(f"{name}: {what}; lower --max-prompt-tokens or --max-new-tokens")
        if max(ids) >= known:
            raise UserError(f"{name}: its tokenizer has token {max(ids)}, but it knows {known}")
        return ids

    @torch.no_grad()
    def reward(prompts, completions, **_):
        rows = [ids_of(prompt, completion) for prompt, completion in zip(prompts, completions)]
        by_length = defaultdict(list)  # batches of equal length: no padding, whose token differs between classes
        for i, ids in enumerate(rows):
            by_length[len(ids)].append(i)
        scores = [0.0] * len(rows)
        for same in by_length.values():
            for some in (same[i : i + 32] for i in range(0, len(same), 32)):
                logits = model(torch.tensor([rows[i] for i in some], device=run.device)).logits
                for i, value in zip(some, logits[:, 0].tolist()):
                    scores[i] = value
        return scores

    return reward


def import_file(path: str):
    """Executes a Python file as a module of its own; its folder joins the search path."""
    if not os.path.isfile(path):
        raise UserError(f"reward file {path} does not exist")
    folder = os.path.dirname(os.path.abspath(path))
    if folder not in sys.path:
        sys.path.append(folder)  # last: a data folder called "datasets" must not hide the library
    name = Path(path).stem  # processes that a reward function spawns import it by this name, too
    found = importlib.machinery.PathFinder.find_spec(name)
    if name in sys.modules or not found or found.origin != os.path.abspath(path):  # the name is another module's
        name = f"reward_file_{hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with left_as_found():
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, which would end the run with the file's status
        syntax = isinstance(error, SyntaxError)
        place = f"{error.filename}:{error.lineno}" if syntax else raised_at(error, path)
        raise UserError(f"reward file {path} cannot be imported: {one_line(error)} at {place}") from error
    return module


def raised_at(error: BaseException, path: str | None) -> str:
    """The file:line of the innermost frame in the file at path, of the error or of one that led to it; else its innermost one."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    while path and error is not None:  # Python 3.10 shows in the error's context alone where a task was cancelled
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        if own:
            frame = own[-1]
            break
        error = error.__context__
    return f"{frame.filename}:{frame.lineno}"


def check_rewards(rewards: list[Reward], rows: list[dict], system_prompt: str | None = None):
    """Raises UserError, before anything is sampled, for rewards that cannot score these rows.

    Checked for all: that the columns they require exist; for built-in ones also the contents of the columns; for a reward
    model also whether it takes prompts of this kind.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    check_columns(rewards, list(columns))
    for reward in rewards:
        if reward.function in BUILTIN_REWARDS.values():
            for row in rows:
                try:
                    reward.function(**{name: [row[name]] for name in columns} | {"completions": [""]})
                except (ValueError, TypeError, ArithmeticError) as error:  # e.g. text where a number belongs
                    raise UserError(f"{getattr(row, 'place', 'a row')}: reward {reward.name}: {error}") from error
        elif reward.name == "reward_model":
            some = sorted(rows, key=lambda row: len(str(row["prompt"])))[:8]  # the shortest are not dropped as too long
            prompts = [Prompt([], with_system_prompt(row["prompt"], system_prompt), {}) for row in some]
            score([reward], prompts, [""] * len(some), [[]] * len(some))


# What a function is offered beside the columns. TRL's documentation has it as completions_ids, too.
CALL_ARGUMENTS = ["prompts", "completions", "completion_ids", "completions_ids"]
CALL_ARGUMENTS += ["trainer_state", "log_extra", "log_metric"]


def check_columns(rewards: list[Reward], columns: list[str]):
    """Raises UserError for a reward function that demands a column which the dataset lacks."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for reward in rewards:
        for parameter in parameters(reward.function):
            demanded = parameter.kind in by_name and parameter.default is parameter.empty
            if demanded and parameter.name not in [*columns, *CALL_ARGUMENTS]:
                hint = "; name the right one with --answer-column" if parameter.name == "answer" else ""
                raise UserError(
                    f"reward {reward.name} needs a column '{parameter.name}', which the dataset lacks "
                    f"(beside prompts it has {', '.join(columns) or 'none'}){hint}"
                )


def parameters(function: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a function in C may show none: it gets everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def score(
    rewards: list[Reward],
    prompts: list[Prompt],
    completions: list[str],
    completion_ids: list[list[int]],
    timeout: float = 0,
    trainer_state: Any = None,
) -> Scores:
    """Calls every reward function once on the B samples, with TRL's keyword arguments.

    prompts, completions, completion_ids: length B each. timeout: seconds that one call may take, 0
    for no limit. trainer_state: handed through (TRL's users read its global_step).
    Raises UserError naming the function, and the sample where there is one, for an exception, a
    wrong number of scores, a score that is no finite number, a dense list of the wrong length.
    """
    metrics, extra = defaultdict(list), {}

    def log_extra(column, values):
        if len(values) != len(prompts):
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(prompts)} completions")
        extra[str(column)] = list(values)

    columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    check_columns(rewards, columns)
    inputs = {name: [prompt.columns.get(name) for prompt in prompts] for name in columns}
    inputs["prompts"] = [prompt.prompt for prompt in prompts]
    inputs["completions"] = [
        text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    inputs["completion_ids"] = inputs["completions_ids"] = completion_ids
    inputs["trainer_state"], inputs["log_extra"] = trainer_state, log_extra
    inputs["log_metric"] = lambda name, value: metrics[name].append(float(value))
    returned = {
        reward.name: checked_scores(reward.name, call_reward(reward, inputs, timeout), completion_ids) for reward in rewards
    }

    def as_float(value):
        return math.nan if value is None else float(sum(v or 0 for v in value) if isinstance(value, list) else value)

    by_function = {name: torch.tensor([as_float(v) for v in values]) for name, values in returned.items()}
    weights = {reward.name: reward.weight for reward in rewards}
    counted = [name for name in by_function if weights[name] != 0] or list(by_function)  # those of weight 0 are only logged
    weighted = torch.stack([weights[name] * by_function[name] for name in counted])  # (functions, B)
    total = weighted.nansum(0).masked_fill(weighted.isnan().all(0), math.nan)
    if (total.abs() > 1e15).any():  # much beyond it float32 cannot hold the squares
        raise UserError("a sum of the scores, each times its weight, is beyond 1e15; look at --reward-weights")
    has_lists = any(isinstance(value, list) for name in counted for value in returned[name])
    return Scores(total, by_function, dense_scores(weights, returned, completion_ids), has_lists, metrics, extra)


def dense_scores(
    weights: dict[str, float], returned: dict[str, list], completion_ids: list[list[int]]
) -> list[list[float | None] | None]:
    """Weighted sum of what the functions returned, token by token, as in `Scores.dense`.

    In a returned list both 0 and None mean that no step ends there (0, so that functions written for PPO work). A plain
    score always ends a step, on the last token.
    """
    samples: list[list[float | None] | None] = [None] * len(completion_ids)
    for name, values in returned.items():
        for i, value in enumerate(values):
            if value is None or weights[name] == 0:  # weight 0: only logged, ends no step
                continue
            length = len(completion_ids[i])
            steps = [v or None for v in value] if isinstance(value, list) else [None] * (length - 1) + [value]
            before = samples[i] or [None] * length
            samples[i] = [a if b is None else (a or 0.0) + weights[name] * b for a, b in zip(before, steps, strict=False)]
    return samples


def call_reward(reward: Reward, inputs: dict[str, Any], timeout: float) -> Any:
    """Call the function with the inputs that its signature takes; returns what it returns, unchecked."""
    completions, expected = inputs["completions"], parameters(reward.function)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in expected):
        names = {parameter.name for parameter in expected}
        inputs = {name: value for name, value in inputs.items() if name in names}
    # Copied, so that a function which sorts, pops or appends does not spoil the next one's, or the next step's.
    inputs = {name: copied(value) for name, value in inputs.items()}

    try:
        with left_as_found(), time_limit(timeout):
            result = reward.function(**inputs)
            return result_of(result) if inspect.isawaitable(result) else result
    except RewardTimeout as error:
        raise UserError(f"reward {reward.name} took longer than --reward-timeout {timeout:g} seconds") from error
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit, a cancelled task, and what a library in Rust panics with
        module = sys.modules.get(getattr(reward.function, "__module__", None))
        place = raised_at(error, getattr(module, "__file__", None))
        called = f"called with {len(completions)} completions, the first: {completion_text(completions[0])[:40]!r}"
        raise UserError(f"reward {reward.name} raised {one_line(error)} at {place}, {called}") from error


@contextlib.contextmanager
def left_as_found():
    """Restores what a reward file may change for the whole process: working folder, torch's grad mode and its defaults."""
    folder, has_gradients = os.open(".", os.O_RDONLY), torch.is_grad_enabled()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)
        torch.set_grad_enabled(has_gradients), torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


@functools.cache
def event_loop():
    """One for the whole run, since a reward file's semaphores, locks and clients stay with the loop that first used them."""
    return asyncio.new_event_loop()


def result_of(awaitable) -> Any:
    """The awaitable's result; waits in another thread if this one already runs an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return event_loop().run_until_complete(awaitable)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(event_loop().run_until_complete, awaitable).result()


def copied(value: Any) -> Any:
    """Lists and dicts copied at every level, so that no two places share one; other objects are not copied."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


class RewardTimeout(BaseException):
    """Not an Exception, so that a reward function's own "except Exception" does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raises RewardTimeout in the block after so many seconds, and again if clean-up takes as long; 0: never.

    Signals reach the main thread only: elsewhere there is no limit. A function that sets an alarm of
    its own (math_verify does) takes this one's place.
    """
    if seconds <= 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise RewardTimeout

    handler = signal.signal(signal.SIGALRM, expire)
    started, (left, interval) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:  # a timer that was there before goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)


def checked_scores(name: str, result: Any, completion_ids: list[list[int]]) -> list:
    """A reward function's result as B numbers, lists of numbers (one a completion token) or None."""
    result = plain(result)
    if not isinstance(result, list):
        raise UserError(f"reward {name} returned {type(result).__name__}, not a list of numbers")
    if len(result) != len(completion_ids):
        raise UserError(f"reward {name} returned {len(result)} scores for {len(completion_ids)} completions")
    for i, value in enumerate(result):
        if isinstance(value, list) and len(value) != len(completion_ids[i]):
            lengths = f"{len(value)} scores for {len(completion_ids[i])} completion tokens"
            raise UserError(f"reward {name} gave sample {i} {lengths}")
        for number in value if isinstance(value, list) else [value]:
            if number is None:  # in a list: no step ends there
                continue
            if not isinstance(number, numbers.Real):
                raise UserError(f"reward {name} gave sample {i} {number!r:.40}, which is not a number")
            if not abs(number) <= torch.finfo(torch.float32).max:  # NaN fails every comparison
                raise UserError(f"reward {name} gave sample {i} {number!r:.40}, which is not finite")
    return result


def plain(value: Any) -> Any:
    """numpy's and torch's arrays and numbers as Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# =============================================================================
# Evaluation
# =============================================================================


def decode(tokenizer, rollout: Rollout) -> tuple[list[str], list[list[int]]]:
    """Texts of the completions, without special tokens, and their token ids, end token included."""
    ids = [row[:n] for row, n in zip(rollout.completion_ids.tolist(), rollout.lengths.tolist())]
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ids


def evaluate(run, sampler, tokenizer, prompts, reward) -> dict[str, float]:
    """Greedy accuracy on `prompts`: the share of completions that `reward` gives at least 1.

    Where prompts have a column "level", also the accuracy of each level. With --eval-samples n also pass@k for
    k = 1, 2, 4, ..., n, unbiased, from n samples a prompt at the training temperature. Completions to which the
    reward does not apply (None) are left out, and a prompt of which fewer than k remain does not count in pass@k.
    """
    n, means, mine = run.args.eval_samples, Means(), prompts[run.rank :: run.world]
    random_states = get_random_states()  # how often a run evaluates must not change what its rewards draw in training
    all_uniforms = run.uniforms(0, 5, len(prompts), n, sampler.C)[run.rank :: run.world] if n else None

    def judged(some, copies, uniforms):  # for each prompt, which of its completions are right
        rollout = sampler.sample([prompt.ids for prompt in some], copies, uniforms)
        repeated = [prompt for prompt in some for _ in range(copies)]
        texts, ids = decode(tokenizer, rollout)
        scores = score([reward], repeated, texts, ids, run.args.reward_timeout, run.trainer_state).total
        if uniforms is None:
            means.add("eval/reward", scores, ~scores.isnan())
        return [row[~row.isnan()] >= 1 for row in scores.view(-1, copies)]

    # So many prompts at a time that there are no more than 256 completions and 131,072 tokens of prompts.
    size = max(min(256 // max(n, 1), 2**17 // run.args.max_prompt_tokens), 1)
    for start in inner_progress(range(0, len(mine), size), "evaluation"):
        some = mine[start : start + size]
        for prompt, right in zip(some, judged(some, 1, None)):
            means.add("eval/accuracy", right)
            if prompt.columns.get("level") is not None and len(right):
                means.add(f"eval/accuracy_{prompt.columns['level']}", right)
        if n:
            for right in judged(some, n, all_uniforms[start : start + size].flatten(0, 1)):
                for k in sorted({n} | {2**i for i in range(n.bit_length())}):
                    if k <= len(right):
                        means.add(f"eval/pass@{k}", pass_at_k(len(right), int(right.sum()), k))
    sampler.free()  # the update wants the memory of a cache that may be larger than training's
    set_random_states(random_states)
    metrics = means.reduce(run)
    if math.isnan(metrics["eval/accuracy"]):
        run.warn_once(f"{reward.name} gives None to all evaluation prompts, so no accuracy is known; look at --eval-reward")
    if metrics["eval/accuracy"] == 0 and metrics["eval/reward"] > 0:
        what = f"no evaluation answer gets 1 from {reward.name}, which is what counts as right"
        run.warn_once(f"{what}; look at --eval-reward")
    return metrics


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, `correct` of them right, hold a right one: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# =============================================================================
# Micro-batches and optimiser steps
# =============================================================================


def micro_batches(rollout: Rollout, budget: int) -> list[Tensor]:
    """Split the sequences of `rollout`, in order, into parts of at most `budget` tokens (or one sequence): CPU indices.

    A prompt counts once in each part.
    """
    parts, tokens, seen = [[]], 0, set()
    prompts, prompt_lengths, lengths = (x.tolist() for x in (rollout.prompt_index, rollout.prompt_lengths, rollout.lengths))
    for row in range(len(rollout)):
        cost = lengths[row] + (0 if prompts[row] in seen else prompt_lengths[row])
        if parts[-1] and tokens + cost > budget:
            parts.append([])
            tokens, seen, cost = 0, set(), lengths[row] + prompt_lengths[row]
        parts[-1].append(row)
        seen.add(prompts[row])
        tokens += cost
    return [torch.tensor(part) for part in parts]


def each_micro_batch(run, rollout: Rollout) -> Iterator[tuple[slice, Rollout]]:
    """Rows and sequences of each micro-batch. All processes get equally many, since sharded models gather their parameters
    in all of them together: a process with fewer adds empty ones."""
    parts = micro_batches(rollout, run.micro_batch_tokens)
    missing = run.max(len(parts)) - len(parts)
    for rows in inner_progress(parts, run.current_phase):
        yield slice(rows[0], rows[-1] + 1), rollout.select(rows)
    if missing:
        empty = rollout.select(parts[0][:1])
        empty.leave_out(torch.tensor([True]))
        yield from [(slice(0, 0), empty)] * missing


def in_micro_batches(run, function, rollout: Rollout) -> Tensor:
    """`function(micro_batch)`, a (b, C') tensor, for all of `rollout` without gradients: (B, C), 0 outside the mask."""

    def attempt():
        table = torch.zeros(rollout.completion_ids.shape, device=run.device)
        for rows, batch in each_micro_batch(run, rollout):
            part = function(batch)
            table[rows, : part.shape[1]] = part
        return table

    with torch.no_grad(), run.autocast():
        return with_less_memory(run, attempt)


def accumulate_gradients(run, loss_of, rollout: Rollout, models: list[nn.Module], means: "Means | None" = None):
    """Sum `loss_of(micro_batch)` over the micro-batches of `rollout` and add its gradients to those that `models` have;
    `clip_and_step` uses and clears them. `means`: the Means that `loss_of` adds to."""
    if rollout.temperature not in (None, run.args.temperature):
        raise UserError(
            f"sampled at temperature {rollout.temperature:g} and scored at {run.args.temperature:g}: "
            "set sampler.temperature and args.temperature together"
        )
    means = means or Means()
    weights = [weight for model in models for weight in model.parameters() if weight.grad is not None]
    before, gradients = means.sums.copy(), [weight.grad.clone() for weight in weights]  # of another loss of the same step

    def attempt():  # starts afresh: a retry, with smaller micro-batches, must count nothing twice
        means.sums = before.copy()
        for model in models:
            model.zero_grad(set_to_none=True)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
        for _, batch in each_micro_batch(run, rollout):
            with run.autocast():
                loss = loss_of(batch)
            loss.backward()

    with_less_memory(run, attempt)


def with_less_memory(run, function):
    """Call `function`; each time GPU memory runs out, once more with micro-batches of half the size."""
    while True:
        try:
            return function()
        except torch.cuda.OutOfMemoryError:
            if run.micro_batch_tokens < 64 or run.world > 1:  # the other processes wait in the middle of the same pass
                smaller = "a smaller --micro-batch-tokens, fewer --prompts-per-step or --max-new-tokens"
                raise UserError(f"out of GPU memory: take {smaller}, or --gradient-checkpointing") from None
        torch.cuda.empty_cache()
        run.micro_batch_tokens //= 2
        run.warn(f"out of GPU memory: going on with --micro-batch-tokens {run.micro_batch_tokens}")


def learning_rate_share(args, step: int) -> float:
    """Share of the peak learning rate: linear warm-up over --warmup-steps, then linear decay towards 0."""
    warmup = min(step / (args.warmup_steps + 1), 1.0)
    return warmup * min((args.steps + 1 - step) / max(args.steps - args.warmup_steps, 1), 1.0)


def as_list(optimizer) -> list:
    """The optimisers: every function that takes `optimizer` takes one or a list of them."""
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def set_learning_rate(optimizer, share: float):
    """Set every parameter group's learning rate to a share of its peak."""
    for group in (group for one in as_list(optimizer) for group in one.param_groups):
        group["lr"] = share * group.setdefault("peak_lr", group["lr"])


def clip_and_step(run, models: list[nn.Module], optimizer) -> Tensor:
    """Clip the gradient norm of each model and take the optimiser's step, unless a gradient is not finite; returns the
    gradient norm of the first model, before clipping. Weights that no optimiser holds are left out of the norms."""
    optimizers = as_list(optimizer)
    trained = {weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]}
    weights = [[weight for weight in model.parameters() if weight in trained] for model in models]
    norms = [whole(torch.nn.utils.clip_grad_norm_(some, run.args.max_grad_norm)) for some in weights]
    if all(norm.isfinite() for norm in norms):
        for one in optimizers:
            one.step()
        run.skipped_in_a_row = 0
    else:
        run.skipped_updates, run.skipped_in_a_row = run.skipped_updates + 1, run.skipped_in_a_row + 1
        run.warn("the gradient is not finite: this update is skipped")
    for owner in (*models, *optimizers):
        owner.zero_grad(set_to_none=True)  # sampling can use the memory
    return norms[0]


def logprobs_without_gradient(run, model, rollout: Rollout) -> Tensor:
    """`completion_logprobs` of a whole rollout: (B, C)."""
    return in_micro_batches(run, lambda batch: completion_logprobs(model, batch, run.args.temperature), rollout)


def old_logprobs(run, sampler, policy, rollout: Rollout) -> Tensor:
    """Log-probs under the policy that sampled, (B, C): the sampler's own if it is exact, else from a pass of the trainer (also
    for tokens given to `rollout_of`). Call it before the first update."""
    was_sampled = rollout.temperature is not None
    return rollout.sampler_logprobs if sampler.is_exact and was_sampled else logprobs_without_gradient(run, policy, rollout)


def values_without_gradient(run, critic: Critic, rollout: Rollout) -> Tensor:
    """`completion_values` of a whole rollout: (B, C)."""
    return in_micro_batches(run, lambda batch: completion_values(critic, batch), rollout)


# =============================================================================
# Statistics
# =============================================================================


class Means:
    """Means of named numbers over all micro-batches and processes, NaN for a mean of none; sums stay on the device until
    they are asked for."""

    def __init__(self):
        self.sums = defaultdict(lambda: 0.0)  # name -> (sum, count)

    def add(self, name: str, x, mask: Tensor | None = None):
        """Add the numbers x, all with the same weight; with a mask x is expanded to its shape and counts where it is True."""
        x = torch.as_tensor(x, dtype=torch.float32).detach()
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        self.sums[name] = self.sums[name] + torch.stack([torch.where(mask, x.expand(mask.shape), 0.0).sum(), mask.sum()])

    def reduce(self, run) -> dict[str, float]:
        parts = run.gather({name: pair.tolist() for name, pair in self.sums.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        sums = {name: [sum(part.get(name, (0, 0))[i] for part in parts) for i in (0, 1)] for name in names}
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def mean_and_variance(run, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sample variance, over all processes, of x, (B,) or (B, C), where the mask of the same shape is True."""
    x = x.expand(mask.shape)  # fails for (B, 1) and (B,), which would make a table (B, B)
    count, total = run.sum(mask.sum(), torch.where(mask, x, 0.0).sum())
    mean = total / max(count, 1)
    squares = run.sum(torch.where(mask, x - mean, 0.0).square().sum())[0]
    return torch.as_tensor(mean), torch.as_tensor(squares / max(count - 1, 1))


def dense_table(dense: list[list[float | None] | None], rollout: Rollout) -> tuple[Tensor, Tensor]:
    """`Scores.dense` as tensors: the reward of each token, 0 where there is none, and where a step ends: both (B, C).

    A completion that is left out has no rewards and no steps.
    """
    table = torch.full(rollout.completion_ids.shape, math.nan)
    for row, values in zip(table, dense):
        if values is not None:
            row[: len(values)] = torch.tensor([math.nan if value is None else value for value in values])
    table = table.to(rollout.completion_ids.device).masked_fill(~rollout.completion_mask, math.nan)
    return table.nan_to_num(0), ~table.isnan()


def update_flops(models: list[nn.Module], rollout: Rollout) -> float:
    """Floating-point operations that one epoch of updates needs: 6 for each token and weight in a matrix.

    Attention products and the recomputation of gradient checkpointing are not counted; all experts of a mixture are.
    """
    completion_tokens = int(rollout.lengths.sum())
    tokens = completion_tokens + int(rollout.prompt_lengths[distinct(rollout.prompt_index)[0]].sum())
    flops = 0.0
    for model in models:
        backbone = model.backbone if isinstance(model, Critic) else model.base_model
        matrices = sum(p.numel() for p in backbone.parameters() if p.dim() > 1)
        flops += 6.0 * tokens * (matrices - backbone.get_input_embeddings().weight.numel())
        if not isinstance(model, Critic):
            flops += 6.0 * completion_tokens * model.get_output_embeddings().weight.numel()
    return flops


@functools.cache
def matrix_rate(device, dtype) -> float:
    """Measured rate of this device's matrix product, in operations a second; the first call measures it."""
    n, times = 8192 if device.type == "cuda" else 512, 10
    a = torch.arange(float(n * n), device=device).sin().view(n, n)  # no random numbers: reward functions may draw these
    a = a.to(dtype) if device.type == "cuda" else a
    for repeat in range(2):  # the first warms up
        started = time.perf_counter()
        for _ in range(times):
            a @ a
        wait_for(device)
    return 2 * n**3 * times / (time.perf_counter() - started)


def step_metrics(run, rollout: Rollout, scores: "Scores", means: Means, learners: list[nn.Module]) -> dict[str, float]:
    """The metrics that both scripts log, with those that the script has added to `means`. Ends the phase, which has to be
    "update", and counts the step in `trainer_state`: call it once a step."""
    run.phase(None)
    run.trainer_state.global_step += 1  # the evaluation after this step sees it as done
    valid = ~rollout.scores.isnan()
    means.add("reward/mean", rollout.scores, valid)
    for name, values in scores.by_function.items():
        means.add(f"reward/{name}", values, ~values.isnan())
    for name, values in scores.metrics.items():
        means.add(f"reward/metric/{name}", values)
    means.add("completions/mean_length", rollout.lengths, rollout.lengths > 0)
    means.add("completions/truncated_ratio", rollout.truncated.cpu(), rollout.lengths > 0)
    metrics = means.reduce(run)
    highest = run.max(float(rollout.scores.nan_to_num(-math.inf).max()))
    lowest = -run.max(float(-rollout.scores.nan_to_num(math.inf).min()))
    std = float(mean_and_variance(run, rollout.scores, valid)[1].sqrt()) if highest > lowest else 0.0  # exact if all equal
    metrics["reward/std"] = std if highest >= lowest else math.nan
    tokens, seconds = run.sum(rollout.lengths.sum())[0], sum(run.seconds.values())
    metrics |= {f"perf/{phase}_seconds": value for phase, value in run.seconds.items()}
    metrics["perf/tokens_per_second"] = float(tokens) / seconds
    metrics["losses/skipped_updates"], run.skipped_updates = run.skipped_updates, 0
    flops = run.args.update_epochs * update_flops(learners, rollout)
    metrics["perf/mfu"] = flops / run.seconds["update"] / matrix_rate(run.device, run.compute_dtype)
    if run.device.type == "cuda":
        metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        metrics["perf/peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return metrics


# =============================================================================
# Checkpoints and the final model
# =============================================================================


def save_checkpoint(run, models: dict[str, nn.Module], optimizer, state: dict[str, Any], random_states: tuple | None = None):
    """Write `checkpoints/step-…` of the run's folder. Models as safetensors, the rest as state.pt.

    random_states: of this process, those of now by default.
    """
    weights = {name: gathered(run, weights_of(model)) for name, model in models.items()}
    optimizers = [one.state_dict() for one in as_list(optimizer)]
    moments = [{i: gathered(run, tensors) for i, tensors in one["state"].items()} for one in optimizers]
    all_random_states = run.gather(random_states or get_random_states())
    if run.rank > 0:
        return
    folder = run.folder / "checkpoints" / f"step-{state['step']:06}"
    with complete_or_absent(folder, f"--output-dir {run.folder}: the checkpoint of step {state['step']}") as partial:
        for name, tensors in weights.items():
            safetensors.torch.save_file(tensors, partial / f"{name}.safetensors")
        loadable = {key: value for key, value in state.items() if can_be_loaded(run, key, value)}
        saved = {"state": loadable, "optimizers": [one | {"state": its} for one, its in zip(optimizers, moments)]}
        torch.save(saved | {"random_states": all_random_states, "script": run.script}, partial / "state.pt")
        digests = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(digests, indent=2))
    # Checkpoints newer than this one were damaged when the run was resumed: they do not count as kept.
    older = checkpoints_of(run.folder)
    older = older[: older.index(folder) + 1]
    for path in [*older[: -run.args.keep_checkpoints], *folder.parent.glob(".*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def can_be_loaded(run, key: str, value: Any) -> bool:
    """Whether `load_checkpoint` could read this value, since it refuses code in a file; warns if not, and of a sharded tensor,
    of which only the first process's part would be saved."""
    file, unfit = io.BytesIO(), None
    try:
        torch.save(value, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):
        unfit = type(value).__name__
    if is_sharded(value):
        unfit = "the shard of a tensor: put it in as common.whole(...)"
    if unfit:
        kinds = "numbers, texts, lists and dicts of Python, and tensors"
        run.warn_once(f"state[{key!r}] is left out of checkpoints, which take {kinds}, not {unfit}")
    return unfit is None


def is_sharded(value: Any) -> bool:
    """Whether `shard` has split a tensor in a value, or in the lists and dicts that it consists of."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return hasattr(value, "full_tensor") or any(map(is_sharded, inner))


@contextlib.contextmanager
def checkpoint_on_error(run, models: dict[str, nn.Module], optimizer, state: dict[str, Any]):
    """If the block raises a UserError or runs out of memory in any process, save the steps done so far before it ends the run.
    For any part of a step except its update. With several processes the block may use no collectives except `run.gather` and
    its callers.
    """
    random_states = get_random_states()  # the block begins anew when the run goes on
    try:
        try:
            yield
            run.gather(None)  # raises what another process has met
        except (UserError, MemoryError, RuntimeError) as error:
            if not isinstance(error, UserError):
                text = lack_of_memory(error)
                if text is None:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold tensors, and the checkpoint needs memory
                error = UserError(text)
            if not error.met_by_all:
                run.gather(error)
            raise error
    except UserError as error:
        run.close()
        if state["step"] == 0:
            raise
        save_checkpoint(run, models, optimizer, state, random_states)
        run.gather(None)  # the first process to end with an error ends the others, so none may while one still writes
        raise UserError(f"{error}; the steps before are saved; {run.to_go_on()}") from error


def get_random_states() -> tuple:
    """Random states of Python, torch and numpy (only reward functions draw from these), as types that weights_only takes."""
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), torch.get_rng_state(), (name, keys.tolist(), *rest)


def set_random_states(states: tuple):
    python, torchs, numpys = states
    random.setstate(python), torch.set_rng_state(torchs), numpy.random.set_state(numpys)


@contextlib.contextmanager
def complete_or_absent(folder: Path, what: str):
    """Context manager: yields a temporary folder that replaces `folder` once all of it is on disk; an error removes it."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with explained_as(f"{what} cannot be written"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for path in partial.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weights_of(model) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; tied ones once."""
    names = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in names}


def gathered(run, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors on the CPU of the first process; the others help to gather them and keep none."""
    kept = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):  # else a number in the state of an optimiser
            tensor = whole(tensor.detach())
        if run.rank == 0:
            kept[name] = tensor.cpu().contiguous() if isinstance(tensor, Tensor) else tensor
    return kept


def file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_checkpoint(run, models: dict[str, nn.Module], optimizer, prompts: "PromptStream") -> dict[str, Any]:
    """Load the newest undamaged checkpoint of --resume; returns the state that `save_checkpoint` got."""
    files = [f"{name}.safetensors" for name in models] + ["state.pt"]
    folder = run.gather(newest_checkpoint(run, files) if run.rank == 0 else None)[0]
    for name, model in models.items():
        with safetensors.safe_open(folder / f"{name}.safetensors", "pt") as file, torch.no_grad():
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            if shapes != {key: list(tensor.shape) for key, tensor in weights_of(model).items()}:
                raise UserError(
                    f"--resume {run.args.resume}: its {name} has other parameters than --model {run.args.model} has now"
                )
            for key, tensor in weights_of(model).items():
                tensor.copy_(placed(file.get_tensor(key), tensor))
    # weights_only refuses code in the file; a file from another version of this project may lack entries.
    hint = "perhaps another version of this project wrote it"
    with explained_as(f"--resume {run.args.resume}: {folder / 'state.pt'} cannot be loaded, {hint}"):
        saved = torch.load(folder / "state.pt", weights_only=True, map_location="cpu", mmap=run.world > 1)
        if saved["script"] != run.script:
            run.warn(f"this run was begun by {saved['script']}.py and goes on with {run.script}.py")
        set_random_states(saved["random_states"][run.rank % len(saved["random_states"])])
        for one, its in zip(as_list(optimizer), saved["optimizers"], strict=True):
            parameters = [parameter for group in one.param_groups for parameter in group["params"]]
            for i, moments in its["state"].items():
                moments |= {name: placed(x, parameters[i]) for name, x in moments.items() if isinstance(x, Tensor) and x.dim()}
            one.load_state_dict(its)
        prompts.position, run.trainer_state.global_step = saved["state"]["position"], saved["state"]["step"]
    if saved["state"].get("prompts", prompts.digest) != prompts.digest:
        why = "the data has changed, or the chat template writes the date"
        run.warn(
            f"--dataset {run.args.dataset}: its prompts are not those that the run was started with ({why}); going on with the new ones"
        )
    run.say(f"resuming after step {saved['state']['step']} from {folder}")
    return saved["state"]


def newest_checkpoint(run, files: list[str]) -> Path:
    """The newest checkpoint of --resume whose `files` match their digests; warns of damaged ones."""
    for folder in reversed(checkpoints_of(Path(run.args.resume))):
        try:
            digests = json.loads((folder / "manifest.json").read_text())
            for name in files:
                if not isinstance(digests, dict) or digests.get(name) != file_digest(folder / name):
                    raise ValueError(f"{name} is not what was written")
            return folder
        except (OSError, ValueError) as error:
            run.warn(f"{folder} is damaged ({one_line(error)}); taking the one before")
    raise UserError(f"--resume {run.args.resume}: no undamaged checkpoint there")


def save_final(run, model, tokenizer):
    """`final/` of the run's folder, which AutoModelForCausalLM and AutoTokenizer load."""
    weights = gathered(run, weights_of(model))
    added = [name for name in weights if name not in getattr(model, "names_when_loaded", weights)]
    if run.rank == 0:
        with complete_or_absent(run.folder / "final", f"--output-dir {run.folder}: the final model") as partial:
            model.config = getattr(model, "config_to_save", model.config)  # with the dropout that it came with
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        if added:
            run.warn(f"final/ has weights that its model does not know ({added[0]}): merge an adapter before save_final")
