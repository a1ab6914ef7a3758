"""What the two `main`s make of the mathematics: numbers recorded in short real runs, against plain loops over the formulas."""

import dataclasses
import math
import statistics

import pytest
import torch
from test_grpo_math import Step, brute_loss
from test_ppo_math import brute_gae

import common
import grpo
import ppo

REWARDS = """
def length(completion_ids, **_):
    return [sum(ids) / 10 for ids in completion_ids]

def some(completion_ids, prompts, **_):  # none for a third of the prompts, none for some completions of the others
    return [None if int(prompt[0]) % 3 == 0 or ids[0] % 5 == 0 else sum(ids) / 10 for ids, prompt in zip(completion_ids, prompts)]

def equal(completions, **_):
    return [0.1] * len(completions)

def lists(completion_ids, **_):
    return [[0.0, *(token / 10 for token in ids[1:])] for ids in completion_ids]
"""
FLAGS = "--dataset addition --steps 2 --prompts-per-step 8 --max-new-tokens 4 --eval-prompts 4 --device cpu --temperature 1.5 --warmup-steps 0"
LARGE_STEPS = "--update-epochs 2 --num-minibatches 2 --learning-rate 0.03"  # so that clips bind in both directions


@dataclasses.dataclass
class Recorded:
    """Of a run: each pass of the loss over a minibatch, each whole rollout at the end of its step, what was logged and called."""

    updates: list = dataclasses.field(default_factory=list)  # (minibatch, loss of all models, log-probs (b, C), values or None)
    rollouts: list = dataclasses.field(default_factory=list)
    metrics: list = dataclasses.field(default_factory=list)  # one dict a step
    calls: list = dataclasses.field(default_factory=list)  # of refresh, evaluate and clip_and_step, with arguments


@pytest.fixture
def train(script, monkeypatch, tiny_folder, tmp_path):
    """A run of a script with these flags: Recorded."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def call(module, flags):
        recorded, fresh = Recorded(), []

        def update(run, loss_of, minibatch, models, *_):
            fresh.clear()
            with torch.no_grad(), run.autocast():
                loss = float(loss_of(minibatch))
            if isinstance(models[0], common.Critic):  # whose turn comes after the policy's
                policys, policy_loss, logprobs, _ = recorded.updates.pop()
                assert policys is minibatch
                recorded.updates.append((minibatch, policy_loss + loss, logprobs, fresh[0]))
            else:
                recorded.updates.append((minibatch, loss, fresh[0][0], None))

        def call_of(name):
            return lambda *args: recorded.calls.append((name, args))

        with monkeypatch.context() as patch:

            def before(owner, name, see):
                """From here on `see` gets the arguments of each call, before it happens."""
                function = getattr(owner, name)
                patch.setattr(owner, name, lambda *args, **kwargs: see(*args, **kwargs) or function(*args, **kwargs))

            for name in ("completion_logprobs", "completion_values"):
                function = getattr(common, name)
                keep = lambda *args, function=function, **kwargs: fresh.append(function(*args, **kwargs)) or fresh[-1]  # noqa: E731
                patch.setattr(common, name, keep)
            before(common, "accumulate_gradients", update)
            before(common, "step_metrics", lambda run, rollout, *_: recorded.rollouts.append(rollout))
            before(common.Run, "log", lambda run, step, metrics: recorded.metrics.append(metrics) if step else None)
            for owner, name in ((common.Sampler, "refresh"), (common, "evaluate"), (common, "clip_and_step")):
                before(owner, name, call_of(name))
            flags = f"{FLAGS} --model {tiny_folder} {'--group-size' if module is grpo else '--samples-per-prompt'} 4 {flags}"
            assert script(*flags.split(), module=module) == 0
        return recorded

    return call


def rows(table, rollout):
    """The valid cells of a (B, C) table."""
    return [row[:n].tolist() for row, n in zip(table, rollout.lengths.tolist())]


def flat(table, rollout):
    return [x for row in rows(table, rollout) for x in row]


def k3(new, old):
    """The estimate of KL(new || old)."""
    return math.exp(old - new) - (old - new) - 1


# ---------------------------------------------------------------- GRPO


@pytest.mark.parametrize("loss", list(grpo.LOSS_DEFAULTS))
def test_loss_and_metrics_of_grpo(train, loss):
    """With completions that no reward applies to, asymmetric clips, another estimator, and steps that leave the old policy."""
    low = math.inf if loss == "cispo" else 0.03
    reward = "--reward rewards.py:some --eval-reward exact"
    got = train(grpo, f"--loss {loss} --clip-low {low} --clip-high 0.01 --kl-coef 0.7 --kl-estimator k2 {reward} {LARGE_STEPS}")
    assert len(got.updates) == 2 * 2 * 2 and any(0 in rollout.lengths for rollout in got.rollouts)
    bounds, per_step = [], []
    for minibatch, loss_of_step, logprobs, _ in got.updates:
        new, old, ref = (rows(x, minibatch) for x in (logprobs, minibatch.old_logprobs, minibatch.ref_logprobs))
        advantages = minibatch.advantages[:, 0].tolist()
        want, _ = brute_loss(Step(new, old, ref, advantages, 4), loss, low, 0.01, 0.7, "k2")
        assert loss_of_step == pytest.approx(want, rel=1e-4, abs=1e-6)
        clipped, policy_losses = [], []
        for a, b, advantage in zip(new, old, advantages):
            ratios = [math.exp(x - y) for x, y in zip(a, b)]
            ratios = [math.exp(statistics.mean(map(math.log, ratios)))] * len(a) if loss == "gspo" and a else ratios
            if loss == "cispo":
                clipped += [ratio > 1.01 for ratio in ratios]
                policy_losses += [-min(ratio, 1.01) * advantage * x for ratio, x in zip(ratios, a)]
            else:
                clipped += [advantage > 0 and ratio > 1.01 or advantage < 0 and ratio < 0.97 for ratio in ratios]
                policy_losses += [-min(ratio * advantage, min(max(ratio, 0.97), 1.01) * advantage) for ratio in ratios]
            bounds += ratios
        approx_kls = [k3(y, x) for a, b in zip(new, old) for x, y in zip(a, b)]
        per_step.append((clipped, policy_losses, approx_kls))
    assert min(bounds) < 0.97 and max(bounds) > 1.01
    for step, (rollout, metrics) in enumerate(zip(got.rollouts, got.metrics)):
        for i, name in enumerate(("losses/clipfrac", "losses/policy_loss", "losses/approx_kl")):
            of_all = [x for parts in per_step[4 * step : 4 * step + 4] for x in parts[i]]
            assert metrics[name] == pytest.approx(statistics.mean(of_all), rel=1e-3, abs=1e-6), name
        new, ref = rows(rollout.sampler_logprobs, rollout), rows(rollout.ref_logprobs, rollout)
        assert metrics["objective/kl"] == pytest.approx(statistics.mean(k3(x, y) for a, b in zip(new, ref) for x, y in zip(a, b)), rel=1e-3, abs=1e-6)
        assert metrics["objective/kl_seq"] == pytest.approx(statistics.mean(sum(a) - sum(b) for a, b in zip(new, ref) if a), rel=1e-3, abs=1e-5)
        groups = [rollout.advantages[i : i + 4, 0].tolist() for i in range(0, len(rollout), 4)]
        assert metrics["reward/frac_zero_std"] == pytest.approx(statistics.mean(not any(group) for group in groups))
        assert 0 < metrics["reward/frac_zero_std"] < 1


@pytest.mark.parametrize("flags", ["", "--no-scale-rewards", "--advantage rloo", "--advantage batch", "--loss dr_grpo"])
def test_advantages_of_grpo(train, flags):
    got = train(grpo, f"--kl-coef 0 --reward rewards.py:length {flags}")
    for rollout in got.rollouts:
        scores = rollout.scores.tolist()
        for i in range(0, len(scores), 4):
            group = scores[i : i + 4]
            want = [score - statistics.mean(group) for score in group]
            if "rloo" in flags:
                want = [score - (sum(group) - score) / 3 for score in group]
            elif flags in ("", "--advantage batch"):
                spread = statistics.stdev(scores if flags else group)
                want = [x / (spread + 1e-4) for x in want]
            assert rollout.advantages[i : i + 4, 0].tolist() == pytest.approx(want, abs=1e-5)


def test_the_overlong_penalty_lowers_scores(train):
    """Of 0.1 each: of four tokens the last two are the buffer, which costs half a point and a whole one."""
    got = train(grpo, "--overlong-buffer 2 --reward rewards.py:equal --eval-reward exact --kl-coef 0")
    assert {n for rollout in got.rollouts for n in rollout.lengths.tolist()} == {1, 2, 3, 4}
    for rollout in got.rollouts:
        want = [0.1 - {3: 0.5, 4: 1.0}.get(n, 0.0) for n in rollout.lengths.tolist()]
        assert rollout.scores.tolist() == pytest.approx(want)


def test_the_reference_is_renewed_every_so_many_steps(train):
    """After step 2 of 2, which the KL of neither shows, and after step 1, which that of step 2 does."""
    for refresh, is_renewed in ((2, False), (1, True)):
        got = train(grpo, f"--ref-refresh {refresh} --kl-coef 0.1 --reward rewards.py:length --output-dir run{refresh} {LARGE_STEPS}")
        assert (got.metrics[1]["objective/kl"] < 1e-5) == is_renewed


# ---------------------------------------------------------------- PPO


@pytest.mark.parametrize("baseline", ["critic", "none"])
@pytest.mark.parametrize("reward", ["some", "lists"])
def test_returns_and_advantages_of_ppo(train, baseline, reward):
    """Without a critic nothing is whitened and lambda is 1, whatever the flags say."""
    rewards = f"--reward rewards.py:{reward} --eval-reward exact --truncation-penalty 2 --kl-coef 0.3 --kl-estimator k2"
    whiten = "false" if baseline == "critic" else "true"
    flags = f"--baseline {baseline} --whiten-advantages {whiten} --gamma 0.9 --gae-lambda 0.5 --critic-learning-rate 0.1"
    got = train(ppo, f"{rewards} {flags} {LARGE_STEPS}")
    rollout = got.rollouts[1]
    assert (float(rollout.values.abs().max()) > 0) == (baseline == "critic")
    assert rollout.truncated.any() and not rollout.truncated.all() and (reward == "lists") == (0 not in rollout.lengths)
    totals = []
    for b, n in enumerate(rollout.lengths.tolist()):
        if n == 0:
            continue
        kl = [(x - y) ** 2 / 2 for x, y in zip(rollout.old_logprobs[b, :n].tolist(), rollout.ref_logprobs[b, :n].tolist())]
        ids = rollout.completion_ids[b, :n].tolist()
        paid = [0.0, *(token / 10 for token in ids[1:])] if reward == "lists" else [*[0.0] * (n - 1), sum(ids) / 10]
        paid[-1] -= 2 * float(rollout.truncated[b])
        paid = [x - 0.3 * y for x, y in zip(paid, kl)]
        totals.append(sum(paid))
        values = rollout.values[b].tolist()
        want = brute_gae(paid, values, n, 0.9, 0.5 if baseline == "critic" else 1.0)
        assert rollout.advantages[b, :n].tolist() == pytest.approx(want, abs=1e-4)
        assert rollout.returns[b, :n].tolist() == pytest.approx([a + v for a, v in zip(want, values)], abs=1e-4)
    assert got.metrics[1]["objective/rlhf_reward"] == pytest.approx(statistics.mean(totals), rel=1e-4)
    if baseline == "critic":
        returns, values = flat(rollout.returns, rollout), flat(rollout.values, rollout)
        want = 1 - statistics.variance([a - b for a, b in zip(returns, values)]) / statistics.variance(returns)
        assert got.metrics[1]["losses/explained_variance"] == pytest.approx(want, rel=1e-3)


def test_advantages_of_ppo_are_whitened(train):
    got = train(ppo, f"--whiten-advantages true --reward rewards.py:length {LARGE_STEPS}")
    for rollout in got.rollouts:
        raw, whitened = (flat(x, rollout) for x in (rollout.returns - rollout.values, rollout.advantages))
        mean, spread = statistics.mean(raw), statistics.stdev(raw)
        assert whitened == pytest.approx([(x - mean) / spread for x in raw], rel=1e-3, abs=1e-4)


def test_loss_and_metrics_of_ppo(train):
    flags = "--clip-low 0.03 --clip-high 0.01 --value-clip 0.02 --value-coef 3 --kl-coef 0 --critic-learning-rate 0.01"
    got = train(ppo, f"{flags} --reward rewards.py:some --eval-reward exact {LARGE_STEPS}")
    per_step, ratios = [], []
    for minibatch, loss, logprobs, values in got.updates:
        columns = (logprobs, minibatch.old_logprobs, minibatch.advantages, values, minibatch.values, minibatch.returns)
        tokens = list(zip(*(flat(x, minibatch) for x in columns)))
        parts = {"policy_loss": [], "value_loss": [], "clipfrac": [], "vf_clipfrac": [], "approx_kl": []}
        for new, old, advantage, value, old_value, target in tokens:
            ratio, clipped_value = math.exp(new - old), min(max(value, old_value - 0.02), old_value + 0.02)
            parts["policy_loss"].append(-min(ratio * advantage, min(max(ratio, 0.97), 1.01) * advantage))
            parts["value_loss"].append(0.5 * max((value - target) ** 2, (clipped_value - target) ** 2))
            parts["clipfrac"].append(advantage > 0 and ratio > 1.01 or advantage < 0 and ratio < 0.97)
            parts["vf_clipfrac"].append((clipped_value - target) ** 2 > (value - target) ** 2)
            parts["approx_kl"].append(k3(old, new))
            ratios.append(ratio)
        want = (sum(parts["policy_loss"]) + 3 * sum(parts["value_loss"])) / max(len(tokens), 1)
        assert loss == pytest.approx(want, rel=1e-4, abs=1e-6)
        per_step.append(parts)
    assert min(ratios) < 0.97 and max(ratios) > 1.01
    minibatch, _, logprobs, _ = got.updates[0]  # of one temperature, and nothing is learned yet
    assert flat(logprobs, minibatch) == pytest.approx(flat(minibatch.old_logprobs, minibatch), abs=1e-4)
    for step, metrics in enumerate(got.metrics):
        for name in per_step[0]:
            of_all = [x for parts in per_step[4 * step : 4 * step + 4] for x in parts[name]]
            assert metrics[f"losses/{name}"] == pytest.approx(statistics.mean(of_all), rel=1e-3, abs=1e-6), name
            assert any(of_all)


def test_the_kl_coefficient_follows_the_kl_of_sequences(train):
    """Only that of the third rollout has moved: the first is the reference's own, whose KL of 0 counts for the second."""
    flags = f"--kl-coef 0.3 --kl-horizon 50 --reward rewards.py:length {LARGE_STEPS}"
    target = train(ppo, f"{flags} --kl-target 1").metrics[1]["objective/kl_seq"] / 1.1  # so that the error is 0.1
    got = [metrics["objective/kl_coef"] for metrics in train(ppo, f"{flags} --kl-target {target} --steps 3").metrics]
    assert got == pytest.approx([0.3, 0.3 * (1 - 0.2 * 32 / 50), 0.3 * (1 - 0.2 * 32 / 50) * (1 + 0.1 * 32 / 50)], rel=1e-3)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("module", [grpo, ppo])
def test_the_optimiser_steps_at_the_rates_of_the_schedule_after_every_model_was_clipped(train, module, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    seen = lambda self, *args: rates.append([group["lr"] for group in self.param_groups]) or step(self, *args)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    flags = "--update-epochs 2 --num-minibatches 1 --warmup-steps 1 --learning-rate 1e-3 --reward rewards.py:length"
    got = train(module, flags + (" --critic-learning-rate 1e-2" if module is ppo else ""))
    peaks = [1e-3] if module is grpo else [1e-3, 1e-2]
    assert rates == [pytest.approx([share * peak for peak in peaks]) for share in (0.5, 0.5, 1, 1)]
    assert [metrics["charts/learning_rate"] for metrics in got.metrics] == pytest.approx([0.5e-3, 1e-3])
    for _, models, optimizer in (args for name, args in got.calls if name == "clip_and_step"):
        assert [list(model.parameters()) for model in models] == [group["params"] for group in optimizer.param_groups]
        assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("module", [grpo, ppo])
def test_no_random_number_serves_twice(train, module, monkeypatch):
    """Not in another step, not for a split into minibatches, not for what dynamic sampling samples in addition."""
    keys, uniforms = [], common.Run.uniforms
    seen = lambda run, step, purpose, *shape: keys.append((step, purpose)) or uniforms(run, step, purpose, *shape)  # noqa: E731
    monkeypatch.setattr(common.Run, "uniforms", seen)
    train(module, "--update-epochs 2 --num-minibatches 2 --reward rewards.py:equal" + (" --dynamic-sampling" if module is grpo else ""))
    keys = [(step, purpose) for step, purpose in keys if purpose not in (3, 4)]  # those of check_model
    assert len(keys) == len(set(keys)) >= 2 + 4 + (module is grpo) * 2 * 3


@pytest.mark.parametrize("module", [grpo, ppo])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_sampler_in_bfloat16_is_refreshed_and_corrected_for(train, module, updates, monkeypatch):
    """Before each rollout and evaluation; the weights are those of old policy over sampler, and lie on the surrogate alone."""
    weights, given = module.importance_weights, []

    def seen(old, sampler, cap):
        given.append((old.detach(), sampler, cap))
        return weights(old, sampler, cap) * 3

    monkeypatch.setattr(module, "importance_weights", seen)
    flags = f"--dtype bfloat16 --tis-cap 1.5 --update-epochs {updates} --num-minibatches 1 --reward rewards.py:length --eval-every 1 --kl-coef 0"
    got = train(module, flags + (" --baseline none" if module is ppo else ""))
    names = [name for name, _ in got.calls]
    assert names.count("evaluate") == 3 and all(names[i - 1] == "refresh" for i, name in enumerate(names) if name == "evaluate")
    assert names.count("refresh") == 3 + 2
    assert len(given) == 2 * 2 * updates  # in the pass that is recorded, and in that of the update
    minibatch, loss, logprobs, _ = got.updates[0]
    old, sampler, cap = given[0]
    assert cap == 1.5 and torch.equal(sampler, minibatch.sampler_logprobs)
    torch.testing.assert_close(old, logprobs, atol=1e-5, rtol=0)  # nothing has been learned yet
    assert not torch.equal(old, sampler)
    valid = minibatch.completion_mask
    tokens = -3 * ((old - sampler).exp().clamp(max=1.5) * minibatch.advantages * valid)
    per_sequence = tokens.sum(1) / valid.sum(1)
    want = per_sequence.mean() if module is grpo else tokens.sum() / valid.sum()
    assert loss == pytest.approx(float(want), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("module", [grpo, ppo])
@pytest.mark.parametrize("updates", [1, 2])
def test_completions_from_elsewhere_teach_the_same_as_sampled_ones(train, module, updates, monkeypatch, capsys):
    """Given as token ids alone: the old policy's log-probs are the trainer's own, and what is not known is said."""
    flags = f"--update-epochs {updates} --num-minibatches 1 --reward rewards.py:length --learning-rate 0.01 --output-dir"
    want = train(module, f"{flags} sampled")
    sample = common.Sampler.sample

    def given(sampler, prompts, group_size, uniforms):
        rollout = sample(sampler, prompts, group_size, uniforms)
        if len(rollout) != 8 * 4:  # of check_model, or of an evaluation
            return rollout
        completions = [ids[:n].tolist() for ids, n in zip(rollout.completion_ids, rollout.lengths.tolist())]
        return common.rollout_of([ids for ids in prompts for _ in range(group_size)], completions, "cpu", rollout.prompt_index.tolist())

    monkeypatch.setattr(common.Sampler, "sample", given)
    capsys.readouterr()
    got = train(module, f"{flags} given")
    for step in range(2):
        for name in ("losses/policy_loss", "losses/approx_kl", "losses/entropy", "losses/grad_norm"):
            assert got.metrics[step][name] == pytest.approx(want.metrics[step][name], rel=1e-3, abs=1e-5), (step, name)
        assert math.isnan(got.metrics[step]["objective/kl"]) and want.metrics[step]["losses/grad_norm"] > 0
    assert "losses/policy_loss or objective/kl is no number" in capsys.readouterr().out


def test_dynamic_sampling_tries_as_often_as_it_may(train, monkeypatch):
    calls, sample = [], common.Sampler.sample
    monkeypatch.setattr(common.Sampler, "sample", lambda *args: calls.append(args[3] is None) or sample(*args))
    got = train(grpo, "--dynamic-sampling --max-resamples 2 --reward rewards.py:equal --eval-reward exact")
    assert calls.count(False) == 1 + 2 * (1 + 2)  # the first is check_model's
    assert [metrics["reward/resampled_groups"] for metrics in got.metrics] == [16, 16]
