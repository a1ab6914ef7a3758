"""The mathematics of grpo.py against plain Python loops in float64, written from the papers' formulas."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import grpo

LOSSES = list(grpo.LOSS_DEFAULTS)
GRID = settings(max_examples=60, deadline=None)


# ---------------------------------------------------------------- brute force


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


def sample_std(numbers):
    return math.sqrt(math.fsum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1))


def brute_group_advantages(scores, group_size, scale):
    """Of each score, None for one that is missing; one group after the other."""
    advantages = []
    for start in range(0, len(scores), group_size):
        group = scores[start : start + group_size]
        known = [score for score in group if score is not None]
        for score in group:
            if score is None or len(set(known)) == 1:
                advantages.append(0.0)
            else:
                advantages.append((score - mean(known)) / (sample_std(known) + 1e-4 if scale else 1.0))
    return advantages


@dataclasses.dataclass
class Step:
    """All sequences of one optimiser step, as lists of floats: one a sequence of one a valid token."""

    logprobs: list
    old: list
    ref: list
    advantages: list  # one a sequence
    max_new_tokens: int

    def padded(self, rows=None, columns=None, fill=0.0, dtype=torch.float32):
        """(logprobs, old, ref, advantages (b, 1), mask) of some of the sequences."""
        rows = range(len(self.old)) if rows is None else rows
        columns = columns or max(max((len(self.old[i]) for i in rows), default=1), 1)
        table = lambda lists: torch.tensor([lists[i] + [fill] * (columns - len(lists[i])) for i in rows], dtype=dtype)  # noqa: E731
        mask = torch.tensor([[t < len(self.old[i]) for t in range(columns)] for i in rows])
        advantages = torch.tensor([[self.advantages[i]] for i in rows], dtype=dtype)
        return table(self.logprobs), table(self.old), table(self.ref), advantages, mask


def random_step(seed, spread=0.5, size=7, longest=6, empty=True):
    """Random lengths from 0 (left out) or 1 up to `longest`; log-differences of about `spread`."""
    draw = random.Random(seed)
    lengths = [draw.randint(0 if empty else 1, longest) for _ in range(size - 2)] + [longest, 1]
    old = [[-3 * draw.random() for _ in range(n)] for n in lengths]
    near = lambda: [[x + spread * draw.gauss(0, 1) for x in row] for row in old]  # noqa: E731
    return Step(near(), old, near(), [draw.gauss(0, 1) for _ in lengths], longest + 3)


def clamp(x, low, high):
    return max(low, min(x, high))


def brute_loss(step, loss, clip_low, clip_high, kl_coef=0.0, estimator="k3"):
    """Loss of an optimiser step and its gradient with respect to each log-prob: (float, lists of floats).

    Each paper's own formula; derivatives by hand: d rho / d logprob = rho, 0 where the clip binds.
    """
    sequences = sum(len(row) > 0 for row in step.old)
    tokens = sum(len(row) for row in step.old)
    total, gradient = 0.0, [[0.0] * len(row) for row in step.old]
    for i, (new, old, ref) in enumerate(zip(step.logprobs, step.old, step.ref)):
        if not new:
            continue
        advantage, length = step.advantages[i], len(new)
        log_ratio = [clamp(a - b, -20, 20) for a, b in zip(new, old)]
        free = [abs(a - b) < 20 for a, b in zip(new, old)]
        weight = {
            "grpo": 1 / (sequences * length),
            "gspo": 1 / (sequences * length),
            "dr_grpo": 1 / (sequences * step.max_new_tokens),
            "dapo": 1 / tokens,
            "cispo": 1 / tokens,
        }[loss]
        for t in range(length):
            if loss == "cispo":  # -sg(min(rho, 1 + high)) A logprob
                slope = -min(math.exp(log_ratio[t]), 1 + clip_high) * advantage
                value = slope * new[t]
            else:
                rho = math.exp(mean(log_ratio) if loss == "gspo" else log_ratio[t])
                unclipped, clipped = rho * advantage, clamp(rho, 1 - clip_low, 1 + clip_high) * advantage
                value = -min(unclipped, clipped)
                # Every token of a gspo sequence has its ratio, whose derivative is rho / length for each of them:
                # summed over the sequence's tokens, rho again.
                slope = -rho * advantage * free[t] if unclipped <= clipped else 0.0
            if kl_coef:
                is_clamped = estimator == "k3" and abs(new[t] - ref[t]) > 20
                k1 = clamp(new[t] - ref[t], -20, 20) if is_clamped else new[t] - ref[t]
                value += kl_coef * {"k1": k1, "k2": k1 * k1 / 2, "k3": math.exp(-k1) + k1 - 1}[estimator]
                slope += kl_coef * (not is_clamped) * {"k1": 1.0, "k2": k1, "k3": 1 - math.exp(-k1)}[estimator]
            total += weight * value
            gradient[i][t] += weight * slope
    return total, gradient


def scripts_loss(step, loss, clip_low, clip_high, kl_coef=0.0, estimator="k3", parts=None, columns=None, dtype=torch.float32):
    """The same through grpo.py's functions, put together as its main does, in micro-batches `parts` of row numbers."""
    sequences, tokens = float(sum(len(row) > 0 for row in step.old)), float(sum(map(len, step.old)))
    total, gradient = 0.0, [None] * len(step.old)
    for rows in parts or [range(len(step.old))]:
        logprobs, old, ref, advantages, mask = step.padded(rows, columns, dtype=dtype)
        logprobs.requires_grad_()
        ratio = grpo.policy_ratio(logprobs, old, mask, per_sequence=loss == "gspo")
        if loss == "cispo":
            values = grpo.cispo_loss(ratio, advantages, logprobs, clip_high)
        else:
            values = grpo.surrogate_loss(ratio, advantages, clip_low, clip_high)
        if kl_coef:
            values = values + kl_coef * grpo.kl_estimate(logprobs, ref, estimator)
        part = (values * grpo.token_weights(loss, mask, sequences, tokens, step.max_new_tokens)).sum()
        part.backward()
        total += part.item()
        assert (logprobs.grad[~mask] == 0).all()
        for i, row, keep in zip(rows, logprobs.grad, mask):
            gradient[i] = row[keep].tolist()
    return total, gradient


def assert_same(got, want, tolerance=1e-5):
    assert got[0] == pytest.approx(want[0], rel=tolerance, abs=tolerance)
    for a, b in zip(got[1], want[1], strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


def defaults(loss):
    return grpo.LOSS_DEFAULTS[loss][:2]


# ---------------------------------------------------------------- advantages of a group


def test_fixtures_of_one_winner_among_eight():
    scores = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    scaled = grpo.group_advantages(scores, 8)
    std = 0.3535534  # ddof 1
    assert scaled.shape == (8, 1) and scaled[0, 0].item() == pytest.approx(2.4749 * std / (std + 1e-4), abs=1e-4)
    centred = grpo.group_advantages(scores, 8, scale=False)[:, 0]
    rloo = 8 / 7 * centred  # r_i minus the mean of the others
    assert rloo.tolist() == pytest.approx([1.0] + [-1 / 7] * 7, abs=1e-6)


@pytest.mark.parametrize("score", [0.1, 0.0, 1.0, -0.7, 1 / 3, 1e6 + 0.1, 1e-30])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_scores_give_exactly_zero(score, group_size, scale):
    """Eight times 0.1 have a mean that is not 0.1 and a standard deviation that is not 0 in floating point."""
    scores = torch.full((2 * group_size,), score)
    assert (grpo.group_advantages(scores, group_size, scale) == 0).all()
    scores[1] = math.nan  # the same with a score missing
    assert (grpo.group_advantages(scores, group_size, scale) == 0).all()


score_lists = st.integers(2, 9).flatmap(
    lambda G: st.tuples(
        st.just(G),
        st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 1.0]), st.floats(-50, 50, width=32)), min_size=2 * G, max_size=2 * G),
    )
)


@GRID
@given(score_lists, st.booleans())
def test_group_advantages_equal_brute_force_for_ragged_groups(case, scale):
    """None stands for a completion without a score (NaN): it gets 0 and does not count in mean and spread."""
    group_size, scores = case
    got = grpo.group_advantages(torch.tensor([math.nan if s is None else s for s in scores]), group_size, scale)
    want = brute_group_advantages(scores, group_size, scale)
    assert got.shape == (len(scores), 1) and got.dtype == torch.float32
    # Scores that differ by rounding alone are divided by nearly 1e-4: the tolerance is that of their mean.
    assert got[:, 0].tolist() == pytest.approx(want, rel=2e-4, abs=2e-2 if scale else 2e-5)
    assert all(g == 0 for g, s in zip(got[:, 0].tolist(), scores) if s is None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_of_plain_scores_tightly(seed, scale):
    scores = torch.rand(24, generator=torch.Generator().manual_seed(seed)).tolist()
    scores[seed] = None
    got = grpo.group_advantages(torch.tensor([math.nan if s is None else s for s in scores]), 6, scale)
    assert got[:, 0].tolist() == pytest.approx(brute_group_advantages(scores, 6, scale), rel=1e-4, abs=1e-6)


def test_a_group_with_one_score_or_none_teaches_nothing():
    nan = math.nan
    assert grpo.group_advantages(torch.tensor([nan, 3.0, nan, nan, nan, nan]), 3)[:, 0].tolist() == [0.0] * 6


def test_group_advantages_follow_the_order_of_samples_and_leave_their_argument_alone():
    scores = torch.tensor([3.0, 1.0, math.nan, 0.0, 5.0, 5.0, 2.0, 1.0])
    before, order = scores.clone(), torch.tensor([2, 0, 3, 1])
    want = grpo.group_advantages(scores, 4)
    shuffled = torch.cat([order, 4 + order])
    torch.testing.assert_close(grpo.group_advantages(scores[shuffled], 4), want[shuffled])
    torch.testing.assert_close(grpo.group_advantages(scores.roll(4), 4), want.roll(4, 0))  # groups do not mix
    torch.testing.assert_close(scores, before, equal_nan=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [True, False])
def test_rloo_advantage_is_the_score_minus_the_mean_of_the_others(seed, scale):
    """Never divided by a spread; a missing score is nobody's other."""
    scores = torch.rand(12, generator=torch.Generator().manual_seed(seed)).tolist()
    scores[seed] = None
    got = grpo.group_advantages(torch.tensor([math.nan if s is None else s for s in scores]), 4, scale, kind="rloo")
    for i, score in enumerate(scores):
        others = [scores[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i and scores[j] is not None]
        assert got[i, 0].item() == pytest.approx(0.0 if score is None else score - mean(others), abs=1e-6)


def test_batch_advantage_is_divided_by_the_spread_that_is_handed_in():
    scores = torch.tensor([1.0, 0.0, 3.0, 5.0, 2.0, 2.0])
    got = grpo.group_advantages(scores, 2, kind="batch", batch_std=1.7)
    assert got[:, 0].tolist() == pytest.approx([x / (1.7 + 1e-4) for x in (0.5, -0.5, -1, 1, 0, 0)], rel=1e-6)
    unscaled = grpo.group_advantages(scores, 2, False, kind="batch", batch_std=1.7)
    assert unscaled[:, 0].tolist() == [0.5, -0.5, -1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["rloo", "batch"])
def test_equal_scores_give_exactly_zero_in_every_kind(kind):
    assert (grpo.group_advantages(torch.full((8,), 0.1), 8, kind=kind, batch_std=1e-9) == 0).all()


def test_groups_with_equal_scores():
    nan = math.nan
    scores = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1e-7, nan, nan, nan, nan, 2.0, nan, nan, 2.0, 2.1])
    assert grpo.has_equal_scores(scores, 3).tolist() == [True, False, True, True, False]


def test_groups_with_equal_steps_where_rewards_are_lists():
    """Equal sums of other steps, equal steps with another sum, and plain scores, of two completions each."""
    dense = [[1.0, -1.0], [-1.0, 1.0], [1.0, None], [1.0, 1.0], [None, 2.0], [None, 2.0], [None, 2.0], [None, 1.0]]
    rollout = common.rollout_of([[1]] * 8, [[2, 2]] * 8, torch.device("cpu"), [0, 0, 1, 1, 2, 2, 3, 3])
    step_rewards, step_ends = common.dense_table(dense, rollout)
    advantages = grpo.process_advantages(step_rewards, 2, step_ends)
    assert grpo.without_advantage(advantages, 2).tolist() == [False, True, True, False]
    advantages = grpo.group_advantages(step_rewards.sum(dim=1), 2)
    assert grpo.without_advantage(advantages, 2).tolist() == [True, False, True, False]


def test_overlong_penalty_falls_over_the_buffer():
    got = grpo.overlong_penalty(torch.tensor([1, 80, 81, 90, 99, 100]), 100, 20)
    assert got.tolist() == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1])


def test_importance_weights_are_capped_and_have_no_gradient():
    old = torch.tensor([-1.0, -1.0, -5.0, 0.0], requires_grad=True)
    got = grpo.importance_weights(old, torch.tensor([-1.0, -1.5, -1.0, -90.0]), 2.0)
    assert got.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-4), 2.0]) and not got.requires_grad


# ---------------------------------------------------------------- process supervision


def brute_process_advantages(rewards, group_size):
    advantages = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        steps = [x for row in group for x in row if x != 0]
        for row in group:
            same = len(set(steps)) <= 1
            normalised = [0.0 if x == 0 or same else (x - mean(steps)) / (sample_std(steps) + 1e-4) for x in row]
            advantages.append([math.fsum(normalised[t:]) for t in range(len(row))])
    return advantages


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_process_advantages_equal_brute_force(seed, group_size):
    draw = random.Random(seed)
    rewards = [[draw.choice([0.0, 0.0, draw.gauss(0, 1)]) for _ in range(6)] for _ in range(3 * group_size)]
    for row in rewards[:group_size]:
        row[:] = [0.0] * 6  # a group without any step
    for row in rewards[group_size : 2 * group_size]:
        row[:] = [0.1 if x else 0.0 for x in row]  # equal steps
    got = grpo.process_advantages(torch.tensor(rewards), group_size)
    for row, want in zip(got.tolist(), brute_process_advantages(rewards, group_size), strict=True):
        assert row == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert (got[: 2 * group_size] == 0).all()


def test_process_advantages_by_hand():
    """Steps 1, 2, 3 have mean 2 and standard deviation 1; a token gets what ends at it or after it."""
    got = grpo.process_advantages(torch.tensor([[0.0, 1.0, 0.0, 3.0], [2.0, 0.0, 0.0, 0.0]]), 2)
    one = 1 / (1 + 1e-4)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, one, one], [0.0, 0.0, 0.0, 0.0]]), atol=1e-6, rtol=0)


def test_a_step_that_ends_with_a_reward_of_0_counts():
    """Steps 0 and 2 have mean 1 and standard deviation sqrt 2."""
    rewards, ends = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[False, True], [False, True]])
    got = grpo.process_advantages(rewards, 2, ends)
    one = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([[-one, -one], [one, one]]), atol=1e-6, rtol=0)
    assert (grpo.process_advantages(rewards, 2) == 0).all()


# ---------------------------------------------------------------- ratio, surrogate, clip


@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_policy_ratio_equals_brute_force_and_stays_finite(spread, per_sequence):
    step = random_step(3, spread)
    logprobs, old, _, _, mask = step.padded()
    got = grpo.policy_ratio(logprobs, old, mask, per_sequence)
    assert got.shape == ((7, 1) if per_sequence else logprobs.shape) and got.isfinite().all()
    for i, (new_row, old_row) in enumerate(zip(step.logprobs, step.old)):
        logs = [clamp(a - b, -20, 20) for a, b in zip(new_row, old_row)]
        if per_sequence:
            assert got[i, 0].item() == pytest.approx(math.exp(mean(logs)) if logs else 1.0, rel=1e-4)
        else:
            assert got[i, : len(logs)].tolist() == pytest.approx([math.exp(x) for x in logs], rel=1e-4)


def test_first_minibatch_has_ratio_one_exactly():
    logprobs, _, _, _, mask = random_step(0).padded()
    for per_sequence in (False, True):
        assert (grpo.policy_ratio(logprobs, logprobs, mask, per_sequence) == 1).all()


@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.2, 0.28), (3e-4, 4e-4), (math.inf, math.inf), (math.inf, 0.2), (0.0, 0.0)])
def test_surrogate_and_clip_equal_brute_force(clip_low, clip_high):
    ratios = [1e-9, 0.5, 0.79, 0.8, 0.81, 0.9996, 1.0, 1.0003, 1.1, 1.2, 1.21, 1.29, 7.0, math.exp(20)]
    advantages = [-3.0, -0.1, 0.0, 0.1, 2.0]
    ratio, advantage = torch.tensor(ratios)[None], torch.tensor(advantages)[:, None]
    loss = grpo.surrogate_loss(ratio, advantage, clip_low, clip_high)
    bound = grpo.is_clipped(ratio, advantage, clip_low, clip_high)
    assert loss.isfinite().all() and bound.dtype == torch.float32
    for i, a in enumerate(advantages):
        for j, rho in enumerate(ratio[0].double().tolist()):
            want = -min(rho * a, clamp(rho, 1 - clip_low, 1 + clip_high) * a)
            assert loss[i, j].item() == pytest.approx(want, rel=1e-6, abs=1e-9)
            binds = (rho > 1 + clip_high and a > 0) or (rho < 1 - clip_low and a < 0)
            if min(abs(rho - 1 - clip_high), abs(rho - 1 + clip_low)) > 1e-6:  # else a matter of rounding
                assert bound[i, j].item() == binds


def test_clip_binds_exactly_where_the_gradient_is_zero():
    ratio = torch.linspace(0.5, 1.5, 401).repeat(2, 1).requires_grad_()
    advantages = torch.tensor([[1.0], [-1.0]])
    grpo.surrogate_loss(ratio, advantages, 0.2, 0.28).sum().backward()
    edge = ((ratio - 0.8).abs() < 1e-4) | ((ratio - 1.28).abs() < 1e-4)
    bound = grpo.is_clipped(ratio, advantages, 0.2, 0.28).bool()
    assert torch.equal(bound[~edge], (ratio.grad == 0)[~edge])
    assert 0 < bound.sum() < bound.numel()


def test_without_a_clip_the_surrogate_is_the_plain_policy_gradient():
    ratio, advantages = torch.tensor([[0.01, 1.0, 300.0]]), torch.tensor([[2.0], [-2.0]])
    torch.testing.assert_close(grpo.surrogate_loss(ratio, advantages, math.inf, math.inf), -ratio * advantages)
    assert (grpo.is_clipped(ratio, advantages, math.inf, math.inf) == 0).all()


def test_cispo_clips_the_weight_but_never_the_gradient():
    ratio, logprobs = torch.tensor([[0.01, 1.0, 1.19, 1.5, 300.0]]), torch.full((1, 5), -0.7, requires_grad=True)
    loss = grpo.cispo_loss(ratio.requires_grad_(), torch.tensor([[2.0]]), logprobs, 0.2)
    loss.sum().backward()
    weights = [0.01, 1.0, 1.19, 1.2, 1.2]
    assert logprobs.grad[0].tolist() == pytest.approx([-2 * w for w in weights])
    assert loss[0].tolist() == pytest.approx([1.4 * w for w in weights])
    assert ratio.grad is None


# ---------------------------------------------------------------- KL to the reference


def test_kl_fixture():
    k1 = torch.tensor([0.5])
    got = {name: grpo.kl_estimate(k1, torch.zeros(1), name).item() for name in ("k1", "k2", "k3")}
    assert got == pytest.approx({"k1": 0.5, "k2": 0.125, "k3": 0.1065}, abs=1e-4)


@pytest.mark.parametrize("difference", [-1000.0, -20.1, -20.0, -3.0, -1e-3, 0.0, 0.2, 19.0, 20.0, 50.0])
def test_kl_estimators_equal_brute_force_up_to_the_clamp_before_exp(difference):
    clamped = clamp(difference, -20.0, 20.0)
    want = {"k1": difference, "k2": difference**2 / 2, "k3": math.exp(-clamped) + clamped - 1}
    for name, value in want.items():
        got = grpo.kl_estimate(torch.tensor([difference]), torch.zeros(1), name).item()
        assert got == pytest.approx(value, rel=1e-5, abs=2e-7)
        assert name == "k1" or got >= 0


def test_kl_estimators_average_to_the_kl_of_two_distributions():
    """Exactly: each estimator's expectation under the policy, over a vocabulary of 6. k2 is biased, and near only."""
    policy, reference = torch.randn(6).log_softmax(-1), torch.randn(6).log_softmax(-1)
    kl = float((policy.exp() * (policy - reference)).sum())
    expectation = {name: float((policy.exp() * grpo.kl_estimate(policy, reference, name)).sum()) for name in ("k1", "k3")}
    assert expectation == pytest.approx({"k1": kl, "k3": kl}, abs=1e-5)
    near = (policy + 0.01 * torch.randn(6)).log_softmax(-1)
    kl = float((policy.exp() * (policy - near)).sum())
    assert float((policy.exp() * grpo.kl_estimate(policy, near, "k2")).sum()) == pytest.approx(kl, rel=0.05)


def test_gradients_of_the_kl_estimators_as_losses():
    """Over tokens drawn from the policy: k1's is 0, k2's is the KL's, and k3's comes near that where the policies are near."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, generator=generator).requires_grad_()
    reference = (logits.detach() + 0.05 * torch.randn(7, dtype=torch.float64, generator=generator)).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (want,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    distance = {}
    for name in ("k1", "k2", "k3"):
        expected_loss = (logprobs.detach().exp() * grpo.kl_estimate(logprobs, reference, name)).sum()
        (got,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
        distance[name] = float((got - want).norm() / want.norm())
    assert distance["k1"] == pytest.approx(1, abs=1e-9) and distance["k2"] < 1e-9 and 1e-4 < distance["k3"] < 0.2


# ---------------------------------------------------------------- the loss of a step, and its gradient


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kl_coef, estimator", [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_loss_of_a_step_and_its_gradient_equal_brute_force(loss, seed, kl_coef, estimator):
    step = random_step(seed, spread=0.002 if loss == "gspo" else 0.5)  # so that some are clipped and some are not
    case = (step, loss, *defaults(loss), kl_coef, estimator)
    want = brute_loss(*case)
    assert_same(scripts_loss(*case, dtype=torch.float64), want, 1e-6)
    assert_same(scripts_loss(*case, dtype=torch.float32), want, 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_some_tokens_of_those_steps_are_clipped_and_some_are_not(loss):
    clipped = []
    for seed in range(6):
        step = random_step(seed, spread=0.002 if loss == "gspo" else 0.5)
        logprobs, old, _, advantages, mask = step.padded()
        ratio = grpo.policy_ratio(logprobs, old, mask, loss == "gspo")
        clipped += (grpo.is_clipped(ratio, advantages, *defaults(loss)) * mask)[mask].tolist()
    assert 0.05 < mean(clipped) < 0.95


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [15.0, 100.0])
def test_extreme_log_differences_keep_loss_and_gradient_finite_and_right(loss, spread):
    """Differences of 20 and beyond are clamped: their value counts, and they get no gradient."""
    case = (random_step(11, spread), loss, *defaults(loss), 0.1, "k3")
    got, want = scripts_loss(*case, dtype=torch.float64), brute_loss(*case)
    assert math.isfinite(got[0]) and all(math.isfinite(x) for row in got[1] for x in row)
    assert_same(got, want, 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("clip_low, clip_high", [(math.inf, math.inf), (0.0, 0.0), (0.5, 0.1)])
def test_other_clips(loss, clip_low, clip_high):
    case = (random_step(5), loss, clip_low, clip_high)
    assert_same(scripts_loss(*case, dtype=torch.float64), brute_loss(*case), 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_order_and_padding_change_neither_loss_nor_gradient(loss):
    step = random_step(2)
    case = (step, loss, *defaults(loss), 0.2, "k3")
    whole = scripts_loss(*case)
    for parts in ([[i] for i in range(7)], [[0, 1, 2], [3, 4, 5, 6]], [[6, 3, 1], [0, 5], [4, 2]]):
        assert_same(scripts_loss(*case, parts=parts), whole, 1e-6)
    assert_same(scripts_loss(*case, columns=13), whole, 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sequence_with_an_empty_mask_counts_in_no_denominator(loss):
    step = random_step(4, empty=False)
    with_empty = Step(*([*lists, []] for lists in (step.logprobs, step.old, step.ref)), [*step.advantages, 9.0], step.max_new_tokens)
    got, want = scripts_loss(with_empty, loss, *defaults(loss)), scripts_loss(step, loss, *defaults(loss))
    assert_same((got[0], got[1][:-1]), want, 1e-6)


@GRID
@given(st.integers(0, 10**6), st.sampled_from(LOSSES), st.integers(2, 9), st.integers(1, 8))
def test_token_weights_add_up_to_what_the_paper_divides_by(seed, loss, size, longest):
    step = random_step(seed, size=size, longest=longest)
    *_, mask = step.padded()
    lengths = [len(row) for row in step.old]
    sequences, tokens = sum(n > 0 for n in lengths), sum(lengths)
    weights = grpo.token_weights(loss, mask, sequences, tokens, step.max_new_tokens)
    assert weights.shape == mask.shape and (weights[~mask] == 0).all()
    assert weights.sum().item() == pytest.approx(tokens / (sequences * step.max_new_tokens) if loss == "dr_grpo" else 1.0, rel=1e-5)
    for row, n in zip(weights, lengths):
        each = {"dr_grpo": 1 / (sequences * step.max_new_tokens), "dapo": 1 / tokens, "cispo": 1 / tokens}
        assert row[:n].tolist() == pytest.approx([each.get(loss, 1 / (sequences * max(n, 1)))] * n, rel=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_on_policy_single_tokens_give_the_reinforce_gradient(loss):
    """With ratio 1 and completions of one token all these losses are -mean A: gradient -A / B."""
    advantages = [1.5, -0.5, 0.25, 0.0]
    step = Step([[-1.0]] * 4, [[-1.0]] * 4, [[-1.0]] * 4, advantages, 5)
    total, gradient = scripts_loss(step, loss, *defaults(loss))
    assert total == pytest.approx(-mean(advantages)) and [row[0] for row in gradient] == pytest.approx([-a / 4 for a in advantages])


def test_long_and_short_answers_weigh_as_each_paper_has_it():
    """Lengths 1 and 4, one advantage, ratio 1: the long answer's share of the gradient."""
    step = Step([[-1.0], [-1.0] * 4], [[-1.0], [-1.0] * 4], [[-1.0], [-1.0] * 4], [1.0, 1.0], 8)
    share = {}
    for loss in LOSSES:
        _, (short, long) = scripts_loss(step, loss, *defaults(loss))
        share[loss] = sum(long) / (sum(long) + sum(short))
    assert share == pytest.approx({"grpo": 0.5, "gspo": 0.5, "dapo": 0.8, "cispo": 0.8, "dr_grpo": 0.8})


@pytest.mark.parametrize("loss, want", [("grpo", (0.2, 0.2, True)), ("dr_grpo", (0.2, 0.2, False)), ("dapo", (0.2, 0.28, True)), ("gspo", (3e-4, 4e-4, True)), ("cispo", (math.inf, 0.2, True))])
def test_defaults_are_those_of_the_papers(loss, want):
    assert grpo.LOSS_DEFAULTS[loss] == want
