"""Is it right and is it fast on a GPU: one command, by hand, on a machine with one GPU and no network.

    python tests/bench_gpu.py                                # checks, decoding, whole steps: one table, in 8 minutes
    python tests/bench_gpu.py --only machine checks          # parts by name
    python tests/bench_gpu.py --dry-run                      # everything at toy sizes on a CPU, to test this script

Parts, the most wanted first; what the time does not allow is named as not run. `machine` measures the rate of a large
bfloat16 matrix product and the bandwidth of a large copy (bytes read and written). `checks` compares a small model on
the GPU with float64 on the CPU, while `tests` runs the test suite's GPU part. `decode` counts
tokens a second for the shapes of Qwen2.5 with random weights, eight rows a prompt, against the floor of memory traffic:
weights and every row's used cache, read once a step at the copy's bandwidth. (A prompt that rows share is read once for
all of them, so this floor can be passed.) `generate` is transformers' own. `grpo-…`, `ppo-…` are whole steps of the
scripts: prompts of 256 tokens, 32 x 8 completions of 512 (or fewer, with end tokens). `…-compiled` is the same with
--compile, `…-half` with half as many tokens in a micro-batch. `trl` is TRL's step on the same.

Each part runs in a process of its own with a time limit: what fails or hangs is named in the table, and the rest goes on.
While one part runs, the process of the next imports what it needs and writes its model's files, on a few CPU cores and
without the GPU, and waits for its turn.
MFU counts what the update must compute: 6 operations for each weight of a matrix and token, the vocabulary's only for
completion tokens, a shared prompt once, and attention to the tokens before; nothing that is computed twice.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402


@dataclass
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head_dim(self):
        return self.hidden // self.heads

    @property
    def layer_weights(self):
        """Numbers in the matrices of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self):
        return self.vocabulary * self.hidden

    @property
    def cache_numbers(self):
        """Numbers that the cache holds for each token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass
class Sizes:
    shapes: dict
    rows: list  # of decoding
    contexts: list
    decode_steps: int
    prompts: int  # of a training step
    group: int
    prompt_tokens: int
    max_new_tokens: int
    steps: int  # of training; the first warms up
    device: str


FULL = Sizes(
    {"0.5B": Shape(896, 24, 14, 2, 4864, 151_936), "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936)},
    [64, 256, 512], [256, 1024], 128, 32, 8, 256, 512, 3, "cuda",
)  # fmt: skip
DRY = Sizes({"0.5B": Shape(28, 2, 14, 2, 32, 256), "1.5B": Shape(24, 2, 12, 2, 32, 256)}, [8], [24], 6, 4, 4, 8, 12, 2, "cpu")
GROUP, END, ENDS_EVERY = 8, 0, 400  # in decoding; the end token; where lengths are geometric one token in so many is one


# =============================================================================
# What every part uses
# =============================================================================


class Results:
    """Rows of the table, written to a file as they come, so that a part that is killed keeps what it has measured."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, what, result, against="", share="", more="", **numbers):
        row = dict(what=what, result=result, against=against, share=share, more=more, numbers=numbers)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {what}: {result} {against} {share} {more}".rstrip(), flush=True)

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def number(self, name, what=""):
        """A number in the first row that has it and whose name begins with `what`; None where there is none yet."""
        return next((row["numbers"][name] for row in self.read() if name in row["numbers"] and row["what"].startswith(what)), None)


@contextlib.contextmanager
def guarded(results, what):
    """An error becomes a row of the table, and the next measurement goes on, with the memory of this one."""
    try:
        yield
    except Exception as error:  # whatever a kernel, a library or another package may raise
        traceback.print_exc()
        results.add(what, "FAILED", more=" ".join(f"{type(error).__name__}: {error}".split())[:160], failed=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


COMPILED, GEOMETRIC = "compiled, ", "geometric lengths, "  # in the names of rows
HOW = ("", COMPILED)  # without --compile and with it


def ratios(faster):
    """How many times faster this project is, by `HOW`."""
    return ", ".join(f"this project {how}{ratio:.1f}x" for how, ratio in faster.items())


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=5):
    """Median seconds of a call, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def build_model(shape: Shape, device, attention="flat_row", dtype=torch.float32):
    import transformers

    import common  # noqa: F401  registers the attention

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate, tie_word_embeddings=True, use_sliding_window=False,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def build_folder(folder: Path, shape: Shape, sizes: Sizes):
    """Model, tokenizer, prompts and reward as files, as a user would have them; all parts of a shape read the same ones."""
    import tokenizers
    import transformers

    if folder.exists():
        return
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        unfinished = Path(unfinished)
        model = build_model(shape, "cpu", dtype=torch.bfloat16)
        model.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=END)
        model.save_pretrained(unfinished / "model")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(shape.vocabulary)}, unk_token="w1"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END}", pad_token=f"w{END}")
        tokenizer.save_pretrained(unfinished / "model")
        prompts = torch.randint(1, shape.vocabulary, (16 * sizes.prompts, sizes.prompt_tokens)).tolist()
        lines = (json.dumps({"prompt": " ".join(f"w{i}" for i in ids)}) for ids in prompts)
        (unfinished / "prompts.jsonl").write_text("\n".join(lines))
        reward = "def spread(completions, **_):\n    return [i % 8 / 8 for i in range(len(completions))]\n"
        (unfinished / "rewards.py").write_text(reward)
        with contextlib.suppress(OSError):  # another part's process has been faster
            unfinished.rename(folder)


def end_at_many_tokens(model: Path, shape: Shape, sizes: Sizes):
    """Let the completions of the model in this folder end early: lengths become geometric.

    With random weights all tokens are about equally likely, so the number of end tokens sets the lengths.
    """
    import transformers

    (model / "generation_config.json").unlink()  # perhaps a link to another folder's
    some = list(range(END, shape.vocabulary, ENDS_EVERY if sizes.device == "cuda" else 16))
    transformers.GenerationConfig(eos_token_id=some, pad_token_id=END).save_pretrained(model)


def tokenizer_of(model: Path):
    """For a folder with a Qwen2 model AutoTokenizer would make Qwen2's own tokenizer of this one."""
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(model)


# =============================================================================
# Machine and checks
# =============================================================================


def machine(results, sizes, options):
    import transformers

    name = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU"
    results.add("machine", name, more=f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}")
    rate, bandwidth = matrix_rate(results, sizes), copy_bandwidth(results, sizes)
    results.add("bfloat16 matrix product", f"{rate / 1e12:.3g} TFLOP/s", matrix_rate=rate)
    results.add("copy, bytes read and written", f"{bandwidth / 1e12:.3g} TB/s", bandwidth=bandwidth)


def matrix_rate(results, sizes):
    """Operations a second, on random numbers (zeros would be faster), as the part `machine` found it or as it is now."""
    if found := results.number("matrix_rate"):
        return found
    n = 8192 if sizes.device == "cuda" else 256
    a, b = (torch.randn(n, n, device=sizes.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_of(lambda: a @ b, sizes.device, 20)


def copy_bandwidth(results, sizes):
    """Bytes a second, read and written, in a copy much larger than the cache."""
    if found := results.number("bandwidth"):
        return found
    source = torch.randn(2**31 if sizes.device == "cuda" else 2**20, device=sizes.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), sizes.device, 20)


def checks(results, sizes, options):
    """A small model with the parts of Qwen2.5: log-probs, loss and gradients, sampler, distribution."""
    for name, check in (("float32", check_trainer), ("bfloat16", check_trainer), ("float32", check_sampler), ("bfloat16", check_sampler)):
        with guarded(results, f"{check.__name__} {name}"):
            check(results, sizes, name)
    with guarded(results, "distribution"):
        check_distribution(results, sizes)


def verdict(value, limit):
    return "ok" if value < limit else "WRONG"  # so is NaN


def small_model(device):
    import helpers

    return helpers.make_model("qwen2").to(device)


def check_trainer(results, sizes, dtype):
    """Loss and gradients of a GRPO-like loss against plain float64 on the CPU, relative to their size."""
    import helpers

    import common

    model, device = small_model("cpu"), torch.device(sizes.device)
    reference = helpers.eager_double(model)
    rollout, prompts, completions = helpers.ragged_rollout()
    weights, index = torch.randn(rollout.completion_ids.shape), rollout.prompt_index.tolist()
    want, loss = torch.zeros(weights.shape, dtype=torch.float64), 0.0
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        logprobs = helpers.brute_logprobs(reference, prompt, completion)
        want[row, : len(completion)] = logprobs.detach()
        loss = loss + (logprobs * weights[row, : len(completion)]).sum()
    loss.backward()
    model.to(device)
    batch = common.rollout_of(prompts, completions, device, index)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        got, _ = common.completion_logprobs(model, batch, 1.0, with_entropy=True)
        ours = (got * weights.to(device)).sum()
    ours.backward()
    gradients, wanted = helpers.gradients(model), helpers.gradients(reference)
    distance = sum(float((gradients[name].cpu().double() - wanted[name]).square().sum()) for name in wanted) ** 0.5
    relative = distance / sum(float(gradient.square().sum()) for gradient in wanted.values()) ** 0.5
    gap = float((got.detach().cpu().double() - want).abs().max())
    loss_gap = abs(ours.item() - loss.item()) / abs(loss.item())
    low, limits = dtype == "bfloat16", ((0.3, 0.1) if dtype == "bfloat16" else (1e-4, 1e-4))
    results.add(
        f"check: trainer in {dtype} against float64 on the CPU", verdict(max(gap / limits[0], relative / limits[1]), 1.0),
        more=f"log-prob {gap:.1e}, loss {loss_gap:.1e}, gradient {relative:.1e}" + " (limits of rounding)" * low,
        logprob=gap, loss=loss_gap, gradient=relative,
    )  # fmt: skip


def check_sampler(results, sizes, dtype):
    """What the sampler (on a GPU: a graph) says of its tokens against what the trainer says of them."""
    import helpers

    import common

    device = torch.device(sizes.device)
    model, compute_dtype = small_model(device), getattr(torch, dtype)
    sampler = common.Sampler(model, {1, 4}, 0.8, 40, compute_dtype)
    prompts = helpers.random_ids(3, 7, 1, 5, seed=5)
    gaps = []
    for seed in range(2):
        rollout = sampler.sample(prompts, 16, torch.rand(64, 40, generator=torch.Generator().manual_seed(seed)))
        with torch.no_grad(), torch.autocast(device.type, dtype=compute_dtype, enabled=dtype == "bfloat16"):
            scored = common.completion_logprobs(model, rollout, 0.8)
        gaps.append(float((scored - rollout.sampler_logprobs).abs().max()))
    gap = max(gaps)
    limit = 0.4 if dtype == "bfloat16" else 1e-4
    graphs = f", {len(sampler.graphs)} graphs" if sampler.is_cuda else ""
    results.add(f"check: sampler against trainer in {dtype}", verdict(gap, limit), more=f"log-prob {gap:.1e}{graphs}", logprob=gap)


def check_distribution(results, sizes):
    """Chi-square of sampled tokens against a softmax in float64, for a large vocabulary and for a small one."""
    import common

    for vocabulary, rows in ((151_936, 1024 if sizes.device == "cuda" else 64), (29, 1024)):
        logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
        bins = torch.arange(vocabulary) * min(vocabulary, 64) // vocabulary  # tokens that are counted together
        counts = torch.zeros(vocabulary, dtype=torch.float64)
        for seed in range(64):
            uniform = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).to(sizes.device)
            tokens, _ = common.draw(logits.to(sizes.device).expand(rows, -1), uniform)
            counts += tokens.cpu().bincount(minlength=vocabulary)
        both = counts, logits.double().softmax(-1) * 64 * rows
        observed, expected = (torch.zeros(int(bins[-1]) + 1, dtype=torch.float64).index_add_(0, bins, x) for x in both)
        freedom = len(expected) - 1
        deviations = float(((observed - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5
        results.add(
            f"check: distribution of {64 * rows:,} tokens of {vocabulary:,}", verdict(deviations, 4.0),
            more=f"chi-square {deviations:+.1f} standard deviations from its mean", deviations=deviations,
        )  # fmt: skip


def tests(results, sizes, options):
    """The GPU part of the test suite, in processes side by side, since building programs takes most of the time."""
    plain = "not compiled and not [cpu" if sizes.device == "cuda" else "halve_after"
    kinds = {"test_cuda.py": plain, "test_kernels.py": plain}
    if sizes.device == "cuda":
        kinds |= {"test_cuda.py, compiled, float32": "compiled and not dtype1", "test_cuda.py, compiled, bfloat16": "compiled and dtype1"}
    else:
        del kinds["test_kernels.py"]

    def run(kind):
        file, chosen = f"tests/{kind.partition(',')[0]}", kinds[kind]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
        started = time.perf_counter()
        process, last = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), "no output"
        for line in process.stdout:  # printed as they come, so that a part that is killed has said what failed
            print(line, end="", flush=True)
            last = line.strip() or last
        result = "ok" if process.wait() == 0 else "WRONG"
        results.add(f"check: tests/{kind}", result, more=f"{last}; {time.perf_counter() - started:.0f} s")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(run, kinds))


# =============================================================================
# Decoding
# =============================================================================


def decode(results, sizes, options, compiled=False):
    for name, shape in sizes.shapes.items():
        model = None
        torch.compiler.reset()  # else what is compiled for the second shape has to fit both
        for context in sizes.contexts:
            middle = sizes.rows[len(sizes.rows) // 2]
            for rows in [middle] if compiled and name != next(iter(sizes.shapes)) else sizes.rows:
                what = f"decode {name}, {COMPILED * compiled}{rows} rows, context {context}"
                with guarded(results, what):
                    model = model or build_model(shape, sizes.device)
                    decode_once(results, sizes, model, shape, rows, context, what, compiled)


def decode_once(results, sizes, model, shape, rows, context, what, compiled):
    """Seconds of the decoding steps alone, prefill excluded, at `context` tokens on average, all rows alive."""
    import common

    steps = min(sizes.decode_steps, context // 2)
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    sampler = common.Sampler(model, {-1}, 1.0, steps + 1, dtype)
    if compiled:
        common.compile_layers(sampler.model)
    P = context - steps // 2
    prompts = torch.randint(1, shape.vocabulary, (max(rows // GROUP, 1), P)).tolist()
    uniforms, started = torch.rand(rows, steps + 1), []
    method = "replay" if sampler.is_cuda else "step"
    original = getattr(sampler, method)

    def first_step_starts_the_clock(*arguments):
        if not started:
            wait(sizes.device)
            started.append(time.perf_counter())
        original(*arguments)

    setattr(sampler, method, first_step_starts_the_clock)
    times = []
    for _ in range(3):  # the first one captures the graphs
        started.clear()
        sampler.sample(prompts, rows // len(prompts), uniforms)
        times.append((time.perf_counter() - started[0]) / steps)
    step = min(times[1:])
    weights = (shape.layer_weights + shape.head_weights) * dtype.itemsize
    floor = (weights + rows * context * shape.cache_numbers * dtype.itemsize) / copy_bandwidth(results, sizes)
    results.add(
        what, f"{rows / step:,.0f} tokens/s", f"floor {rows / floor:,.0f}", f"{floor / step:.0%} of the floor",
        f"{step * 1e3:.2f} ms a step; first call {times[0] * steps:.1f} s", tokens_per_second=rows / step, floor=rows / floor,
    )  # fmt: skip


def generate(results, sizes, options):
    """transformers' `generate` in bfloat16, without cuDNN's attention, which would plan anew for each length."""
    rows = sizes.rows[len(sizes.rows) // 2]
    for name, context in ((name, context) for name in sizes.shapes for context in sizes.contexts):
        label = f"generate {name}, {rows} rows, context {context}"
        with guarded(results, label):
            step = generate_once(sizes, sizes.shapes[name], rows, context)
            ours = {how: results.number("tokens_per_second", f"decode {name}, {how}{rows} rows, context {context}") for how in HOW}
            share = ratios({how: speed * step / rows for how, speed in ours.items() if speed})
            results.add(label, f"{rows / step:,.0f} tokens/s", share=share, more=f"{step * 1e3:.1f} ms a step", tokens_per_second=rows / step)


def generate_once(sizes, shape, rows, context):
    """Seconds of a decoding step: a long call less a short one."""
    model = build_model(shape, sizes.device, "sdpa", torch.bfloat16 if sizes.device == "cuda" else torch.float32)
    model.generation_config.eos_token_id = None
    short, long = 2, 34 if sizes.device == "cuda" else 6
    ids = torch.randint(1, shape.vocabulary, (rows, context - long // 2), device=sizes.device)

    def seconds(new):
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": END}
        return seconds_of(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), sizes.device, 2)

    return max(seconds(long) - seconds(short), 1e-9) / (long - short)


# =============================================================================
# Whole steps
# =============================================================================


def update_flops(shape: Shape, sizes: Sizes, mean_length: float, critic: bool):
    """Operations that the update has to do: forward once, backward twice."""
    P, C, sequences = sizes.prompt_tokens, mean_length, sizes.prompts * sizes.group
    tokens = sizes.prompts * P + sequences * C
    attended = sizes.prompts * P * P / 2 + sequences * C * (P + C / 2)
    body = 6 * shape.layer_weights * tokens + 12 * shape.layers * shape.heads * shape.head_dim * attended
    return (1 + critic) * body + 6 * shape.head_weights * sequences * C


def flags_of(algorithm, folder: Path, model: Path, output: Path, sizes: Sizes, steps: int, options, parts: int):
    flags = {
        "model": model, "dataset": folder / "prompts.jsonl", "reward": f"{folder}/rewards.py:spread", "kl-coef": 0.01,
        "prompts-per-step": sizes.prompts, "max-prompt-tokens": sizes.prompt_tokens, "max-new-tokens": sizes.max_new_tokens,
        "steps": steps, "update-epochs": 1, "num-minibatches": 1, "eval-every": 0, "eval-prompts": 1, "log-samples": 0,
        "micro-batch-tokens": options.micro_batch_tokens // parts,
        "output-dir": output, "device": sizes.device,
        ("group-size" if algorithm == "grpo" else "samples-per-prompt"): sizes.group,
    }  # fmt: skip
    return [str(x) for name, value in flags.items() for x in (f"--{name}", value)] + options.flags.split()


def whole_steps(results, sizes, options, algorithm, name, kind, flags, parts):
    """Steps of a script on the shape `name`. kind: what the row says of it, with a comma; parts: of a default micro-batch."""
    import common
    import grpo
    import ppo

    script, metrics, shape = {"grpo": grpo, "ppo": ppo}[algorithm], [], sizes.shapes[name]
    log, save, load, folder = common.Run.log, common.save_final, common.load_tokenizer, folder_of(results, name)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        model = folder / "model"
        if kind == GEOMETRIC:
            model = Path(shutil.copytree(model, Path(own) / "model", copy_function=os.link))
            end_at_many_tokens(model, shape, sizes)
        count = sizes.steps if shape is sizes.shapes["0.5B"] else 2
        argv = flags_of(algorithm, folder, model, Path(own) / "run", sizes, count, options, parts) + [*flags]
        try:
            common.Run.log = lambda run, step, numbers: metrics.append(
                {k: float(v) for k, v in numbers.items()} | {"micro_batch_tokens": run.micro_batch_tokens}  # halved where memory ends
            )
            common.save_final = lambda *_: None  # gigabytes that nobody reads
            common.load_tokenizer = lambda *_: tokenizer_of(model)
            script.main(common.parse_args(script.Args, argv))
        finally:
            common.Run.log, common.save_final, common.load_tokenizer = log, save, load
    steps = [m for m in metrics if "perf/update_seconds" in m][1:]
    phases = ("rollout", "reward", "reference", "values", "update")
    seconds = {p: statistics.median(m.get(f"perf/{p}_seconds", 0.0) for m in steps) for p in phases}
    total, length = sum(seconds.values()), statistics.median(m["completions/mean_length"] for m in steps)
    tokens = sizes.prompts * sizes.group * length / total
    mfu = update_flops(shape, sizes, length, algorithm == "ppo") / seconds["update"] / matrix_rate(results, sizes)
    memory = max(m["perf/peak_memory_gb"] for m in steps)
    by_phase = ", ".join(f"{p} {s:.2f}" for p, s in seconds.items() if s)
    results.add(
        f"{algorithm} {name}, {kind}step, mean length {length:.0f}", f"{total:.2f} s", f"{tokens:,.0f} tokens/s", f"update MFU {mfu:.0%}",
        f"{by_phase}; {memory:.1f} GB, {steps[-1]['micro_batch_tokens']:,} tokens at once", seconds=total, mfu=mfu, memory=memory, phases=seconds,
    )  # fmt: skip


def trl(results, sizes, options):
    """TRL's GRPOTrainer with `generate`, bfloat16 autocast and no checkpointing: seconds from one reward call to the next."""
    import datasets
    import trl

    class Measured(Exception):
        pass

    name, calls = "0.5B", []

    def reward(completions, **_):
        wait(sizes.device)
        calls.append(time.perf_counter())
        if len(calls) == 3:  # the second call to the third is a whole step after the one that warms up
            raise Measured
        return [i % 8 / 8 for i in range(len(completions))]

    folder = folder_of(results, name)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    micro_batch = min(16, sizes.prompts * sizes.group)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        config = trl.GRPOConfig(
            output_dir=own, per_device_train_batch_size=micro_batch, num_generations=sizes.group, beta=0.01,
            gradient_accumulation_steps=sizes.prompts * sizes.group // micro_batch, max_completion_length=sizes.max_new_tokens,
            max_steps=3, num_iterations=1, learning_rate=1e-6, bf16=sizes.device == "cuda", use_cpu=sizes.device == "cpu",
            gradient_checkpointing=False, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        dataset, tokenizer = datasets.Dataset.from_list(rows), tokenizer_of(folder / "model")
        with contextlib.suppress(Measured):
            trl.GRPOTrainer(f"{folder}/model", reward, config, dataset, processing_class=tokenizer).train()
    seconds = calls[2] - calls[1]
    ours = {how: results.number("seconds", f"grpo {name}, {how}step") for how in HOW}
    share = ratios({how: seconds / own for how, own in ours.items() if own})
    memory = torch.cuda.max_memory_allocated() / 1e9 if sizes.device == "cuda" else 0.0
    results.add(f"trl {trl.__version__} grpo {name} step", f"{seconds:.2f} s", share=share, more=f"{memory:.1f} GB", seconds=seconds)


# =============================================================================
# The parts, each in a process of its own
# =============================================================================

SCRIPTS = ("grpo", "ppo", "transformers.models.qwen2.modeling_qwen2", "torch.utils.tensorboard")  # what takes long to import
HAS_TRL = importlib.util.find_spec("trl") is not None


@dataclass
class Part:
    function: Callable
    limit: float  # seconds
    imports: tuple = ()  # what takes long to import
    shape: str = ""  # whose files it reads


def training(algorithm, name, limit, kind="", flags=(), parts=1):
    """A part with whole steps; the arguments are those of `whole_steps`."""
    function = functools.partial(whole_steps, algorithm=algorithm, name=name, kind=kind, flags=flags, parts=parts)
    return Part(function, limit, SCRIPTS + ("torch._inductor.compile_fx",) * (kind == COMPILED), name)


# The most wanted first, since what the budget does not reach is left out.
PARTS = {
    "machine": Part(machine, 60),
    "checks": Part(checks, 90, SCRIPTS),
    "tests": Part(tests, 150),
    "decode-compiled": Part(functools.partial(decode, compiled=True), 120, (*SCRIPTS, "torch._inductor.compile_fx")),
    "grpo-0.5B-compiled": training("grpo", "0.5B", 150, COMPILED, ["--compile"]),
    "generate": Part(generate, 90, SCRIPTS),
    "trl": Part(trl, 150, ("trl", "datasets") if HAS_TRL else (), "0.5B"),
    "grpo-1.5B-compiled": training("grpo", "1.5B", 170, COMPILED, ["--compile"]),
    "ppo-0.5B": training("ppo", "0.5B", 100),
    "grpo-0.5B": training("grpo", "0.5B", 100),
    "ppo-1.5B": training("ppo", "1.5B", 150),
    "decode": Part(decode, 120, SCRIPTS),
    "grpo-0.5B-half": training("grpo", "0.5B", 100, "half micro-batches, ", parts=2),
    "grpo-1.5B": training("grpo", "1.5B", 120),
    "grpo-0.5B-geometric": training("grpo", "0.5B", 90, GEOMETRIC),
}
SIDE_BY_SIDE = {"checks", "tests"}  # which time nothing


def table(rows):
    names = ("what", "result", "against", "share", "more")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]).replace("|", "/") for name in names) + " |" for row in rows])


def folder_of(results, name) -> Path:
    """Where the files of the shape `name` are, for all parts."""
    return results.path.with_suffix(".folders") / name


def prepare(part, results, sizes):
    """Do what needs no GPU, while other parts use it: on few cores, and without touching it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 4))
    for module in part.imports:
        importlib.import_module(module)
    if part.shape:
        build_folder(folder_of(results, part.shape), sizes.shapes[part.shape], sizes)
    torch.set_num_threads(threads)


def run_part(name, results, options):
    sizes, part = DRY if options.dry_run else FULL, PARTS[name]
    if name == "trl" and not HAS_TRL:
        return results.add("trl", "not installed")
    if sizes.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as the scripts do
    with guarded(results, name):
        prepare(part, results, sizes)
        if options.child and not sys.stdin.readline():  # its turn has come, or all has ended
            return
        part.function(results, sizes, options)


def start(names):
    """A process for each of these parts, which prepares and waits for its turn."""
    commands = {name: [sys.executable, __file__, "--child", name, *sys.argv[1:]] for name in names}
    return {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        for name, command in commands.items()
    }


def finish(processes, seconds, results):
    """Let these parts run, at the same time, for so many seconds at most."""
    started = time.perf_counter()
    for process in processes.values():
        with contextlib.suppress(OSError):  # it has failed while it prepared
            process.stdin.write("go\n")
            process.stdin.flush()
    for name, process in processes.items():
        limit = min(seconds, PARTS[name].limit)
        try:
            if status := process.wait(max(limit - (time.perf_counter() - started), 0)):
                results.add(name, "FAILED", more=f"exit status {status}", failed=True)
        except subprocess.TimeoutExpired:
            results.add(name, "stopped", more=f"after {limit:.0f} s", failed=True)
    end(processes)


def end(processes):
    """What a part has started ends with it, and frees the GPU for the next ones."""
    for process in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_in_processes(groups, results, seconds_left):
    """Groups of parts, one group after the other; the processes of the next one prepare meanwhile."""
    running, following = {}, start(groups[0])
    try:
        for i, names in enumerate(groups):
            running, left = following, seconds_left()
            print(f"{', '.join(names)} ({left:.0f} s left)", flush=True)
            following = start(groups[i + 1]) if i + 1 < len(groups) and left >= 20 else {}
            if left >= 20:
                finish(running, left, results)
            else:
                for name in [name for group in groups[i:] for name in group]:
                    results.add(name, "not run", more="no time left of --budget-seconds")
                break
    finally:  # also after Ctrl-C
        end(running | following)


def main(options):
    results = Results(options.json.with_suffix(".rows"))
    if options.child:
        return run_part(options.child, results, options)
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("bench_gpu.py: no CUDA GPU here (--dry-run runs at toy sizes on a CPU)")
    folders = results.path.with_suffix(".folders")
    results.path.unlink(missing_ok=True), shutil.rmtree(folders, ignore_errors=True)  # of a run that was killed
    started = time.perf_counter()
    try:
        if options.dry_run and not options.processes:
            for name in options.only:
                print(name, flush=True)
                run_part(name, results, options)
        else:
            groups = itertools.groupby(options.only, key=lambda name: "checks" if name in SIDE_BY_SIDE else name)
            run_in_processes(
                [list(group) for _, group in groups], results, lambda: options.budget_seconds - (time.perf_counter() - started)
            )
    finally:
        shutil.rmtree(folders, ignore_errors=True)
    rows = results.read()
    seconds = time.perf_counter() - started
    options.json.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "seconds": seconds, "rows": rows}, indent=1))
    results.path.unlink(missing_ok=True)
    print(f"\n{table(rows)}\n\n{seconds:.0f} s; numbers in {options.json}")
    return int(any(row["result"] in ("FAILED", "WRONG") for row in rows))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--budget-seconds", type=float, default=470)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--flags", default="", help="more flags for both scripts, in one string")
    parser.add_argument("--json", type=Path, default=Path(tempfile.gettempdir()) / "bench_gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--processes", action="store_true", help="a process for each part in a dry run too")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse()))
