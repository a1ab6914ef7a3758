"""What runs on a GPU only, on a GPU (skipped without one), and as much of it as a CPU can show.

On a CPU the sampler is made to take its GPU path: columns by 128, rows that leave by halves, every step a graph. The
graph is a recording of the tensor operations of one step, which is played back on the same tensors: like a CUDA graph
it keeps addresses and shapes, runs no Python, and cannot read a number back from a tensor.
"""

import contextlib
import copy
import math
import shutil

import helpers
import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import common
import grpo

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PROMPTS = helpers.random_ids(3, 7, 1, 5, seed=5)
END = {1, 4}


# ---------------------------------------------------------------- CUDA graphs on a CPU


class Recording(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: what runs in its `with` block has no effect but to be played by `replay`."""

    count = 0

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []
        Recording.count += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "a captured step reads a number from a tensor"
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = kwargs[argument.name] if argument.name in kwargs else args[i]
                self.before.append((written, written.clone()))
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def capture_ended(self):
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before = []

    def replay(self):
        made = {}  # id of a tensor made in the recording -> the one made now
        with torch.autocast("cpu", enabled=False):  # what it does was recorded
            for function, args, kwargs, recorded in self.operations:
                args, kwargs = tree_map(lambda x: made.get(id(x), x), (args, kwargs))
                result = function(*args, **kwargs)
                tree_map(lambda old, new: made.__setitem__(id(old), new), recorded, result)

    def pool(self):
        return None


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Samplers made in the test take the path of a GPU."""

    @contextlib.contextmanager
    def capture(recording, **_):
        with recording:
            yield
        recording.capture_ended()

    class Stream:
        def wait_stream(self, other):
            pass

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.is_cuda = True

    original = common.Sampler.__init__
    monkeypatch.setattr(common.Sampler, "__init__", init)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    Recording.count = 0


# ---------------------------------------------------------------- the same checks on both


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    """A device whose samplers use graphs."""
    if request.param == "cpu":
        request.getfixturevalue("graphs_on_cpu")
    return torch.device(request.param)


def uniforms_of(rows, length, seed=7):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def in_plain_steps(sampler):
    """The same sampler with neither graphs nor their shapes."""
    sampler.is_cuda = False
    return sampler


def assert_same_rollouts(got, want, tolerance=1e-4):
    assert got.lengths.tolist() == want.lengths.tolist()
    assert torch.equal(got.completion_ids, want.completion_ids)
    assert torch.equal(got.truncated, want.truncated)
    torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.sampler_entropy, want.sampler_entropy, atol=tolerance, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "mistral_window", *helpers.WIDE])
@pytest.mark.parametrize("greedy", [False, True])
def test_graphs_sample_what_plain_steps_sample(device, family, greedy):
    """Tokens, ends and log-probs; 48 rows, so that they leave by halves; a window that slides over the prompt's end."""
    if device.type == "cuda" and family == "mixtral":
        pytest.skip("which experts a token takes is found on the host")
    model, length = helpers.make_model(family).to(device), 40
    uniforms = None if greedy else uniforms_of(48, length)
    want = in_plain_steps(common.Sampler(model, END, 0.8, length)).sample(PROMPTS, 12, uniforms)
    sampler = common.Sampler(model, END, 0.8, length)
    assert_same_rollouts(sampler.sample(PROMPTS, 12, uniforms), want)
    assert sampler.graphs
    with torch.no_grad():
        torch.testing.assert_close(common.completion_logprobs(model, want, 0.8), want.sampler_logprobs, atol=1e-4, rtol=0)


def test_graphs_and_cache_serve_rollouts_of_other_sizes_and_newer_weights(device):
    """Fewer rows, shorter and longer prompts, more rows, greedy between samples: nothing of one rollout is left in the next."""
    model, length = helpers.make_model("llama").to(device), 20
    sampler = common.Sampler(model, END, 1.0, length)
    rollouts = [(PROMPTS, 8), (PROMPTS[:2], 4), (helpers.random_ids(30, 2, seed=1), 8), (PROMPTS, 12), (PROMPTS[2:3], 1), (PROMPTS, 8)]
    for i, (prompts, copies) in enumerate(rollouts):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.97)
        uniforms = None if i == 3 else uniforms_of(len(prompts) * copies, length, seed=i)
        want = in_plain_steps(common.Sampler(model, END, 1.0, length)).sample(prompts, copies, uniforms)
        assert_same_rollouts(sampler.sample(prompts, copies, uniforms), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_are_those_of_the_model_that_a_sampler_was_given_last(device, dtype):
    """In float32 each model's own, in bfloat16 of the copy that takes the weights of either."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        pytest.skip("rounds differently in plain steps, and so may take another token")
    policy, average = (helpers.make_model("llama", seed=seed).to(device) for seed in (0, 1))
    sampler, uniforms = common.Sampler(policy, END, 1.0, 12, dtype), uniforms_of(48, 12)
    for model in (policy, average, policy):
        sampler.refresh(model)
        want = in_plain_steps(common.Sampler(model, END, 1.0, 12, dtype)).sample(PROMPTS, 12, uniforms)
        assert_same_rollouts(sampler.sample(PROMPTS, 12, uniforms), want, tolerance=1e-4 if dtype == torch.float32 else 0.1)


def test_a_graph_is_captured_once_for_each_shape(graphs_on_cpu):
    model = helpers.make_model("llama")
    sampler = common.Sampler(model, END, 1.0, 20)
    first = sampler.sample(PROMPTS, 12, uniforms_of(48, 20))
    captured = Recording.count
    assert 1 <= captured <= 5
    assert_same_rollouts(sampler.sample(PROMPTS, 12, uniforms_of(48, 20)), first)
    assert Recording.count == captured


def test_few_graphs_serve_many_numbers_of_rows(graphs_on_cpu):
    """As --dynamic-sampling and the last prompts of an evaluation have them: the rows that are added change nothing."""
    model, prompts = helpers.make_model("llama"), helpers.random_ids(*[3] * 31)
    sampler = common.Sampler(model, END, 1.0, 3)
    for n in [31, *range(17, 31), 1]:
        uniforms = uniforms_of(n, 3, seed=n)
        want = in_plain_steps(common.Sampler(model, END, 1.0, 3)).sample(prompts[:n], 1, uniforms)
        assert_same_rollouts(sampler.sample(prompts[:n], 1, uniforms), want)
    assert {rows for rows, *_ in sampler.graphs} == {20, 24, 28, 32, 1}


def test_many_short_rows_and_few_long_ones_in_turn_keep_one_cache(graphs_on_cpu):
    sampler, caches = common.Sampler(helpers.make_model("llama"), END, 1.0, 3), []
    for prompts, copies in [(PROMPTS, 4), ([[5] * 140], 1)] * 2:
        sampler.sample(prompts, copies, uniforms_of(len(prompts) * copies, 3))
        caches.append(sampler.cache)
    assert caches[1] is caches[2] is caches[3]


def test_rows_leave_by_halves(graphs_on_cpu):
    model, seen = helpers.make_model("llama"), []
    sampler = common.Sampler(model, {1, 4, 9, 20}, 1.0, 60)
    replay = sampler.replay
    sampler.replay = lambda shape, greedy: seen.append(shape) or replay(shape, greedy)
    sampler.sample(PROMPTS, 16, uniforms_of(64, 60))
    live = [n for n, _ in seen]
    assert live == sorted(live, reverse=True) and len(set(live)) > 1
    assert set(live) <= {64, 32, 16, 8, 4, 2, 1} and {used for _, used in seen} == {128}


@pytest.mark.parametrize("family", ["qwen2", *helpers.WIDE])
def test_bfloat16_samples_from_nearly_what_is_scored(device, family):
    """Sampler with bfloat16 weights and trainer under autocast differ by rounding alone."""
    model = helpers.make_model(family).to(device)
    sampler = common.Sampler(model, END, 1.0, 30, torch.bfloat16)
    rollout = sampler.sample(PROMPTS, 12, uniforms_of(48, 30))
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        scored = common.completion_logprobs(model, rollout, 1.0)
    gap = (scored - rollout.sampler_logprobs)[rollout.completion_mask]
    assert float(gap.abs().mean()) < 0.03 and float(gap.abs().max()) < 0.3
    assert {x.dtype for x in (*sampler.cache.keys.values(), *sampler.cache.values.values())} == {torch.bfloat16}


def test_sampled_tokens_have_the_models_distribution(device):
    """Chi-square of the second token, which a graph chooses, over 4096 samples."""
    model = helpers.make_model("llama").to(device)
    rows = 4096
    rollout = common.Sampler(model, {helpers.VOCABULARY}, 1.0, 3).sample([[5, 6]], rows, uniforms_of(rows, 3))
    first = int(rollout.completion_ids[:, 0].mode().values)
    chosen = rollout.completion_ids[(rollout.completion_ids[:, 0] == first), 1].cpu()
    reference = helpers.eager_double(model).cpu()
    with torch.no_grad():
        expected = reference(torch.tensor([[5, 6, first]]), use_cache=False).logits[0, -1].softmax(-1) * len(chosen)
    observed = chosen.bincount(minlength=helpers.VOCABULARY).double()
    common_ones = expected >= 5
    counts = [torch.cat([x[common_ones], x[~common_ones].sum()[None]]) for x in (observed, expected)]
    chi_square = float(((counts[0] - counts[1]).square() / counts[1].clamp(min=1e-9)).sum())
    degrees = int(common_ones.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 4


# ---------------------------------------------------------------- memory


def gradients_of(model, run, rollout, limit=math.inf, means=None):
    """Gradients with those of accumulate_gradients, where more than `limit` completion tokens in a micro-batch are too many."""
    means = means or common.Means()

    def loss_of(batch):
        means.add("tokens", torch.ones(int(batch.lengths.sum())))
        loss = (common.completion_logprobs(model, batch, 1.0) * batch.advantages).sum()
        if int(batch.lengths.sum()) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss

    common.accumulate_gradients(run, loss_of, rollout, [model], means)
    return helpers.gradients(model)


def test_micro_batches_halve_after_running_out_of_memory_and_the_gradient_stays(capsys):
    model = helpers.make_model("llama")
    rollout = common.rollout_of(helpers.random_ids(*[4] * 8), helpers.random_ids(*[16] * 8, seed=1), torch.device("cpu"))
    rollout.advantages = torch.randn(rollout.completion_ids.shape)
    want = gradients_of(model, helpers.make_run(micro_batch_tokens=512), rollout)
    run = helpers.make_run(micro_batch_tokens=512)
    means = common.Means()
    means.add("tokens", torch.ones(7))  # of the minibatch before
    got = gradients_of(model, run, rollout, limit=50, means=means)
    assert means.sums["tokens"][1] == 7 + 8 * 16  # what was counted before the memory ran out is not counted twice
    assert run.micro_batch_tokens == 64  # three sequences of 20 tokens
    assert "out of GPU memory: going on with --micro-batch-tokens 64" in capsys.readouterr().out
    # To the gradients of before, of another loss of the same step, those of this one were added.
    helpers.assert_same_gradients(got, {name: 2 * gradient for name, gradient in want.items()})
    with pytest.raises(common.UserError, match="out of GPU memory"):
        gradients_of(model, run, rollout, limit=10)
    two = helpers.make_run(micro_batch_tokens=512)
    two.world, two.gather = 2, lambda value: [value, value]
    with pytest.raises(common.UserError, match="out of GPU memory"):  # the other process waits in the middle of the same pass
        gradients_of(model, two, rollout, limit=50)


def test_too_little_memory_of_a_gpu_is_not_taken_for_another_error():
    with pytest.raises(torch.cuda.OutOfMemoryError), common.explained_as("something else"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_gradients_of_a_pass_that_runs_out_of_memory_midway_do_not_count():
    model, run, calls = helpers.make_model("llama"), helpers.make_run(micro_batch_tokens=128), []
    rollout = common.rollout_of(helpers.random_ids(*[4] * 8), helpers.random_ids(*[16] * 8, seed=1), torch.device("cpu"))

    def loss_of(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return common.completion_logprobs(model, batch, 1.0).sum()

    common.accumulate_gradients(run, loss_of, rollout, [model])
    assert calls == [6, 2, 3, 3, 2]
    got = helpers.gradients(model)
    model.zero_grad()
    common.completion_logprobs(model, rollout, 1.0).sum().backward()
    helpers.assert_same_gradients(got, helpers.gradients(model))


@needs_gpu
def test_a_gpu_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(capsys):
    """A cap on this process's memory stands for a small GPU."""
    device = torch.device("cuda")
    model = helpers.make_model("llama").to(device)
    prompts, completions = helpers.random_ids(*[400] * 32), helpers.random_ids(*[400] * 32, seed=1)
    rollout = common.rollout_of(prompts, completions, device)
    run = helpers.make_run(device="cuda", dtype="float32", micro_batch_tokens=32 * 800)

    def loss_of(batch):
        return common.completion_logprobs(model, batch, 1.0).sum() / 1000

    def peak():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        model.zero_grad()
        common.accumulate_gradients(run, loss_of, rollout, [model])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() - before

    peak()  # cuBLAS keeps a workspace for each stream from its first use on: that is none of what is needed again
    needed = peak()
    want = helpers.gradients(model)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * needed) / total)
    model.zero_grad()
    try:
        common.accumulate_gradients(run, loss_of, rollout, [model])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.micro_batch_tokens < 32 * 800 and "out of GPU memory: going on" in capsys.readouterr().out
    helpers.assert_same_gradients(helpers.gradients(model), want)


# ---------------------------------------------------------------- a GPU against the CPU


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "mistral_window", *helpers.WIDE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_logprobs_and_gradients_are_those_of_the_cpu_in_float64(family, dtype):
    device, model = torch.device("cuda"), helpers.make_model(family)
    reference = helpers.eager_double(model)
    rollout, prompts, completions = helpers.ragged_rollout()
    weights = torch.randn(rollout.completion_ids.shape)
    want = torch.zeros(weights.shape, dtype=torch.float64)
    for row, (prompt, completion) in enumerate(zip(prompts, completions)):
        logprobs = helpers.brute_logprobs(reference, prompt, completion)
        want[row, : len(completion)] = logprobs.detach()
        (logprobs * weights[row, : len(completion)]).sum().backward()
    model = copy.deepcopy(model).to(device)
    run = helpers.make_run(device="cuda", dtype=dtype)
    rollout, _, _ = helpers.ragged_rollout()
    rollout = common.rollout_of(prompts, completions, device, rollout.prompt_index.tolist())
    with run.autocast():
        got, entropy = common.completion_logprobs(model, rollout, 1.0, with_entropy=True)
    (got * weights.to(device)).sum().backward()
    tolerance = 1e-4 if dtype == "float32" else 0.15
    torch.testing.assert_close(got.detach().cpu().double(), want, atol=tolerance, rtol=0)
    assert entropy.dtype == torch.float32 and entropy.isfinite().all()
    ours = {name: gradient.cpu().double() for name, gradient in helpers.gradients(model).items()}
    theirs = helpers.gradients(reference)
    distance = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    size = sum(float(gradient.square().sum()) for gradient in theirs.values()) ** 0.5
    assert distance / size < (1e-4 if dtype == "float32" else 0.05)


@needs_gpu
@pytest.mark.parametrize("from_sampler", [False, True])
def test_the_micro_batch_loop_never_waits_for_the_gpu(from_sampler):
    model = helpers.make_model("llama").to("cuda")
    run, means = helpers.make_run(device="cuda", micro_batch_tokens=12), common.Means()
    rollout, prompts, completions = helpers.ragged_rollout()
    rollout = common.rollout_of(prompts, completions, torch.device("cuda"), rollout.prompt_index.tolist())

    def loss_of(batch):
        logprobs, entropy = common.completion_logprobs(model, batch, 1.0, with_entropy=True, from_sampler=from_sampler)
        means.add("losses/entropy", entropy, batch.completion_mask)
        return logprobs.sum() / 10

    common.accumulate_gradients(run, loss_of, rollout, [model])  # the first pass loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        common.accumulate_gradients(run, loss_of, rollout, [model])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(tmp_path, **flags):
    """A short run of grpo.py with the tiny model: (accuracy before, accuracy after)."""
    flags = dict(steps=60, eval_every=0, eval_prompts=200, log_samples=0, output_dir=str(tmp_path / "run"), **flags)
    found = {}
    log = common.Run.log

    def watch(self, step, metrics):
        if "eval/accuracy" in metrics:
            found[step] = metrics["eval/accuracy"]
        log(self, step, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "log", watch)
        assert grpo.main(grpo.Args(**flags)) == 0
    return found[0], found[60]


@needs_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_learns_on_a_gpu(tmp_path, dtype):
    before, after = train(tmp_path, device="cuda", dtype=dtype)
    assert after > before + 0.05


@needs_gpu
@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_gpu_trains_to_the_weights_of_a_cpu_and_resumes(script, tmp_path):
    """In float32, with evaluation by samples and checkpoints: a token sampled otherwise would move weights by some 1e-3."""
    materials, folders = runs.make_materials(tmp_path), {device: tmp_path / device for device in ("cpu", "cuda")}
    for device, folder in folders.items():
        flags = dict(device=device, dtype="float32", eval_samples=2, save_every=2)
        assert runs.run_here(script, runs.arguments(materials, script, folder, **flags)) == 0
    assert runs.largest_difference(*folders.values()) < 1e-4
    shutil.copytree(folders["cuda"], tmp_path / "resumed", ignore=shutil.ignore_patterns("final"))
    assert runs.run_here(script, ["--resume", str(tmp_path / "resumed")]) == 0
    assert runs.largest_difference(folders["cuda"], tmp_path / "resumed") < 1e-4


@needs_gpu
@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_gpu_trains_in_bfloat16_with_checkpointed_layers(script, tmp_path):
    """Sampler, reference and matrix products in bfloat16: the weights are finite and near those of float32."""
    materials, folders = runs.make_materials(tmp_path), {dtype: tmp_path / dtype for dtype in ("float32", "bfloat16")}
    for dtype, folder in folders.items():
        flags = dict(device="cuda", dtype=dtype, steps=1, update_epochs=1, num_minibatches=1)
        argv = runs.arguments(materials, script, folder, **flags) + ["--gradient-checkpointing"] * (dtype == "bfloat16")
        assert runs.run_here(script, argv) == 0
    first = [runs.scalars(folder)["losses/grad_norm"][1] for folder in folders.values()]
    assert first[1] == pytest.approx(first[0], rel=0.5)
    assert runs.largest_difference(*folders.values()) < 3e-4  # Adam's first step moves each weight by 1e-4 either way


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_on_a_gpu(dtype):
    """In graphs of several shapes and in training, against the layers as they are."""
    pytest.importorskip("triton")
    model, uniforms = helpers.make_model("qwen2").cuda(), uniforms_of(48, 40)
    sampler = common.Sampler(model, END, 0.8, 40, dtype, own_copy=True)

    def trained(rollout):
        model.zero_grad()
        logprobs = common.completion_logprobs(model, rollout, 0.8)
        (logprobs * torch.linspace(-1, 1, logprobs.numel(), device="cuda").view_as(logprobs)).sum().backward()
        return logprobs.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    with helpers.compiling_with("inductor"), torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        common.compile_layers(sampler.model)
        rollout = sampler.sample(PROMPTS, 12, uniforms)
        logprobs, gradient = trained(rollout)
        common.compile_layers(model)
        compiled, compiled_gradient = trained(rollout)
    assert len({rows for rows, *_ in sampler.graphs}) > 1
    tolerance = 1e-4 if dtype == torch.float32 else 0.4
    torch.testing.assert_close(rollout.sampler_logprobs, logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(compiled, logprobs, atol=tolerance, rtol=0)
    assert (compiled_gradient - gradient).norm() < (1e-4 if dtype == torch.float32 else 0.1) * gradient.norm()


def test_a_whole_run_on_the_path_of_a_gpu(graphs_on_cpu, tmp_path):
    """Warm start, evaluation and training with graphs: the weights change in place, and the graphs see it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "warm_start", lambda *_, **__: None)
        flags = dict(steps=2, eval_every=0, eval_prompts=8, prompts_per_step=4, group_size=4, log_samples=0, device="cpu")
        assert grpo.main(grpo.Args(output_dir=str(tmp_path / "run"), **flags)) == 0
    assert Recording.count
