"""The engine: log-probs on the flat row, their gradients, sampling, micro-batches; against brute force in float64."""

import copy
import itertools
import math
import time
import types

import helpers
import numpy
import pytest
import torch
import transformers
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import common

CPU = torch.device("cpu")
ALL = list(helpers.FAMILIES)


@pytest.fixture(scope="module")
def llama():
    return helpers.make_model("llama")


@pytest.fixture(params=["small", "large", "packed"])
def size(request, monkeypatch):
    """Runs a test three times, then on the paths that only larger inputs take on a CPU, then on that of FlashAttention."""
    if request.param == "packed":
        monkeypatch.setattr(common, "has_flash_attention", lambda query, value: query.shape[-1] == value.shape[-1])
        monkeypatch.setattr(common, "flash_attention", helpers.plain_flash_attention)
    if request.param == "large":
        monkeypatch.setattr(common, "is_short", lambda query, key: False)
        monkeypatch.setattr(common.PackedLayout, "SPLIT_FROM", 0)
        monkeypatch.setattr(common.HeadLogprobs, "BLOCK", 1)  # a block still holds 128 columns
        monkeypatch.setattr(common, "PACK_FROM", 0)


# ---------------------------------------------------------------- log-probs on the flat row


@pytest.mark.parametrize("family", ALL)
def test_logprobs_are_those_of_transformers_eager_forward_token_by_token(family, size):
    """Ragged prompts, shared by ragged completions, against one unpadded forward in float64 for each sequence."""
    model = helpers.make_model(family)
    reference = helpers.eager_double(model)
    rollout, prompts, completions = helpers.ragged_rollout()
    with torch.no_grad():
        got = common.completion_logprobs(model, rollout, temperature=0.7)
        for row, prompt, completion in zip(got, prompts, completions):
            want = helpers.brute_logprobs(reference, prompt, completion, 0.7)
            torch.testing.assert_close(row[: len(completion)].double(), want, atol=2e-5, rtol=0)
            assert (row[len(completion) :] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", *helpers.WINDOWED])
def test_logprobs_do_not_depend_on_padding_company_or_sharing(family, size):
    model = helpers.make_model(family)
    rollout, prompts, completions = helpers.ragged_rollout()
    with torch.no_grad():
        want = common.completion_logprobs(model, rollout, 1.0)

        unshared = common.rollout_of(prompts, completions, CPU)  # each sequence with a prompt row of its own
        torch.testing.assert_close(common.completion_logprobs(model, unshared, 1.0), want, atol=1e-5, rtol=0)

        longer = common.rollout_of([*prompts, [5] * 20], [*completions, [6] * 15], CPU, [0, 0, 1, 2, 2, 2, 3])
        got = common.completion_logprobs(model, longer, 1.0)
        torch.testing.assert_close(got[:6, :9], want, atol=1e-5, rtol=0)
        assert (got[:6, 9:] == 0).all()

        for row in range(6):
            alone = common.completion_logprobs(model, rollout.select(torch.tensor([row])), 1.0)
            n = len(completions[row])
            torch.testing.assert_close(alone[0], want[row, :n], atol=1e-5, rtol=0)

        order = torch.tensor([4, 0, 3, 5, 2, 1])
        got = common.completion_logprobs(model, rollout.select(order), 1.0)
        torch.testing.assert_close(got, want[order], atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter(llama):
    rollout, _, _ = helpers.ragged_rollout()
    other = copy.deepcopy(rollout)
    other.completion_ids[~other.completion_mask] = 17
    pad = torch.arange(other.prompt_ids.shape[1]) < (other.prompt_ids.shape[1] - other.prompt_lengths)[:, None]
    other.prompt_ids[pad] = 17
    with torch.no_grad():
        assert torch.equal(common.completion_logprobs(llama, rollout, 1.0), common.completion_logprobs(llama, other, 1.0))


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
def test_entropy_is_that_of_the_whole_distribution(family):
    model = helpers.make_model(family)
    reference = helpers.eager_double(model)
    rollout, prompts, completions = helpers.ragged_rollout()
    with torch.no_grad():
        logprobs, entropy = common.completion_logprobs(model, rollout, 1.3, with_entropy=True)
        assert torch.equal(logprobs, common.completion_logprobs(model, rollout, 1.3))
        for row, prompt, completion in zip(entropy, prompts, completions):
            distribution = helpers.brute_distribution(reference, prompt, completion, 1.3)
            want = [-sum(p * math.log(p) for p in position.exp().tolist()) for position in distribution]
            torch.testing.assert_close(row[: len(completion)].double(), torch.tensor(want).double(), atol=2e-5, rtol=0)
            assert (row[len(completion) :] == 0).all()


def test_left_out_sequences_have_no_logprobs_and_change_none(llama):
    rollout, _, _ = helpers.ragged_rollout()
    want = common.completion_logprobs(llama, rollout, 1.0).detach()
    left_out = torch.tensor([False, True, True, False, True, False])  # row 2 is the only one of its prompt
    rollout.leave_out(left_out)
    got, entropy = common.completion_logprobs(llama, rollout, 1.0, with_entropy=True)
    want[left_out] = 0
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (entropy[left_out] == 0).all() and not rollout.completion_mask[left_out].any()
    assert rollout.lengths.tolist() == [1, 0, 0, 2, 0, 3]


def test_a_batch_of_left_out_sequences_alone_gives_zeros_and_a_gradient_of_zero(llama):
    rollout, _, _ = helpers.ragged_rollout()
    rollout.leave_out(torch.ones(6, dtype=torch.bool))
    batch = rollout.select(torch.tensor([1, 2]))
    logprobs, entropy = common.completion_logprobs(llama, batch, 1.0, with_entropy=True)
    assert logprobs.shape == (2, 1) and (logprobs == 0).all() and (entropy == 0).all()
    logprobs.sum().backward()
    assert all((gradient == 0).all() for gradient in helpers.gradients(llama).values())
    llama.zero_grad()


def test_completions_of_similar_length_attend_together(monkeypatch):
    """Parts end where the length has halved; the longest completion comes first, empty inputs are in no part."""
    monkeypatch.setattr(common.PackedLayout, "SPLIT_FROM", 0)
    lengths = torch.tensor([3, 9, 1, 5, 10, 2])  # inputs: 2, 8, 0, 4, 9, 1
    layout = common.PackedLayout(torch.tensor([4]), torch.zeros(6, dtype=torch.long), lengths, CPU)
    assert [(part.C, len(part.group)) for part in layout.parts] == [(9, 2), (4, 1), (2, 1), (1, 1)]
    assert [part.tokens for part in layout.parts] == [slice(4, 21), slice(21, 25), slice(25, 27), slice(27, 28)]
    assert layout.input_row.unique_consecutive().tolist() == [4, 1, 3, 0, 5]
    monkeypatch.undo()
    (part,) = common.PackedLayout(torch.tensor([4]), torch.zeros(6, dtype=torch.long), lengths, CPU).parts
    assert (part.C, len(part.group), part.tokens) == (9, 6, slice(4, 28))  # so few are not worth it


def test_packed_layout_by_hand_with_a_length_of_zero():
    """Prompts a (2 tokens) and b (3); completions of a: 3 tokens and none, of b: 1 token."""
    layout = common.PackedLayout(torch.tensor([2, 3]), torch.tensor([0, 0, 1]), torch.tensor([3, 0, 1]), CPU)
    # the row: a0 a1 | b0 b1 b2 | first two tokens of the first completion
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert layout.predictors.tolist() == [1, 5, 6, 4]
    keys, *ends, longest_query, longest_key = layout.sequences  # of the prompts, and of that completion after its prompt
    assert keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6] and (longest_query, longest_key) == (3, 4)
    assert [x.tolist() for x in ends] == [[0, 2, 5, 7], [0, 2, 5, 9]]


# ---------------------------------------------------------------- the head: log-probs and their gradient


@pytest.mark.parametrize("loss", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("vocabulary, blocks", [(13, 1), (256, 2), (300, 3)])
@pytest.mark.parametrize("is_known", [True, False])
def test_head_gradients_are_those_of_plain_autograd(monkeypatch, loss, has_bias, scale, vocabulary, blocks, is_known):
    monkeypatch.setattr(common.HeadLogprobs, "BLOCK", 1)  # a block still holds 128 columns
    states, weight, bias = torch.randn(10, 5), torch.randn(vocabulary, 5), torch.randn(vocabulary) if has_bias else None
    targets, incoming = torch.randint(0, vocabulary, (10,)), [torch.randn(10), torch.randn(10)]
    targets[:3] = torch.tensor([0, vocabulary - 1, min(128, vocabulary - 1)])  # the third is the first of a block
    assert len(common.HeadLogprobs.blocks(states, vocabulary)[0]) == blocks
    leaves = [x.clone().requires_grad_() for x in (states, weight, bias) if x is not None]
    known = helpers.plain_logprobs(states, weight, bias, targets, scale) if is_known else None
    with_entropy = loss != "logprobs" or vocabulary == 300
    got = common.HeadLogprobs.apply(*leaves, *[None] * (not has_bias), targets, scale, with_entropy, known)

    doubles = [x.double().requires_grad_() for x in (states, weight, bias) if x is not None]
    want = helpers.plain_logprobs(*doubles, *[None] * (not has_bias), targets, scale)
    used = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[loss]
    sum(got[i] @ incoming[i] for i in used).backward()
    sum(want[i] @ incoming[i].double() for i in used).backward()
    for i in used:
        torch.testing.assert_close(got[i].double(), want[i], atol=1e-5, rtol=1e-5)
    for leaf, double in zip(leaves, doubles):
        # An entropy's gradient is a sum of larger terms: more is rounded off.
        torch.testing.assert_close(leaf.grad.double(), double.grad, atol=1e-5 if loss == "logprobs" else 1e-4, rtol=1e-5)
    assert got[0].dtype == torch.float32 and got[1].requires_grad == with_entropy


def test_head_without_gradient_of_the_weight():
    """A frozen head, as under an adapter: the hidden states still get theirs."""
    states, weight, targets = torch.randn(4, 5, requires_grad=True), torch.randn(7, 5), torch.tensor([0, 6, 3, 3])
    logprobs, _ = common.HeadLogprobs.apply(states, weight, None, targets, 1.0, False)
    logprobs.sum().backward()
    want = torch.autograd.grad(helpers.plain_logprobs(states, weight, None, targets, 1.0)[0].sum(), states)[0]
    torch.testing.assert_close(states.grad, want, atol=1e-5, rtol=1e-5)
    assert weight.grad is None


def test_head_survives_extreme_logits():
    states, weight = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([[500.0], [-500.0], [0.0]])
    logprobs, entropy = common.HeadLogprobs.apply(states, weight, None, torch.tensor([0, 1, 1]), 1.0, True)
    assert logprobs.tolist() == [0.0, -1000.0, 0.0]
    assert entropy.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_window", "mixtral", "phi"])
def test_gradient_is_that_of_plain_autograd_whatever_the_micro_batches(family, size):
    """Weighted sum of log-probs through accumulate_gradients, against autograd over eager forwards in float64."""
    model = helpers.make_model(family)
    rollout, prompts, completions = helpers.ragged_rollout()
    rollout.advantages = torch.randn(rollout.completion_ids.shape)
    reference = helpers.eager_double(model)
    for row, prompt, completion in zip(rollout.advantages, prompts, completions):
        logprobs = helpers.brute_logprobs(reference, prompt, completion, 0.8)
        (logprobs * row[: len(completion)]).sum().backward()
    want = {name: gradient.float() for name, gradient in helpers.gradients(reference).items()}

    def loss_of(batch):
        return (common.completion_logprobs(model, batch, 0.8) * batch.advantages * batch.completion_mask).sum()

    for budget in (1, 12, 20, 1000):
        run = helpers.make_run(micro_batch_tokens=budget)
        model.zero_grad()
        common.accumulate_gradients(run, loss_of, rollout, [model])
        helpers.assert_same_gradients(helpers.gradients(model), want)
    common.accumulate_gradients(run, loss_of, rollout, [model])  # another loss of the same step adds its own
    helpers.assert_same_gradients(helpers.gradients(model), {name: 2 * gradient for name, gradient in want.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(family):
    """Numbers that autograd keeps are counted; those of the head's blocks are the same in both."""
    model = helpers.make_model(family)
    rollout, _, _ = helpers.ragged_rollout()
    kept, gradients = [], []
    for checkpointed in (False, True):
        if checkpointed:
            common.checkpoint_layers(model)
        model.train()
        model.zero_grad(set_to_none=True)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            loss = common.completion_logprobs(model, rollout, 1.0).sum()
        loss.backward()
        kept.append(sum(numbers))
        gradients.append(helpers.gradients(model))
    assert kept[1] < 0.6 * kept[0], kept
    helpers.assert_same_gradients(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family, tables", [("llama", 0), ("qwen2", 1)])
def test_tied_weights_get_one_table_of_gradients(family, tables, checkpointed):
    """The lookup makes none of its own where the head has the same weight; what is in it, the tests above compare."""
    model = helpers.make_model(family)
    if checkpointed:
        common.checkpoint_layers(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rollout, _, _ = helpers.ragged_rollout()
    loss = common.completion_logprobs(model, rollout, 1.0).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    made = [event for event in profile.events() if event.name == "aten::embedding_dense_backward"]
    assert tied == (tables == 0) and len(made) == tables


def test_values_of_the_critic_belong_to_the_token_they_come_before(llama):
    critic = common.Critic(llama.model)
    assert not critic.head.weight.any() and not critic.head.bias.any()  # at first it expects nothing of any token
    torch.nn.init.normal_(critic.head.weight), torch.nn.init.normal_(critic.head.bias)
    rollout, prompts, completions = helpers.ragged_rollout()
    reference = helpers.eager_double(llama)
    with torch.no_grad():
        got = common.completion_values(critic, rollout)
        for row, prompt, completion in zip(got, prompts, completions):
            states = reference.model(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0]
            want = (states @ critic.head.weight[0].double() + critic.head.bias.double())[len(prompt) - 1 : -1]
            torch.testing.assert_close(row[: len(completion)].double(), want, atol=1e-4, rtol=0)
            assert (row[len(completion) :] == 0).all()


# ---------------------------------------------------------------- lower precision


def test_values_of_the_critic_are_not_rounded_to_bfloat16(llama):
    critic = common.Critic(llama.model)
    torch.nn.init.normal_(critic.head.weight, std=5.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = common.completion_values(critic, helpers.ragged_rollout()[0])
    values = values[values != 0]
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma", "qwen2_moe"])
def test_frozen_copy_in_bfloat16_gives_the_logprobs_of_autocast_at_half_the_memory(family):
    """Up to the rounding of the embeddings, which autocast alone would leave in float32: with it they are equal."""
    model = helpers.make_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    frozen = common.frozen_copy(model, torch.bfloat16)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()
    rollout, _, _ = helpers.ragged_rollout()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        exact, want, got = (common.completion_logprobs(some, rollout, 1.0) for some in (model, rounded, frozen))
    assert got.dtype == torch.float32
    experts = family == "qwen2_moe"  # their fused product follows the precision of the weights, whatever autocast says
    torch.testing.assert_close(got, want, atol=0.1 if experts else 1e-5, rtol=0)
    torch.testing.assert_close(got, exact, atol=0.1, rtol=0)

    def size(model):
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() > 1)

    assert size(frozen) * 2 == size(model)
    assert not any(parameter.requires_grad for parameter in frozen.parameters()) and not frozen.training
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bfloat16_changes_logprobs_a_little_but_not_their_sum_over_the_vocabulary(llama):
    """Logits and softmax are float32 even under autocast: probabilities of all tokens add up to 1."""
    head = llama.get_output_embeddings()
    states, tokens = torch.randn(1, 16).expand(helpers.VOCABULARY, 16), torch.arange(helpers.VOCABULARY)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = common.HeadLogprobs.apply(states, head.weight, None, tokens, 1.0, False)
    assert abs(float(logprobs.double().exp().sum()) - 1) < 1e-5


def test_copy_weights_brings_the_copy_up_to_date(llama):
    policy, frozen = copy.deepcopy(llama), common.frozen_copy(llama, torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    sampler = common.Sampler(policy, {1}, 1.0, 4, torch.bfloat16)
    sampler.model = frozen
    sampler.refresh(policy)
    for new, old in zip(policy.parameters(), frozen.parameters()):
        assert torch.equal(new.to(old.dtype), old)


# ---------------------------------------------------------------- sampling


PROMPTS = helpers.random_ids(3, 7, 1, 5, seed=5)
ENDS = {1, 4, 9, 20}  # several, so that rows end at different times


def sample(model, prompts=PROMPTS, group_size=3, length=12, temperature=1.0, seed=7, ends=ENDS, greedy=False, dtype=torch.float32):
    uniforms = torch.rand(len(prompts) * group_size, length, generator=torch.Generator().manual_seed(seed))
    sampler = common.Sampler(model, ends, temperature, length, dtype)
    return sampler.sample(prompts, group_size, None if greedy else uniforms)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_sampled_from_is_what_is_scored(family, temperature, size):
    """The sampler's log-probs (cache, rows that leave) are the trainer's (flat row), for ragged prompts and groups."""
    model = helpers.make_model(family)
    rollout = sample(model, temperature=temperature)
    assert rollout.lengths.min() < rollout.lengths.max()  # some rows have left the batch before others
    with torch.no_grad():
        scored = common.completion_logprobs(model, rollout, temperature)
    torch.testing.assert_close(rollout.sampler_logprobs, scored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ALL)
def test_the_gradient_of_the_samplers_logprobs_is_that_of_the_trainers(family, size):
    """Log-probs and entropies that the sampler has seen are taken over; their gradient is the one that is computed anew."""
    model = helpers.make_model(family)
    rollout = sample(model, temperature=0.6)
    rollout.leave_out(torch.arange(len(rollout)) == 2)  # which the sampler did not know
    weights, seen = torch.randn(rollout.completion_ids.shape), []
    for from_sampler in (False, True):
        model.zero_grad()
        logprobs, entropy = common.completion_logprobs(model, rollout, 0.6, with_entropy=True, from_sampler=from_sampler)
        (logprobs * weights).sum().backward()
        seen.append({"logprobs": logprobs.detach(), "entropy": entropy} | helpers.gradients(model))
    assert torch.equal(seen[1]["logprobs"], rollout.sampler_logprobs * rollout.completion_mask)
    assert torch.equal(seen[1]["entropy"], rollout.sampler_entropy * rollout.completion_mask)
    assert (rollout.sampler_entropy[rollout.completion_mask] > 0).all()
    for name, want in seen[0].items():
        torch.testing.assert_close(seen[1][name], want, atol=1e-4, rtol=1e-4)


def test_the_samplers_logprobs_of_another_model_are_refused(llama):
    rollout, changed = sample(llama), copy.deepcopy(llama)
    with torch.no_grad():
        changed.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(common.UserError, match="is not the one that sampled"):
        common.completion_logprobs(changed, rollout, 1.0, from_sampler=True).sum().backward()


def test_a_model_whose_numbers_overflow_is_not_taken_for_another_one(llama):
    """Its gradients are NaN, so that the update is skipped and said, as it is with log-probs of the trainer's own."""
    model = copy.deepcopy(llama)
    model.model.norm.weight.data[0] = math.inf
    common.completion_logprobs(model, sample(model), 1.0, from_sampler=True).sum().backward()
    assert model.get_output_embeddings().weight.grad.isnan().any()


def test_what_sampling_keeps_in_memory_is_left_to_the_update(llama):
    sampler, weight = common.Sampler(llama, ENDS, 1.0, 4), llama.get_output_embeddings().weight
    rollout = sampler.sample([[2, 3]], 2, torch.rand(2, 4))
    weight.packed = torch.ones(1)  # as of a large one
    common.completion_logprobs(llama, rollout, 1.0)
    assert sampler.cache is None and weight.packed is None


def test_a_model_samples_in_evaluation_mode_and_goes_on_in_its_own(llama):
    """Layers with gradient checkpointing read the random state in training mode."""
    model, seen = copy.deepcopy(llama), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    for training in (True, False):
        common.Sampler(model.train(training), ENDS, 1.0, 4).sample([[2, 3]], 2, torch.rand(2, 4))
        assert seen and not any(seen) and model.training == training


def test_mask_keeps_the_first_end_token_and_nothing_after(llama):
    rollout = sample(llama, group_size=8)
    C = rollout.completion_ids.shape[1]
    assert 0 < rollout.truncated.sum() < len(rollout)  # both kinds are here
    for b in range(len(rollout)):
        ids, n = rollout.completion_ids[b].tolist(), int(rollout.lengths[b])
        ends = [t for t, token in enumerate(ids[:n]) if token in ENDS]
        assert rollout.completion_mask[b].tolist() == [t < n for t in range(C)]
        assert ends == ([] if rollout.truncated[b] else [n - 1])
        assert not rollout.truncated[b] or n == 12
        assert ids[n:] == [min(ENDS)] * (C - n) and (rollout.sampler_logprobs[b, n:] == 0).all()
    assert {rollout.completion_ids[b, n - 1].item() for b, n in enumerate(rollout.lengths)} & ENDS - {min(ENDS)}


def test_an_end_token_at_the_very_last_position_is_no_truncation(llama):
    rollout = sample(llama, length=1, ends=set(range(helpers.VOCABULARY)))
    assert not rollout.truncated.any() and rollout.lengths.tolist() == [1] * 12
    assert sample(llama, length=1, ends={helpers.VOCABULARY}).truncated.all()


def test_rollout_of_a_sample_holds_the_prompts_left_padded(llama):
    rollout = sample(llama)
    assert rollout.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for b, prompt in enumerate(rollout.prompt_ids.tolist()):
        want = PROMPTS[b // 3]
        assert rollout.prompt_lengths[b] == len(want) and prompt[len(prompt) - len(want) :] == want


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", *helpers.WINDOWED])
def test_greedy_is_the_argmax_of_full_forwards_step_by_step(family, size):
    model = helpers.make_model(family)
    rollout = sample(model, group_size=1, greedy=True)
    reference = helpers.eager_double(model)
    for b, prompt in enumerate(PROMPTS):
        completion = []
        while len(completion) < 12 and not (completion and completion[-1] in ENDS):
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + completion]), use_cache=False).logits[0, -1]
            completion.append(int(logits.argmax()))
        assert rollout.completion_ids[b, : rollout.lengths[b]].tolist() == completion
        with torch.no_grad():
            want = helpers.brute_logprobs(reference, prompt, completion)
        torch.testing.assert_close(rollout.sampler_logprobs[b, : len(completion)].double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_a_sample_does_not_depend_on_the_batch_it_is_sampled_in(family):
    """The same random numbers give the same tokens alone, in another group, and beside longer prompts."""
    model = helpers.make_model(family)
    uniforms = torch.rand(12, 12, generator=torch.Generator().manual_seed(7))
    together = sample(model)
    sampler = common.Sampler(model, ENDS, 1.0, 12)
    for b in range(12):
        alone = sampler.sample([PROMPTS[b // 3]], 1, uniforms[b : b + 1])
        n = int(together.lengths[b])
        assert alone.completion_ids[0].tolist() == together.completion_ids[b, :n].tolist()
        torch.testing.assert_close(alone.sampler_logprobs[0], together.sampler_logprobs[b, :n], atol=1e-5, rtol=0)
    ungrouped = sampler.sample([PROMPTS[b // 3] for b in range(12)] + [[5] * 30], 1, torch.cat([uniforms, uniforms[:1]]))
    C = together.completion_ids.shape[1]
    assert torch.equal(ungrouped.completion_ids[:12, :C], together.completion_ids)
    assert torch.equal(ungrouped.lengths[:12], together.lengths)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # PlainForward, and the forward of transformers
def test_finished_rows_leave_the_batch(family, monkeypatch):
    """No forward pass works on more rows than there are unfinished sequences."""
    rows, forward = [], common.PlainForward.__call__
    monkeypatch.setattr(common.PlainForward, "__call__", lambda self, x, *rest: rows.append(len(x)) or forward(self, x, *rest))
    flat_forward = common.flat_forward
    monkeypatch.setattr(common, "flat_forward", lambda model, x, *rest: rows.append(len(x)) or flat_forward(model, x, *rest))
    rollout = sample(helpers.make_model(family))
    unfinished = [int((rollout.lengths > t).sum()) for t in range(1, int(rollout.lengths.max()))]
    assert rows == [sum(map(len, PROMPTS)), *unfinished]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_plain_forward_reads_the_weights_of_the_model_itself(family):
    """It stores nothing of its own, notices a weight that was replaced, and survives copying and saving."""
    model = helpers.make_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sampler = common.Sampler(model, ENDS, 1.0, 12)
    uniforms = torch.rand(12, 12, generator=torch.Generator().manual_seed(7))
    sampler.sample(PROMPTS, 3, uniforms)
    assert isinstance(sampler.forward, common.PlainForward)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    for change in (lambda k: k.data.mul_(1.5), lambda k: setattr(k, "data", 2 * k.data)):  # in place, and another tensor
        change(attention.k_proj.weight)
        rollout = sampler.sample(PROMPTS, 3, uniforms)
        with torch.no_grad():
            scored = common.completion_logprobs(copy.deepcopy(model), rollout, 1.0)
        torch.testing.assert_close(rollout.sampler_logprobs, scored, atol=1e-4, rtol=0)


def test_a_changed_model_samples_through_transformers(llama):
    class Adapter(torch.nn.Linear):
        pass

    def fits(change):
        model = copy.deepcopy(llama)
        change(model.model)
        return common.PlainForward.fits(model)

    assert fits(lambda backbone: None)
    assert not fits(lambda backbone: setattr(backbone.layers[0].self_attn, "q_proj", Adapter(16, 16)))
    assert not fits(lambda backbone: backbone.layers[1].register_forward_hook(lambda *_: None))
    assert not fits(lambda backbone: backbone.norm.register_forward_pre_hook(lambda *_: None))
    assert not fits(lambda backbone: setattr(backbone.layers[0].mlp, "forward", lambda x: x))
    assert not common.PlainForward.fits(helpers.make_model("gemma")) and not common.PlainForward.fits(helpers.make_model("mixtral"))


@pytest.mark.parametrize("from_sampler", [False, True])
def test_an_entropy_bonus_has_the_gradient_of_plain_autograd(llama, from_sampler):
    model, reference = copy.deepcopy(llama), helpers.eager_double(llama)
    reference.get_input_embeddings().padding_idx = None  # here the pad is a token like any other
    rollout = sample(model)
    _, entropy = common.completion_logprobs(model, rollout, 1.0, with_entropy=True, from_sampler=from_sampler)
    entropy.sum().backward()
    for row, (n, completion) in enumerate(zip(rollout.lengths.tolist(), rollout.completion_ids.tolist())):
        log_p = helpers.brute_distribution(reference, PROMPTS[rollout.prompt_index[row]], completion[:n])
        (-log_p.exp() * log_p).sum().backward()
    helpers.assert_same_gradients(helpers.gradients(model), helpers.gradients(reference))


@pytest.mark.parametrize(  # PlainForward, and not; the sampler's precision
    ("family", "dtype"), [("qwen3", torch.float32), ("qwen3", torch.bfloat16), ("gemma", torch.float32)]
)
def test_compiled_layers_sample_and_train_like_others(family, dtype):
    """Over changing numbers of rows and tokens; all layers and all numbers share what is compiled."""

    def results(model, sampler):
        for group in (2, 5, 3):
            model.zero_grad()
            uniforms = torch.rand(4 * group, 12, generator=torch.Generator().manual_seed(group))
            rollout = sampler.sample(PROMPTS, group, uniforms)
            logprobs = common.completion_logprobs(model, rollout, 1.0)
            (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
            yield rollout, logprobs.detach(), helpers.gradients(model)

    model = helpers.make_model(family)
    sampler = common.Sampler(model, ENDS, 1.0, 12, dtype)
    plain = list(results(model, sampler))
    with helpers.compiling_with("aot_eager"):
        common.compile_layers(model, sampler.model)
        compiled = list(results(model, sampler))
    assert sampler.draw is not common.draw
    if isinstance(sampler.forward, common.PlainForward):
        assert sampler.forward.before_attention is not common.PlainForward.before_attention
        # One program for all numbers of rows, and one more after attention, for the last layer.
        functions = common.PlainForward.before_attention, common.PlainForward.after_attention, common.draw
        programs = [len(_debug_get_cache_entry_list(function.__code__)) for function in functions]
        assert programs == [1, 2, int(dtype == torch.bfloat16)]
    for (want, want_logprobs, want_gradients), (got, logprobs, gradients) in zip(plain, compiled, strict=True):
        assert torch.equal(got.completion_ids, want.completion_ids)
        torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(logprobs, want_logprobs, atol=1e-5, rtol=0)
        helpers.assert_same_gradients(gradients, want_gradients)


def test_tokens_are_drawn_by_inverting_the_cumulative_distribution(llama):
    """Each sampled token is where the cumulative distribution of a full forward passes its uniform number."""
    rollout = sample(llama, temperature=1.4)
    uniforms = torch.rand(12, 12, generator=torch.Generator().manual_seed(7)).double()
    reference = helpers.eager_double(llama)
    for b in range(12):
        completion = rollout.completion_ids[b, : rollout.lengths[b]].tolist()
        with torch.no_grad():
            probs = helpers.brute_distribution(reference, PROMPTS[b // 3], completion, 1.4).exp()
        for t, token in enumerate(completion):
            below = probs[t, :token].sum()
            assert below - 1e-5 < uniforms[b, t] < below + probs[t, token] + 1e-5


def force_gpu_path(sampler, monkeypatch):
    """The path of a GPU, on the CPU and without graphs: buckets of columns, rows by halves, tensors kept between calls."""
    sampler.is_cuda = True
    monkeypatch.setattr(sampler, "replay", lambda shape, greedy: sampler.step(greedy))
    monkeypatch.setattr(common, "is_short", lambda query, key: False)


@pytest.mark.parametrize("family", ["llama", "gemma3_window"])
def test_buckets_of_columns_and_rows_change_nothing(family, monkeypatch):
    model = helpers.make_model(family)
    uniforms = torch.rand(64, 40, generator=torch.Generator().manual_seed(8))
    ends = {1, 9}  # so that some rows leave in the middle and others stay to the end
    plain, bucketed = common.Sampler(model, ends, 1.0, 40), common.Sampler(model, ends, 1.0, 40)
    force_gpu_path(bucketed, monkeypatch)
    first_cache = None
    # The later calls are smaller or as large: they work in the tensors that the first one has left behind.
    for prompts, copies in ((PROMPTS, 16), (PROMPTS[:2], 16), (PROMPTS[1:], 20), (PROMPTS, 1)):
        part = uniforms[: len(prompts) * copies]
        for numbers in (part, None):
            want, got = plain.sample(prompts, copies, numbers), bucketed.sample(prompts, copies, numbers)
            assert bucketed.cache.block == 128 and (first_cache is None or bucketed.cache is first_cache)
            first_cache = bucketed.cache
            assert numbers is None or len(part) < 32 or bucketed.cache.live < len(part)  # many rows have left by halves
            assert torch.equal(got.completion_ids, want.completion_ids) and torch.equal(got.lengths, want.lengths)
            assert torch.equal(got.truncated, want.truncated)
            torch.testing.assert_close(got.sampler_logprobs, want.sampler_logprobs, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.sampler_entropy, want.sampler_entropy, atol=1e-5, rtol=0)
            for left_behind in (bucketed.ids, bucketed.logprobs, bucketed.entropy, bucketed.finished, bucketed.tokens, bucketed.cell):  # anything at all
                left_behind.fill_(1)
            for left_behind in (*first_cache.keys.values(), *first_cache.values.values(), first_cache.mask):
                left_behind.fill_(3.0)


def test_bfloat16_sampler_stays_near_the_float32_policy(llama):
    rollout = sample(llama, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scored = common.completion_logprobs(llama, rollout, 1.0)
    assert float((scored - rollout.sampler_logprobs).abs().max()) < 0.3
    assert float((scored - rollout.sampler_logprobs).abs().mean()) < 0.03
    assert rollout.sampler_entropy.isnan().all()  # nothing takes it for the trainer's


BOTH_WAYS_TO_DRAW = pytest.mark.parametrize("draw", [common.draw, common.draw_with_entropy])


@BOTH_WAYS_TO_DRAW
def test_draw_has_the_frequencies_of_the_softmax(draw):
    """Chi-square over 20 tokens, 200,000 draws: 43.8 is exceeded once in a thousand seeds, and this seed is fixed."""
    logits = 1.5 * torch.randn(1, 20)
    n = 200_000
    tokens, logprobs, *_ = draw(logits.expand(n, 20), torch.rand(n))
    want = n * logits[0].double().softmax(-1)
    counts = torch.bincount(tokens, minlength=20).double()
    assert float(((counts - want) ** 2 / want).sum()) < 43.8
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens], atol=1e-5, rtol=0)


@BOTH_WAYS_TO_DRAW
@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("vocabulary", [5, 1000, 151_936])
def test_draw_never_takes_a_token_of_probability_zero(uniform, vocabulary, draw):
    """Not at the ends of the vocabulary, not at either end of the random numbers, not where rounding piles up."""
    logits = torch.randn(6, vocabulary)
    logits[0, :-1] = logits[1, 1:] = logits[2, : vocabulary // 2] = logits[3, vocabulary // 2 :] = -math.inf
    logits[4, ::2] = -math.inf
    logits[5] = -200.0
    logits[5, vocabulary // 3] = 0.0
    tokens, logprobs, *_ = draw(logits, torch.full((6,), uniform))
    assert (tokens >= 0).all() and (tokens < vocabulary).all() and logprobs.isfinite().all()
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert tokens[0] == vocabulary - 1 and tokens[1] == 0 and tokens[5] == vocabulary // 3


@BOTH_WAYS_TO_DRAW
def test_draw_is_the_same_whatever_is_added_to_all_logits(draw):
    """And has tokens to give where they are NaN, since such a run ends by its gradients."""
    logits, uniform = torch.randn(6, 1000).mul(8).round() / 8, torch.rand(6)  # exact sums
    want = draw(logits, uniform)
    for shift in (-500.0, 500.0):
        for got, plain in zip(draw(logits + shift, uniform), want):
            torch.testing.assert_close(got, plain, atol=1e-4, rtol=0)
    tokens = draw(torch.full((6, 1000), math.nan), uniform)[0]
    assert (tokens >= 0).all() and (tokens < 1000).all()


def test_the_share_of_a_weight_stays_within_0_and_1():
    """Else it would be no random number for what that weight holds. Shares by hand, and such as rounding puts outside."""
    shares = torch.tensor([[0.0], [0.125], [0.25], [0.5], [0.9375]])
    index, rest = common.invert(torch.tensor([[2.0, 0.0, 1.0, 5.0]]).expand(5, 4), shares)
    assert index[:, 0].tolist() == [0, 0, 2, 3, 3] and rest[:, 0].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.2, 0.9])
    before_a_border = torch.tensor([[0.25]], dtype=torch.float64).nextafter(torch.zeros(()))
    index, rest = common.invert(torch.tensor([[1.0, 3.0]]), before_a_border)
    assert int(index) == 0 and float(rest.float()) < 1  # which would be 1, as 1 - 2**-53 is in float32
    index, rest = common.invert(torch.tensor([[1.0, 0.75 * 2.0**-52]]), torch.tensor([[1 - 2.0**-53]], dtype=torch.float64))
    assert int(index) == 1 and float(rest) == 0  # the sum is rounded up, so that the share would be -1/3


# ---------------------------------------------------------------- what the project does not run is refused


def small_gemma2(**softcapping):
    return transformers.Gemma2Config(**helpers.SIZES, **helpers.GQA, head_dim=6, **softcapping)


def checked(run, model, max_new_tokens=6):
    sampler = common.Sampler(model, {1}, 1.0, max_new_tokens, run.compute_dtype)
    tokenizer = types.SimpleNamespace(convert_ids_to_tokens=lambda i: f"<{i}>")
    common.check_model(run, model, sampler, tokenizer)


@pytest.mark.parametrize(
    "softcapping",
    [
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None},
        {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0},
    ],
)
def test_check_model_refuses_logits_that_the_flat_row_gets_wrong(run, softcapping):
    with pytest.raises(common.UserError, match="--model") as refusal:
        checked(run, helpers.config_model(small_gemma2(**softcapping)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_model_refuses_logits_of_another_scale(llama, dtype, monkeypatch):
    """By less than a bfloat16 pass may differ."""
    monkeypatch.setattr(common, "logit_scale", lambda model: 0.99)
    with pytest.raises(common.UserError, match="differ by .* from those of transformers"):
        checked(helpers.make_run(dtype=dtype), llama)
    assert llama.config._attn_implementation == "flat_row"  # as it was


def test_check_model_refuses_an_adapter_on_the_head_which_would_not_act(llama, run):
    """Not even one that changes nothing yet, as a fresh LoRA."""
    hooked, hooked_before, patched, wrapped = (copy.deepcopy(llama) for _ in range(4))
    hooked.lm_head.register_forward_hook(lambda module, inputs, output: output)
    hooked_before.lm_head.register_forward_pre_hook(lambda module, inputs: inputs)
    patched.lm_head.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight), patched.lm_head)
    kind = type("Adapted", (torch.nn.Linear,), {"forward": lambda self, x: torch.nn.functional.linear(x, self.weight)})
    wrapped.lm_head.__class__ = kind
    for model in (hooked, hooked_before, patched, wrapped):
        with pytest.raises(common.UserError, match="it takes no adapter or hook"):
            checked(run, model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_model_refuses_a_sampler_that_differs_from_transformers(llama, monkeypatch, dtype):
    entry = common.DecodeLayout.attend
    skewed = lambda self, layer, query, key, *rest: entry(self, layer, query, 2 * key, *rest)  # noqa: E731
    monkeypatch.setattr(common.DecodeLayout, "attend", skewed)
    with pytest.raises(common.UserError, match="differ by .* from those of transformers"):
        checked(helpers.make_run(dtype=dtype), llama)


def test_check_model_refuses_a_window_that_attention_does_not_hear_of(run):
    """But not one that no layer uses."""
    sizes = helpers.SIZES | helpers.GQA | dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    full = transformers.Qwen2Config(
        **helpers.SIZES, **helpers.GQA, use_sliding_window=True, sliding_window=32, layer_types=["full_attention"] * 2
    )
    checked(run, helpers.config_model(full))
    for window in (32, None):
        windows = dict(use_sliding_window=True, sliding_window=window, layer_types=["full_attention", "sliding_attention"])
        model = helpers.config_model(transformers.Qwen2MoeConfig(**sizes, **helpers.EXPERTS, **(windows if window else {})))
        if window:
            with pytest.raises(common.UserError, match="Qwen2MoeAttention is of a kind"):
                checked(run, model)
        else:
            checked(run, model)


def test_positions_of_longrope_are_the_original_ones():
    rope = dict(rope_type="longrope", short_factor=[1.0, 1.0], long_factor=[2.0, 4.0], rope_theta=1e4)
    sizes = helpers.SIZES | dict(max_position_embeddings=1024, original_max_position_embeddings=64)
    config = transformers.Phi3Config(**sizes, rope_parameters=rope | {"original_max_position_embeddings": 64})
    assert common.positions_of(config) == 64
    assert common.positions_of(transformers.LlamaConfig(**sizes)) == 1024
    assert common.positions_of(types.SimpleNamespace(max_position_embeddings=-1)) is None


def test_check_model_keeps_within_the_positions(run):
    """A table of 64 positions, of which the completions may take all but one."""
    model = helpers.make_model("gpt2")
    for room in (64, 12, 11):
        model.config.n_positions = room
        model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:room]
        checked(run, model, room - 1)


def test_check_model_warns_where_the_sampler_is_far_from_the_trainer(llama, capsys, monkeypatch):
    run = helpers.make_run(dtype="bfloat16")
    checked(run, llama)
    assert "disagree" not in capsys.readouterr().out
    sample = common.Sampler.sample

    def shifted(*args):
        rollout = sample(*args)
        rollout.sampler_logprobs = rollout.sampler_logprobs - (0.0 if args[0].is_exact else 0.2)
        return rollout

    monkeypatch.setattr(common.Sampler, "sample", shifted)
    checked(run, llama)
    assert "warning: sampler and trainer disagree: --dtype float32" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_window", "cohere"])
def test_check_model_accepts_and_leaves_the_model_as_it_was(run, capsys, family):
    model = helpers.make_model(family)
    checked(run, model)
    assert "end tokens: 1 '<1>'; sampler and trainer differ by at most" in capsys.readouterr().out
    assert model.config._attn_implementation == "flat_row" and model.training


# ---------------------------------------------------------------- rollouts and micro-batches


def test_select_takes_rows_and_trims_columns_to_their_longest():
    rollout, prompts, completions = helpers.ragged_rollout()
    rollout.advantages, rollout.scores = torch.arange(6.0)[:, None], torch.arange(6.0)
    rollout.values = torch.arange(54.0).view(6, 9)
    rows = torch.tensor([5, 0, 3])
    part = rollout.select(rows)
    assert len(part) == 3 and part.completion_ids.shape == (3, 3) and part.prompt_ids.shape == (3, 8)
    assert part.advantages.tolist() == [[5.0], [0.0], [3.0]] and part.scores.tolist() == [5.0, 0.0, 3.0]
    assert torch.equal(part.values, rollout.values[rows, :3])
    assert part.prompt_index.tolist() == [2, 0, 2] and part.old_logprobs is None
    for b, row in enumerate(rows.tolist()):
        assert part.completion_ids[b, : part.lengths[b]].tolist() == completions[row]
        assert part.prompt_ids[b, 8 - part.prompt_lengths[b] :].tolist() == prompts[row]
    assert rollout.completion_ids.shape == (6, 9)  # untouched
    square = common.rollout_of([[2, 3, 4], [5]], [[6, 7, 8], [9]], CPU).select(torch.tensor([1]))
    assert square.prompt_ids.tolist() == [[0, 0, 5]] and square.completion_ids.tolist() == [[9]]


def test_select_takes_along_what_a_script_has_added():
    rollout, *_ = helpers.ragged_rollout()
    rollout.weights, rollout.bonus = torch.arange(6), torch.arange(6.0)[:, None] + torch.zeros(rollout.completion_ids.shape)
    rollout.step, rollout.scale, rollout.texts = 3, torch.tensor(2.0), list("abcdef")
    part = rollout.select(torch.tensor([3, 0]))  # 2 tokens and 1
    assert part.texts == ["d", "a"] and part.scale == 2.0
    assert part.weights.tolist() == [3, 0] and part.bonus.tolist() == [[3.0, 3.0], [0.0, 0.0]]
    assert len(rollout.weights) == 6 and rollout.select(torch.tensor([1])).weights.tolist() == [1]
    assert rollout.select(torch.tensor([1])).step == 3
    chosen = rollout.select(torch.tensor([False, True, False, False, True, False]))
    assert chosen.texts == ["b", "e"] and chosen.weights.tolist() == [1, 4] and chosen.lengths.tolist() == [6, 9]


@pytest.mark.parametrize("odd", [torch.zeros(6, 3), torch.zeros(5), numpy.zeros(6), (0,) * 6, [0] * 5], ids=str)
def test_select_refuses_what_it_cannot_take_along(odd):
    """(B, 3) among them, of which it could not tell for completions of 3 tokens whether to trim it."""
    rollout, *_ = helpers.ragged_rollout()
    rollout.odd = odd
    with pytest.raises(common.UserError, match=r"rollout.odd has to be a tensor \(6,\), \(6, 1\) or \(6, 9\)"):
        rollout.select(torch.tensor([0]))


def test_join_keeps_everything_of_both():
    first, second = (helpers.ragged_rollout(seed)[0] for seed in (0, 5))
    second = second.select(torch.tensor([0, 2]))  # of 1 and 4 tokens
    for rollout in (first, second):
        rollout.scores, rollout.texts, rollout.step = torch.arange(float(len(rollout))), list("abcdef")[: len(rollout)], 3
        rollout.advantages = rollout.scores[:, None]
    joined = first.join(second)
    assert joined.prompt_index.tolist() == [0, 0, 1, 2, 2, 2, 3, 4] and joined.texts == [*"abcdef", *"ab"]
    assert joined.advantages.tolist() == [[i] for i in [0, 1, 2, 3, 4, 5, 0, 1]] and joined.step == 3
    for rows, part in ((range(6), first), (range(6, 8), second)):
        part_of_joined = joined.select(torch.tensor(rows))
        assert torch.equal(part_of_joined.completion_ids, part.completion_ids)
        assert torch.equal(part_of_joined.completion_mask, part.completion_mask)
        for i, row in enumerate(rows):
            length = int(part.prompt_lengths[i])
            assert torch.equal(joined.prompt_ids[row, -length:], part.prompt_ids[i, -length:])
    second.advantages = second.completion_ids.float()  # by token, as from lists of rewards
    assert first.join(second).advantages[:6].tolist() == [[i] * 9 for i in range(6)]
    assert second.join(first).advantages[2:].tolist() == [[i] * 9 for i in range(6)]
    second.weights = torch.ones(2)
    for one, other in ((first, second), (second, first)):
        with pytest.raises(common.UserError, match="only one of the two has weights"):
            one.join(other)
    first.weights, second.step = torch.ones(6), 4
    with pytest.raises(common.UserError, match="Rollout.join: step is 3 in one and 4 in the other"):
        first.join(second)


@pytest.mark.parametrize("lengths", [(2, 5), (12, 15)])  # of prompts and completions that come: shorter, longer
def test_replace_puts_other_sequences_in_the_places_of_rows(llama, lengths):
    rollout, prompts, completions = helpers.ragged_rollout()
    new_prompt, *new_completions = helpers.random_ids(lengths[0], lengths[1], 1, seed=9)
    rollout.replace(torch.tensor([1, 2]), common.rollout_of([new_prompt] * 2, new_completions, CPU, [0, 0]))
    rows = [prompts[0], new_prompt, new_prompt, *prompts[3:]], [completions[0], *new_completions, *completions[3:]]
    for b, (prompt, completion) in enumerate(zip(*rows)):
        assert rollout.prompt_ids[b].tolist()[-len(prompt) :] == prompt and rollout.prompt_lengths[b] == len(prompt)
        assert rollout.completion_ids[b, rollout.completion_mask[b]].tolist() == completion
    assert (rollout.prompt_index[:, None] == rollout.prompt_index).tolist() == [[x is y for y in rows[0]] for x in rows[0]]
    with torch.no_grad():
        got = common.completion_logprobs(llama, rollout, 1.0)
        want = common.completion_logprobs(llama, common.rollout_of(*rows, CPU), 1.0)
    torch.testing.assert_close(got[:, : want.shape[1]], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 7, 20, 45, 10_000])
def test_micro_batches_cover_every_row_once_within_the_budget(budget):
    generator = torch.Generator().manual_seed(budget)
    index = torch.randint(0, 7, (40,), generator=generator).sort().values.tolist()
    lengths = torch.randint(1, 10, (40,), generator=generator).tolist()
    rollout = common.rollout_of([[2] * (i + 1) for i in index], [[3] * n for n in lengths], CPU, index)
    rollout.leave_out(torch.rand(40, generator=generator) < 0.2)
    parts = common.micro_batches(rollout, budget)
    assert torch.cat(parts).tolist() == list(range(40))

    def tokens(part):
        return sum({index[i]: index[i] + 1 for i in part.tolist()}.values()) + int(rollout.lengths[part].sum())

    assert all(len(part) == 1 or tokens(part) <= budget for part in parts)
    for part, following in itertools.pairwise(parts):  # none was closed too early
        assert tokens(torch.cat([part, following[:1]])) > budget


def test_logprobs_of_a_whole_rollout_do_not_depend_on_micro_batches(llama):
    rollout, _, _ = helpers.ragged_rollout()
    rollout.leave_out(torch.tensor([False, False, True, False, False, True]))
    want = common.completion_logprobs(llama, rollout, 1.0).detach()
    for budget in (1, 11, 1000):
        got = common.logprobs_without_gradient(helpers.make_run(micro_batch_tokens=budget), llama, rollout)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert not got.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_is_computed_in_the_precision_of_dtype(dtype):
    model, run, seen = helpers.make_model("llama"), helpers.make_run(dtype=dtype, micro_batch_tokens=20), []

    def loss_of(batch):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")))
        return common.completion_logprobs(model, batch, 1.0).sum()

    common.accumulate_gradients(run, loss_of, helpers.ragged_rollout()[0], [model])
    assert len(seen) > 1 and set(seen) == {(True, torch.bfloat16) if dtype == "bfloat16" else (False, False)}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# ---------------------------------------------------------------- statistics


def test_means_weigh_every_number_the_same_whatever_the_parts(run):
    values, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    means = common.Means()
    for rows in (slice(0, 1), slice(1, 6)):
        means.add("whole", values[rows], mask[rows])
        means.add("plain", values[rows])
        means.add("column", values[rows, :1], mask[rows])  # (b, 1) beside a mask (b, C): one number for all its tokens
    means.add("number", 3), means.add("number", 4.0), means.add("empty", values, torch.zeros(6, 5, dtype=torch.bool))
    means.add("loss", torch.ones(1, requires_grad=True))
    assert not means.sums["loss"].requires_grad  # else it would hold the activations of every micro-batch
    got = means.reduce(run)
    assert got["whole"] == pytest.approx(values[mask].mean().item(), abs=1e-6)
    assert got["plain"] == pytest.approx(values.mean().item(), abs=1e-6)
    assert got["column"] == pytest.approx(values[:, :1].expand(6, 5)[mask].mean().item(), abs=1e-6)
    assert got["number"] == 3.5 and math.isnan(got["empty"])


def test_metrics_of_scores_far_from_0_of_equal_ones_and_of_none(run):
    rollout = common.rollout_of([[2, 3]] * 64, [[3, 1]] * 64, torch.device("cpu"))
    none = torch.full((64,), math.nan)

    def metrics(scores):
        run.seconds, rollout.scores = {"rollout": 1.0, "update": 1.0}, scores
        by_function = {"all": scores, "some": torch.where(torch.arange(64) < 9, scores, math.nan), "never": none}
        return common.step_metrics(run, rollout, common.Scores(scores, by_function, [], False, {}, {}), common.Means(), [])

    spread = 1000 + 0.01 * torch.randn(64)
    got = metrics(spread)
    assert got["reward/std"] == pytest.approx(spread.double().std().item(), rel=0.01)
    assert got["reward/all"] == pytest.approx(1000, abs=0.1) and math.isnan(got["reward/never"])
    assert got["reward/some"] == pytest.approx(float(spread[:9].mean()), abs=1e-3)
    assert metrics(torch.full((64,), 0.1))["reward/std"] == 0.0
    assert math.isnan(metrics(none)["reward/std"]) and math.isnan(metrics(none)["reward/mean"])


def test_means_count_what_other_processes_have(run):
    """Names among it that this one lacks: of a level of prompts, say."""
    means = common.Means()
    means.add("both", torch.tensor([1.0, 2.0]))
    run.gather = lambda sums: [sums, {"both": [6.0, 1.0], "other": [3.0, 2.0]}]
    assert means.reduce(run) == {"both": 3.0, "other": 1.5}


def test_speed_is_that_of_all_phases_and_mfu_that_of_the_update(run, monkeypatch):
    monkeypatch.setattr(common, "update_flops", lambda *_: 6e9), monkeypatch.setattr(common, "matrix_rate", lambda *_: 2e9)
    rollout = common.rollout_of([[2, 3]] * 4, [[3, 1]] * 4, CPU)
    rollout.scores, run.seconds, run.args.update_epochs = torch.arange(4.0), {"rollout": 3.0, "update": 1.0}, 2
    metrics = common.step_metrics(run, rollout, common.Scores(rollout.scores, {}, [], False, {}, {}), common.Means(), [])
    assert metrics["perf/tokens_per_second"] == 2.0 and metrics["perf/mfu"] == 6.0
    assert 0.1 < metrics["perf/peak_memory_gb"] < 1000  # which PyTorch alone takes


def test_the_measured_rate_is_of_multiplications_and_additions(monkeypatch):
    """A second passes between two looks at the clock."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    assert common.matrix_rate.__wrapped__(CPU, torch.float32) == 10 * 2 * 512**3


def test_a_mean_over_a_mask_of_another_shape_is_no_table(run):
    """Numbers (B, 1), as GRPO's advantages are, count as they are under a mask (B, C), and are refused under one (B,)."""
    x, means = torch.arange(3.0)[:, None], common.Means()
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    means.add("x", x, mask)
    assert means.reduce(run)["x"] == pytest.approx(2 / 3)
    assert float(common.mean_and_variance(run, x, mask)[0]) == pytest.approx(2 / 3)
    for wrong in (lambda: means.add("y", x, mask[:, 0]), lambda: common.mean_and_variance(run, x, mask[:, 0])):
        with pytest.raises(RuntimeError, match="expand"):
            wrong()


def test_skipped_updates_are_those_of_one_step(run):
    rollout, seen = common.rollout_of([[2, 3]] * 4, [[3, 1]] * 4, CPU), []
    rollout.scores, run.skipped_updates = torch.arange(4.0), 3
    for _ in range(2):
        run.seconds = {"rollout": 1.0, "update": 1.0}
        scores = common.Scores(rollout.scores, {}, [], False, {}, {})
        seen.append(common.step_metrics(run, rollout, scores, common.Means(), [])["losses/skipped_updates"])
    assert seen == [3, 0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with one matrix for embeddings and head, and with two
def test_operations_of_an_update_by_hand(family):
    """A layer has matrices for 4 heads, 2 of keys and 2 of values, and an MLP; embeddings are looked up. Biases do not count."""
    model, (rollout, _, _) = helpers.make_model(family), helpers.ragged_rollout()
    layers = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    prompts, completions = 3 + 8 + 1, 1 + 6 + 4 + 2 + 9 + 3  # each prompt once
    policy = 6 * ((prompts + completions) * layers + completions * 16 * helpers.VOCABULARY)
    assert common.update_flops([model], rollout) == policy
    critic = common.Critic(copy.deepcopy(model.base_model))
    assert common.update_flops([critic], rollout) == 6 * (prompts + completions) * layers  # its head is a single column
    assert common.update_flops([model, critic], rollout) == policy + 6 * (prompts + completions) * layers
    assert common.update_flops([], rollout) == 0


def test_mean_and_variance_over_a_mask_ignore_what_is_outside(run):
    x, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.6
    want = x[mask].double()
    x[~mask] = math.nan
    mean, variance = common.mean_and_variance(run, x, mask)
    assert float(mean) == pytest.approx(float(want.mean()), abs=1e-6)
    assert float(variance) == pytest.approx(float(want.var()), abs=1e-6)
    nothing = common.mean_and_variance(run, x, torch.zeros_like(mask))
    assert [float(number) for number in nothing] == [0.0, 0.0]


def test_pass_at_k():
    assert common.pass_at_k(8, 2, 4) == pytest.approx(0.7857, abs=1e-4)
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations(range(n), k))
                want = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
                assert common.pass_at_k(n, correct, k) == pytest.approx(want)


@pytest.mark.parametrize("steps, warmup", [(10, 3), (10, 0), (1, 0), (5, 5), (4, 20)])
def test_learning_rate_rises_linearly_then_falls_linearly_and_is_never_zero(steps, warmup):
    args = types.SimpleNamespace(steps=steps, warmup_steps=warmup)
    shares = [common.learning_rate_share(args, step) for step in range(1, steps + 1)]
    assert all(0 < share <= 1 for share in shares)
    for step, share in enumerate(shares, start=1):
        if step <= warmup:
            assert share == pytest.approx(step / (warmup + 1))
        else:
            assert share == pytest.approx((steps + 1 - step) / (steps - warmup))


def test_set_learning_rate_is_a_share_of_each_groups_peak():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1e-3, 1e-2)]
    optimizer = torch.optim.AdamW(groups)
    for share in (0.5, 0.25):  # of the peak, not of the last one
        common.set_learning_rate(optimizer, share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([share * 1e-3, share * 1e-2])


def test_random_numbers_for_another_length_than_the_samplers_are_refused(llama):
    sampler = common.Sampler(llama, {1}, 1.0, 5)
    with pytest.raises(common.UserError, match="3 random numbers for each completion, but up to 5 tokens; set args.max_new_tokens and"):
        sampler.sample([[2, 3]], 2, torch.rand(2, 3))
    sampler.C = 3
    assert sampler.sample([[2, 3]], 2, torch.rand(2, 3)).lengths.max() <= 3


def test_update_is_skipped_where_the_gradient_is_not_finite(run, capsys):
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.clone()
    for _ in range(5):
        assert not run.must_stop()
        layer.weight.grad, layer.bias.grad = torch.tensor([[math.nan, 1.0]]), torch.ones(1)
        assert common.clip_and_step(run, [layer], optimizer).isnan()
    assert run.must_stop()  # five in a row: nothing is learned any more
    assert torch.equal(layer.weight, before) and "skipped" in capsys.readouterr().out
    assert run.skipped_updates == 5  # what losses/skipped_updates shows


def test_gradient_norm_is_clipped_and_reported_as_it_was(run):
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[30.0, 40.0]])
    assert float(common.clip_and_step(run, [layer], optimizer)) == pytest.approx(50.0)
    torch.testing.assert_close(before - layer.weight.detach(), torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)


def test_every_models_gradient_is_looked_at_and_the_norm_of_the_first_is_reported():
    """Each model is clipped on its own; one that is not finite stops all, and a finite one ends the count of 5 in a row."""
    run = helpers.make_run(max_grad_norm=0.5)
    layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=1.0)
    for bad in (False, True, True, True, True, False, True):
        before = [layer.weight.item() for layer in layers]
        layers[0].weight.grad, layers[1].weight.grad = torch.tensor([[3.0]]), torch.tensor([[math.nan if bad else 4.0]])
        assert common.clip_and_step(run, layers, optimizer) == 3.0
        moved = [b - layer.weight.item() for b, layer in zip(before, layers)]
        assert moved == pytest.approx([0.0, 0.0] if bad else [0.5, 0.5], abs=1e-5)
        assert all(layer.weight.grad is None for layer in layers) and not run.must_stop()
    assert run.skipped_updates == 5


def test_weights_that_no_optimiser_has_count_in_no_norm_and_keep_no_gradient(run):
    """Two optimisers share the weights of a layer but for its bias."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1, bias=False))
    optimizers = [torch.optim.SGD([module.weight], lr=1.0) for module in layer]
    before = [module.weight.detach().clone() for module in layer]
    layer[0].weight.grad, layer[1].weight.grad, layer[0].bias.grad = torch.tensor([[30.0, 0.0]]), torch.tensor([[40.0]]), torch.ones(1)
    assert float(common.clip_and_step(run, [layer], optimizers)) == pytest.approx(50.0)
    moved = [float((old - module.weight.detach()).sum()) for old, module in zip(before, layer)]
    assert moved == pytest.approx([0.6, 0.8], abs=1e-5)
    assert all(weight.grad is None for weight in layer.parameters())


def test_another_temperature_than_the_samplers_is_refused():
    model = helpers.make_model("llama")
    rollout, run = sample(model, temperature=0.7), helpers.make_run(temperature=0.7)
    common.accumulate_gradients(run, lambda batch: common.completion_logprobs(model, batch, 0.7).sum(), rollout, [model])
    run.args.temperature = 0.6  # as a schedule in a copied script does
    with pytest.raises(common.UserError, match="sampled at temperature 0.7 and scored at 0.6"):
        common.accumulate_gradients(run, lambda batch: 1 / 0, rollout, [model])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sampler_may_take_the_weights_of_another_model_which_changes_none(dtype):
    """As an average of the policy that is evaluated: on a CPU in float32 the sampler has no weights of its own."""
    policy, average = helpers.make_model("llama", seed=0), helpers.make_model("llama", seed=1)
    before = copy.deepcopy(policy.state_dict())
    sampler, uniforms = common.Sampler(policy, ENDS, 1.0, 12, getattr(torch, dtype)), torch.rand(4, 12)
    want = common.Sampler(average, ENDS, 1.0, 12, getattr(torch, dtype)).sample([[2, 3]], 4, uniforms)
    own = common.Sampler(policy, ENDS, 1.0, 12, getattr(torch, dtype), own_copy=True)
    own.refresh(average)
    assert own.model is not average
    assert own.sample([[2, 3]], 4, uniforms).completion_ids.tolist() == want.completion_ids.tolist()
    for model, same in ((average, True), (policy, False)):
        sampler.refresh(model)
        got = sampler.sample([[2, 3]], 4, uniforms)
        assert (got.completion_ids.tolist() == want.completion_ids.tolist()) == same
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())
