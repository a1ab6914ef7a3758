"""ppo.py's mathematics against brute force in float64, written from the papers' formulas."""

import math

import pytest
import torch

import common
import ppo

MASKS = {"ragged": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], "full": [[1, 1, 1], [1, 1, 1]]}


def example(mask, seed=0):
    mask = torch.tensor(mask, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask for _ in range(3)]
    return mask, *tables


def brute_gae(rewards, values, length, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} for one sequence, term by term (eq. 16 of arXiv:1506.02438)."""
    value = lambda t: values[t] if t < length else 0.0  # noqa: E731
    delta = [rewards[t] + gamma * value(t + 1) - value(t) for t in range(length)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas_to_the_last_valid_token(mask, gamma, lam):
    mask, rewards, values, _ = example(mask)
    got = ppo.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(mask.sum(1).tolist()):
        want = brute_gae(rewards[b].tolist(), values[b].tolist(), length, gamma, lam)
        assert got[b, :length].tolist() == pytest.approx(want, abs=1e-12)
        assert (got[b, length:] == 0).all()


def test_gae_without_values_and_discount_is_the_sum_of_rewards_still_to_come():
    mask, rewards, values, _ = example(MASKS["full"])
    got = ppo.gae(rewards, torch.zeros_like(values), mask, 1.0, 1.0)
    assert torch.allclose(got, rewards.flip(1).cumsum(1).flip(1))


def test_gae_with_lambda_1_plus_values_is_the_return_whatever_the_critic():
    mask, rewards, values, _ = example(MASKS["ragged"])
    returns = ppo.gae(rewards, values, mask, 0.9, 1.0) + values
    again = ppo.gae(rewards, 5 * values + mask, mask, 0.9, 1.0) + 5 * values + mask
    assert torch.allclose(returns, again)


def test_gae_of_whole_numbers_is_not_rounded_to_whole_numbers():
    got = ppo.gae(torch.tensor([[0, 0, 1]]), torch.tensor([[0.25, 0.5, 0.5]]), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert got.tolist() == [[0.75, 0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_score_sits_on_the_last_valid_token(dtype):
    mask = torch.tensor(MASKS["ragged"], dtype=dtype)
    got = ppo.on_last_token(torch.tensor([1.0, -2.0, 3.0, math.nan]), mask)
    assert got.tolist() == [[0, 0, 0, 1], [0, -2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]]


def test_kl_of_tokens_sums_to_the_log_ratio_of_the_sequence():
    mask, logprobs, ref_logprobs, _ = example(MASKS["ragged"])
    total = (ppo.kl_estimate(logprobs, ref_logprobs) * mask).sum(dim=1)
    want = logprobs.exp().log().sum(dim=1) - ref_logprobs.sum(dim=1)
    assert torch.allclose(total, want, atol=1e-6)


@pytest.mark.parametrize("estimator, want", [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_kl_estimators_by_hand_and_bounded(estimator, want):
    assert ppo.kl_estimate(torch.tensor(0.5), torch.tensor(0.0), estimator).item() == pytest.approx(want, abs=1e-6)
    assert ppo.kl_estimate(torch.tensor(-500.0), torch.tensor(0.0), estimator).isfinite()


def test_whitening_gives_mean_0_and_sample_variance_1_under_the_mask():
    mask, x, _, _ = example(MASKS["ragged"])
    valid = (3 * x + 7)[mask]
    got = ppo.whiten(3 * x + 7, mask, valid.mean(), valid.var())
    want = (valid - valid.mean()) / math.sqrt(valid.var().item() + 1e-8)
    assert torch.allclose(got[mask], want) and (got[~mask] == 0).all()
    assert got[mask].mean().item() == pytest.approx(0, abs=1e-12) and got[mask].var().item() == pytest.approx(1, abs=1e-6)


def test_whitening_of_equal_numbers_is_0():
    """Their mean is off by a rounding error, which a division by 1e-4 would make a signal."""
    x, mask = torch.full((256, 37), 0.7), torch.ones(256, 37, dtype=torch.bool)
    mean = x.mean() + 1e-7
    assert (ppo.whiten(x, mask, mean, (x - mean).square().mean()) == 0).all()


@pytest.mark.parametrize("eps", [0.2, math.inf])
def test_value_loss_is_the_larger_of_clipped_and_unclipped(eps):
    _, values, old, returns = example(MASKS["full"])
    got = ppo.value_loss(values, old, returns, eps)
    for v, o, r, loss in zip(*(x.flatten().tolist() for x in (values, old, returns, got))):
        clipped = min(max(v, o - eps), o + eps)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (clipped - r) ** 2))


def test_value_loss_has_no_gradient_where_the_clip_binds_and_the_clipped_value_is_farther_off():
    values = torch.tensor([[1.0, 0.1]], requires_grad=True)
    ppo.value_loss(values, torch.zeros(1, 2), torch.tensor([[1.2, 1.2]]), 0.2).sum().backward()
    assert values.grad[0, 0] == 0 and values.grad[0, 1] == pytest.approx(0.1 - 1.2)


def test_values_count_as_clipped_where_they_get_no_gradient():
    """Not all that have left the range: one that is farther from its return than the clipped one still learns."""
    values = torch.tensor([[1.0, 0.1, 1.0, -0.5, -0.5]], requires_grad=True)
    old, returns = torch.zeros(1, 5), torch.tensor([[1.2, 1.2, 0.3, 0.3, -0.4]])
    loss, unclipped = ppo.value_loss(values, old, returns, 0.2), 0.5 * (values - returns).square()
    loss.sum().backward()
    assert (loss > unclipped).tolist() == (values.grad == 0).tolist() == [[True, False, False, False, True]]
    assert torch.equal(ppo.value_loss(values, old, returns, math.inf), unclipped)


@pytest.mark.parametrize("log_ratio", [-30.0, -0.5, -0.1, 0.0, 0.1, 0.5, 30.0])
@pytest.mark.parametrize("advantage", [-1.5, 2.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.3), (math.inf, math.inf)])
def test_surrogate_is_the_smaller_gain_and_has_no_gradient_where_the_clip_binds(log_ratio, advantage, low, high):
    logprob = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    ratio = ppo.policy_ratio(logprob, torch.zeros(1, 1, dtype=torch.float64))
    loss = ppo.surrogate_loss(ratio, torch.tensor([[advantage]]), low, high)
    loss.sum().backward()
    rho = math.exp(min(max(log_ratio, -20), 20))
    clipped = min(max(rho, 1 - low), 1 + high)
    assert loss.item() == pytest.approx(-min(rho * advantage, clipped * advantage))
    binds = (advantage > 0 and rho > 1 + high) or (advantage < 0 and rho < 1 - low)
    assert ppo.is_clipped(ratio.detach(), torch.tensor([[advantage]]), low, high).item() == binds
    assert (logprob.grad.item() == 0) == (binds or abs(log_ratio) > 20)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--kl-target 6 --kl-coef 0", "--kl-target: with --kl-coef 0"),
        ("--kl-target 6 --kl-horizon 51.2", "--kl-horizon 51.2: with 256 completions a step it has to be above 51.2"),
        ("--kl-target 6 --kl-horizon 51.3", None),
        ("--kl-coef 0", None),
        ("--baseline none --critic-model x", "--critic-model: with --baseline none"),
    ],
)
def test_kl_control_that_could_not_work_is_refused(flags, named):
    args = common.parse_args(ppo.Args, flags.split())
    if named is None:
        return ppo.check_flags(args)
    with pytest.raises(common.UserError, match=named):
        ppo.main(args)


def test_adaptive_kl_coefficient_is_bounded_proportional_control():
    assert ppo.adapted_kl_coef(0.1, kl=math.nan, target=6.0, batch=64, horizon=1000) == 0.1
    assert ppo.adapted_kl_coef(0.1, kl=6.0, target=6.0, batch=64, horizon=1000) == pytest.approx(0.1)
    assert ppo.adapted_kl_coef(0.1, kl=6.6, target=6.0, batch=64, horizon=1000) == pytest.approx(0.1 * (1 + 0.1 * 0.064))
    assert ppo.adapted_kl_coef(0.1, kl=60.0, target=6.0, batch=64, horizon=1000) == pytest.approx(0.1 * (1 + 0.2 * 0.064))
    assert ppo.adapted_kl_coef(0.1, kl=0.0, target=6.0, batch=64, horizon=1000) == pytest.approx(0.1 * (1 - 0.2 * 0.064))
