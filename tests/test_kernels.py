"""The Triton kernels against plain tensors; without a GPU through Triton's interpreter (skipped where Triton is not installed)."""

import helpers
import numpy
import pytest
import torch
from packaging.version import Version

import common

triton = pytest.importorskip("triton")
ENDS = {1, 4, 9}


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def device(request, monkeypatch):
    """A device on which the kernels run."""
    if request.param == "cuda":
        return torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("the kernels are built for the GPU")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 does not run with numpy 2.4")
    monkeypatch.setattr(common, "can_run_kernels", lambda device: True)
    return torch.device("cpu")


def kernel_sampler(model, length, monkeypatch):
    """A sampler that takes the path of a GPU, on a CPU without graphs."""
    sampler = common.Sampler(model, ENDS, 0.8, length)
    if sampler.device.type == "cpu":
        sampler.is_cuda = True
        monkeypatch.setattr(sampler, "replay", lambda shape, greedy: sampler.step(greedy))
    return sampler


@pytest.mark.parametrize("loss", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logprobs_entropies_and_gradients_of_the_head_are_the_plain_ones(device, loss, has_bias, monkeypatch):
    """In float64 on the CPU; a vocabulary of two blocks, of which the second ends in the middle of what a program reads."""
    n, hidden, vocabulary, scale = 5, 16, 9_100, 0.7
    states, weight, bias = torch.randn(n, hidden), torch.randn(vocabulary, hidden), torch.randn(vocabulary)
    targets = torch.tensor([0, 8_191, 8_192, 9_099, 17])
    wanted = [x.double().requires_grad_() for x in (states, weight, bias)]
    ours = [x.to(device).requires_grad_() for x in (states, weight, bias)]
    blocks = [slice(0, 8_192), slice(8_192, vocabulary)]
    monkeypatch.setattr(common.HeadLogprobs, "blocks", lambda states, _: (blocks, states.new_empty(n * 8_192)))
    pairs = []
    for x, function in ((wanted, helpers.plain_logprobs), (ours, common.HeadLogprobs.apply)):
        more = (True,) if x is ours else ()
        outputs = function(x[0], x[1], x[2] if has_bias else None, targets.to(x[0].device), scale, *more)
        parts = [(torch.arange(1, n + 1, device=out.device) * out).sum() for out in outputs]
        (parts[0] * (loss != "entropy") + parts[1] * (loss != "logprobs")).backward()
        pairs.append([*outputs, *(y.grad for y in x if y.grad is not None)])
    assert len(pairs[0]) == len(pairs[1]) == (5 if has_bias else 4)
    for want, got in zip(*pairs):
        assert float((got.detach().cpu() - want.detach()).norm() / want.detach().norm()) < 1e-5


def test_a_logit_of_minus_infinity_has_no_gradient(device):
    logits, ones = torch.randn(3, 40, device=device), torch.ones(3, 1, device=device)
    logits[:, 7] = -torch.inf
    log_totals, means = common.sums_of_logits(logits)
    entropy, target = (log_totals - means)[:, 0], torch.arange(3, device=device)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=0)
    grad = common.gradient_of_logits(logits, log_totals, ones, ones, entropy, target, torch.float32)
    assert grad.isfinite().all() and grad.any(dim=0).sum() == 39


@pytest.mark.parametrize("vocabulary", [7, 96, 9_088, 9_101])
def test_draw_inverts_the_cumulative_distribution(device, vocabulary):
    """Blocks of 1, 32 and 128 tokens, more than a program has rows for; one row allows one token, another none in most blocks."""
    logits, uniform = 3 * torch.randn(40, vocabulary), torch.rand(40)
    logits[0, :-1] = logits[1, : vocabulary // 2] = -torch.inf
    tokens, logprobs = (x.cpu() for x in common.draw(logits.to(device), uniform.to(device)))
    log_p = logits.double().log_softmax(dim=1)
    of_token, up_to_token = (x.gather(1, tokens[:, None])[:, 0] for x in (log_p, log_p.exp().cumsum(dim=1)))
    assert ((uniform < up_to_token + 1e-5) & (uniform > up_to_token - of_token.exp() - 1e-5)).all()
    torch.testing.assert_close(logprobs.double(), of_token, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family, lengths, copies",
    [("llama", (3, 7, 1, 5), 3), ("qwen3_wide", (6,), 2), ("mistral_window", (420, 130, 20), 2), ("mistral_wide_window", (2, 3), 1)],
)
@pytest.mark.parametrize("greedy", [False, True])
def test_kernels_sample_what_plain_attention_samples(device, family, lengths, copies, greedy, monkeypatch):
    """Prompts of several blocks, which several programs read; windows over a prompt's end; a group, and rows of their own."""
    model, prompts, length = helpers.make_model(family).to(device), helpers.random_ids(*lengths), 7
    uniforms = None if greedy else torch.rand(len(prompts) * copies, length, generator=torch.Generator().manual_seed(7))
    sampler, plain = kernel_sampler(model, length, monkeypatch), common.Sampler(model, ENDS, 0.8, length)
    plain.is_cuda = False
    want, got = plain.sample(prompts, copies, uniforms), sampler.sample(prompts, copies, uniforms)
    assert isinstance(sampler.cache, common.SharedPromptLayout)
    assert torch.equal(got.completion_ids, want.completion_ids) and got.lengths.tolist() == want.lengths.tolist()
    torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs, atol=1e-4, rtol=0)


def test_rows_that_leave_and_rollouts_that_follow_change_nothing(device, monkeypatch):
    """Half of the rows leave at token 17, from the middle of their groups; a smaller rollout then takes the same tensors."""
    model, length = helpers.make_model("llama").to(device), 20
    sampler, plain = kernel_sampler(model, length, monkeypatch), common.Sampler(model, ENDS, 0.8, length)
    plain.is_cuda, first_cache = False, None
    for prompts, copies in ((helpers.random_ids(3, 2, 4, 1), 8), (helpers.random_ids(5, seed=3), 3)):
        uniforms = torch.rand(len(prompts) * copies, length, generator=torch.Generator().manual_seed(2))
        want, got = plain.sample(prompts, copies, uniforms), sampler.sample(prompts, copies, uniforms)
        assert torch.equal(got.completion_ids, want.completion_ids)
        torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs, atol=1e-4, rtol=0)
        assert first_cache is None or sampler.cache is first_cache
        assert first_cache or sampler.cache.live == 16
        first_cache = sampler.cache


def test_a_window_reaches_into_the_block_of_keys_before(device):
    """With a head so wide that a block is of 16 tokens; its numbers do not lie side by side."""
    layout, window = common.SharedPromptLayout((1, 1, 2), 20, device), 3
    layout.start(torch.tensor([2], device=device), 1, 1, 2)
    query, key, value = torch.randn(3, 128, 22, 1, device=device).permute(0, 2, 3, 1)
    layout.fill(0, *(x[:2].transpose(0, 1)[None] for x in (key, value)))
    for t in range(2, 22):
        layout.use(t - 2)
        got = layout.attend(0, *(x[t : t + 1] for x in (query, key, value)), 0.1, window)
        seen = slice(max(t + 1 - window, 0), t + 1)
        torch.testing.assert_close(got[0, 0], (0.1 * key[seen, 0] @ query[t, 0]).softmax(0) @ value[seen, 0], atol=1e-4, rtol=0)
        layout.advance()


def test_rows_that_left_are_no_members_of_their_prompts():
    """Else two programs would write one row's results, and which does last is chance on a GPU."""
    layout = common.SharedPromptLayout((4, 2, 3), 5, torch.device("cpu"))
    layout.start(torch.tensor([2, 3]), 2, 4, 3)
    assert layout.members.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    layout.start(torch.tensor([2]), 2, 4, 3)
    assert layout.group.tolist() == [0, 0, 0, 0]  # rows that nobody asked for read the length of the last prompt
    layout.start(torch.tensor([2, 3]), 2, 4, 3)
    layout.shrink(2, torch.tensor([3]), torch.tensor([0]))  # rows 0 and 2 have finished, and row 3 takes the place of row 0
    assert layout.members.tolist() == [-1, 1, -1, 0, -1, -1, -1, -1]


def test_where_no_kernel_can_be_built_plain_pytorch_takes_over(device, monkeypatch, capsys):
    """As without Python's headers: one line says so, once."""
    monkeypatch.undo()
    monkeypatch.setattr(common, "is_recent_nvidia", lambda device: True)
    common.can_run_kernels.cache_clear()
    assert common.can_run_kernels(device)
    common.can_run_kernels.cache_clear()

    def fails(logits):
        raise RuntimeError("fatal error:\nPython.h: No such file or directory")

    monkeypatch.setattr(common, "sums_of_logits", fails)
    assert not common.can_run_kernels(device) and not common.can_run_kernels(device)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "Triton builds no kernels here" in said and "Python.h" in said
    common.can_run_kernels.cache_clear()
