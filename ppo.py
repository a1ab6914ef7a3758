"""Proximal Policy Optimization (PPO) for language models, in one file.

The policy answers each prompt, and a critic, by default its copy with a scalar head, predicts before every token what the
answer will be worth. Only the surplus over that prediction counts as advantage. A clipped surrogate keeps each update small,
and a KL term, subtracted from the reward token by token, keeps the policy near the frozen reference that it started from.

    python ppo.py                                                                   # tiny model, about a minute, no GPU
    python ppo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k
    python ppo.py --baseline none --clip-low inf --clip-high inf --kl-coef 0        # the bare score

Papers: PPO arXiv:1707.06347; GAE arXiv:1506.02438; PPO for language models arXiv:1909.08593 and arXiv:2203.02155.

Where this differs from the papers:
 1. The score sits on the last valid token: the end token, or the last one of a completion that was cut off. A cut-off
    completion is scored like any other; --truncation-penalty lowers its score.
 2. The critic is a separate model with a scalar head that starts at 0. Policy and critic share no weights, so their losses
    are not added up as in the paper; they share one learning-rate schedule, and the gradient of each is clipped to
    --max-grad-norm on its own.
 3. --gamma and --gae-lambda are 1, as suits a score at the end; arXiv:1707.06347 takes 0.99 and 0.95.
 4. Truncated importance weights (--tis-cap) correct for a sampler in bfloat16.
 5. The learning rates decay linearly to 0.

Letters: N prompts per step, G completions per prompt, B = N G sequences (split between the processes; b in a micro-batch),
C tokens in the longest completion. Column t of every (B, C) tensor is completion token t.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import common
from common import flag


@dataclass
class Args:
    # `tiny` and `real` are the defaults for the built-in model and for any other.
    # Model and data
    model: str = flag("tiny", "tiny (built in), a hub id, or a directory")
    dataset: str = flag(tiny="addition", real="gsm8k", help="addition, gsm8k, a .jsonl file, or a hub dataset id[:config]")
    eval_dataset: str | None = flag(help="like --dataset, but for evaluation (default: a held-out part of --dataset)")
    prompt_column: str = flag("prompt", "column with the prompt, a text or a chat")
    answer_column: str = flag("answer", "column with the answer that the built-in rewards compare with")
    system_prompt: str | None = flag(help="system message put before every prompt, as a chat (default: only for gsm8k)")
    trust_remote_code: bool = flag(False, "let a hub model run its own code on this machine")
    # Reward
    reward: list[str] = flag(
        [], "exact, gsm8k, countdown, format, or file.py:function; repeatable (default: gsm8k for dataset gsm8k, else exact)"
    )
    reward_weights: list[float] = flag([], "one for each --reward, then for --reward-model (default: 1); 0: only logged")
    reward_model: str | None = flag(help="a sequence-classification model, added to --reward, or alone if none is given")
    reward_timeout: float = flag(60.0, "seconds that a reward function may take; 0: no limit", at_least=0, at_most=1e9)
    # Sampling
    steps: int = flag(tiny=220, real=500, help="number of rollouts", at_least=1)
    prompts_per_step: int = flag(256, "N, prompts per rollout, over all processes", at_least=1)
    samples_per_prompt: int = flag(1, "G, completions of each prompt", at_least=1)
    max_prompt_tokens: int = flag(512, "longer prompts are dropped", at_least=1)
    max_new_tokens: int = flag(tiny=5, real=512, help="maximum tokens of a completion", at_least=1)
    temperature: float = flag(1.0, "divides the logits, in sampling and in all log-probs", at_least=1e-3)
    # Algorithm
    baseline: str = flag("critic", "subtracted from the return: the critic's value, or nothing", choices=["critic", "none"])
    gamma: float = flag(1.0, "discount of later rewards", at_least=0, at_most=1)
    gae_lambda: float = flag(1.0, "lambda of generalised advantage estimation; 1: return minus value", at_least=0, at_most=1)
    whiten_advantages: bool | None = flag(
        tiny=False, real=True, help="scale advantages to mean 0 and variance 1 in each rollout, if there is a critic"
    )
    clip_low: float = flag(0.2, "for A < 0, ratios are clipped below 1 - this; inf: no clip", at_least=0)
    clip_high: float = flag(0.2, "for A > 0, ratios are clipped above 1 + this; inf: no clip", at_least=0)
    value_clip: float = flag(0.2, "values are clipped to this distance from the rollout's; inf: no clip", above=0)
    value_coef: float = flag(1.0, "weight of the value loss", above=0)
    kl_coef: float = flag(
        tiny=0.02, real=0.05, help="beta, weight of the KL in the reward; 0: no reference model", at_least=0
    )
    kl_estimator: str = flag("k1", "estimator of the KL in the reward", choices=["k1", "k2", "k3"])
    kl_target: float | None = flag(help="adapt --kl-coef so that the mean KL of a sequence stays near this", above=0)
    kl_horizon: float = flag(10000, "number of completions over which --kl-coef adapts", above=0)
    tis_cap: float = flag(2.0, "cap of the importance weights that correct for a bfloat16 sampler; 0: none", at_least=0)
    truncation_penalty: float = flag(0.0, "subtracted from the score of a completion without an end token", at_least=0)
    critic_model: str | None = flag(help="model that the critic starts from, except for the head (default: the policy)")
    update_epochs: int = flag(tiny=2, real=1, help="passes over each rollout", at_least=1)
    num_minibatches: int = flag(tiny=2, real=4, help="optimiser steps in each pass", at_least=1)
    # Optimisation
    learning_rate: float = flag(tiny=1.5e-3, real=1e-6, help="peak learning rate", above=0)
    critic_learning_rate: float = flag(tiny=1e-3, real=1e-5, help="peak learning rate of the critic", above=0)
    warmup_steps: int = flag(tiny=20, real=10, help="steps of linear warm-up", at_least=0)
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm", above=0)
    micro_batch_tokens: int = flag(16384, "tokens in one forward and backward pass; bounds memory", at_least=1)
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third more time in the update")
    compile: bool = flag(False, "fuse operations with torch.compile, meant for GPUs; compiling delays the start")
    dtype: str | None = flag(
        help="precision of matrix products (default: bfloat16 on GPUs, else float32)", choices=["bfloat16", "float32"]
    )
    device: str | None = flag(help="cuda, mps or cpu (default: the first of these that is available)")
    seed: int = flag(1, "seed of everything random", at_least=0, at_most=2**32 - 1)
    # Evaluation, logging, checkpoints
    eval_every: int = flag(50, "steps between evaluations; 0: only before and after", at_least=0)
    eval_prompts: int = flag(500, "maximum number of held-out prompts", at_least=1)
    eval_samples: int = flag(0, "n samples a prompt for pass@k, k = 1, 2, 4, ..., n; 0: greedy accuracy only", at_least=0)
    eval_reward: str | None = flag(help="reward of the evaluation: at least 1 means right (default: the first --reward)")
    save_every: int = flag(0, "steps between checkpoints; 0: none", at_least=0)
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints to keep", at_least=1)
    output_dir: str | None = flag(help="the run's folder (default: a new one under runs/)")
    resume: str | None = flag(help="the folder of a run to continue")
    log_samples: int = flag(4, "completions in the table of samples", at_least=0)

    __post_init__ = common.check_args  # fills in the defaults that depend on the model, and checks bounds and choices


def check_flags(args: Args):
    """Refuses flags that contradict each other."""
    if args.critic_model and args.baseline == "none":
        raise common.UserError("--critic-model: with --baseline none there is no critic")
    if args.kl_target is not None and not args.kl_coef:
        raise common.UserError("--kl-target: with --kl-coef 0 there is no reference; give the beta to begin with")
    batch = args.prompts_per_step * args.samples_per_prompt
    if args.kl_target is not None and args.kl_horizon <= 0.2 * batch:
        needed = f"with {batch} completions a step it has to be above {0.2 * batch:g}"
        raise common.UserError(f"--kl-horizon {args.kl_horizon:g}: {needed}, or --kl-coef could become negative")


# =============================================================================
# The mathematics
# =============================================================================


def on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B,) on the last valid token of each completion, 0 elsewhere: (B, C)."""
    is_last = mask.bool() & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
    return torch.where(is_last, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation, eq. 16 of arXiv:1506.02438, all (B, C); the value after the last token is 0.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}.
    """
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages


def whiten(x: Tensor, mask: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) under the mask, 0 elsewhere and where all x are equal."""
    differs = variance > (1e-6 * mean).square()  # else equal up to rounding, which would be amplified
    return (x - mean) * torch.rsqrt(variance + 1e-8) * differs * mask


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """rho = pi / pi_old of each token: (B, C)."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # keeps exp finite if the policy diverges
    return log_ratio.exp()


def surrogate_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), eq. 7 of arXiv:1707.06347: (B, C)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap) for a sampler in lower precision than the trainer: (B, C), no gradient.

    Truncated importance sampling: weights tokens drawn from pi_sampler as if pi_old had drawn them.
    """
    return (old_logprobs - sampler_logprobs).clamp(-20, 20).exp().clamp(max=cap).detach()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), of each token: (B, C). From OpenAI's baselines."""
    clipped = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(pi || other) at tokens sampled from pi, (B, C): k1 = log pi - log other, k2 = k1^2 / 2,
    k3 = exp(-k1) + k1 - 1. k1 and k3 are unbiased; k3 is never negative and varies less while pi is near other."""
    k1 = logprobs - other_logprobs
    if estimator == "k3":  # eq. 4 of arXiv:2402.03300
        k1 = k1.clamp(-20, 20)
        return torch.expm1(-k1) + k1
    return k1.square() / 2 if estimator == "k2" else k1


def adapted_kl_coef(kl_coef: float, kl: float, target: float, batch: int, horizon: float) -> float:
    """Proportional control of beta, section 2.2 of arXiv:1909.08593: raised if the KL per sequence is above the target.

    `batch` is the number of completions in a step. The paper multiplies the error by 0.1, its authors' code by
    batch / horizon, as here.
    """
    error = 0.0 if math.isnan(kl) else min(max(kl / target - 1, -0.2), 0.2)  # NaN: no completion has a score
    return kl_coef * (1 + error * batch / horizon)


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """1 where the clip of the surrogate binds, so that the token gets no gradient, else 0: (B, C)."""
    return (((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))).float()


# =============================================================================
# Training
# =============================================================================


def main(args: Args) -> int:
    # ---- Set-up: all that can be checked without a model is checked before one loads ----
    check_flags(args)
    run = common.Run(args)
    G = args.samples_per_prompt
    rewards, eval_reward = common.load_all_rewards(args, run)
    train_rows, eval_rows = common.load_train_and_eval_rows(args, rewards, eval_reward)
    tokenizer, config = common.load_tokenizer_and_config(args)
    train_prompts, eval_prompts = common.tokenize_train_and_eval(args, run, tokenizer, config, train_rows, eval_rows)
    prompt_stream = common.PromptStream(train_prompts, args.seed)  # each epoch in a new random order
    if args.critic_model:
        common.check_critic_model(args, tokenizer, train_prompts + eval_prompts)
    policy, end_ids = common.load_policy(args, run, tokenizer)
    # Changes to the policy's layers belong here: the reference and, in bfloat16 or with other processes, the sampler copy it.
    reference = common.shard(run, common.frozen_copy(policy, run.compute_dtype)) if args.kl_coef > 0 else None
    critic = common.shard(run, common.load_critic(args, run, policy)) if args.baseline == "critic" else None
    sampler = common.Sampler(
        policy, end_ids, args.temperature, args.max_new_tokens, run.compute_dtype, own_copy=run.world > 1
    )
    common.check_model(run, policy, sampler, tokenizer)
    common.shard(run, policy)  # between the processes; does nothing if there is one
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    models = {"policy": policy} | ({"reference": reference} if reference else {})
    learners = [policy]
    if critic:
        optimizer.add_param_group({"params": list(critic.parameters()), "lr": args.critic_learning_rate})
        models["critic"] = critic
        learners.append(critic)
    state = {"step": 0, "kl_coef": args.kl_coef}
    if args.resume:
        state = common.load_checkpoint(run, models, optimizer, prompt_stream)
    if args.compile:
        common.compile_layers(policy, reference, sampler.model, critic)
    run.open_folder(state["step"])
    if not args.resume or "unlogged" in state:  # before the first step, and after a step whose evaluation failed
        sampler.refresh(policy)
        metrics = state.pop("unlogged", {}) | common.evaluate(run, sampler, tokenizer, eval_prompts, eval_reward)
        run.log(state["step"], metrics)
        state["accuracy"] = metrics["eval/accuracy"]
        state.setdefault("accuracy_before", state["accuracy"])

    for step in run.steps(state["step"] + 1):
        means = common.Means()
        lr_share = common.learning_rate_share(args, step)  # share of the peak learning rate, 0 to 1
        common.set_learning_rate(optimizer, lr_share)

        # ---- Rollout: G completions of each of N prompts ----
        run.phase("rollout")
        sampler.refresh(policy)  # copies the weights in bfloat16 (as on GPUs) or with several processes; else shares them
        own_prompts = run.own_part(prompt_stream.next(args.prompts_per_step))
        repeated_prompts = [prompt for prompt in own_prompts for _ in range(G)]  # one prompt for each completion: B
        # One random number per token, (B, max_new_tokens): by seed, step, purpose (0) and sequence, not by batch or process.
        uniforms = run.own_part(run.uniforms(step, 0, args.prompts_per_step * G, args.max_new_tokens))
        with common.checkpoint_on_error(run, models, optimizer, state):  # memory may run out
            # completion_ids, completion_mask (True up to and including the first end token), sampler_logprobs: all (B, C)
            rollout = sampler.sample([prompt.ids for prompt in own_prompts], G, uniforms)
        texts, token_ids = common.decode(tokenizer, rollout)

        # ---- Score: what each completion is worth ----
        run.phase("reward")
        with common.checkpoint_on_error(run, models, optimizer, state):  # a reward function may fail
            scores = common.score(rewards, repeated_prompts, texts, token_ids, args.reward_timeout, run.trainer_state)
        rollout.scores = scores.total.to(run.device)  # (B,)

        # ---- Reference: log-probs of the same tokens under the frozen model ----
        run.phase("reference")
        if reference:
            rollout.ref_logprobs = common.logprobs_without_gradient(run, reference, rollout)  # (B, C)

        # ---- Reward: the score on the last token (or token by token), minus the KL on every token ----
        rollout.leave_out(rollout.scores.isnan())  # completions to which no reward function applies count nowhere
        mask = rollout.completion_mask  # (B, C)
        rollout.old_logprobs = common.old_logprobs(run, sampler, policy, rollout)  # (B, C)
        if not scores.has_lists:
            token_rewards = on_last_token(rollout.scores, mask)  # (B, C)
        else:
            token_rewards, _ = common.dense_table(scores.dense, rollout)  # (B, C)
        token_rewards = token_rewards - on_last_token(args.truncation_penalty * rollout.truncated, mask)
        if reference:
            kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, args.kl_estimator)  # (B, C)
            token_rewards = token_rewards - state["kl_coef"] * kl * mask

        # ---- Advantage: better or worse than the critic expected ----
        run.phase("values")
        rollout.values = common.values_without_gradient(run, critic, rollout) if critic else torch.zeros_like(token_rewards)
        lam = args.gae_lambda if critic else 1.0  # without a critic the advantage is the whole return
        rollout.advantages = gae(token_rewards, rollout.values, mask, args.gamma, lam)  # (B, C)
        rollout.returns = rollout.advantages + rollout.values
        if critic and args.whiten_advantages:
            mean, variance = common.mean_and_variance(run, rollout.advantages, mask)
            rollout.advantages = whiten(rollout.advantages, mask, mean, variance)

        # ---- Update: epochs of minibatches; each minibatch is one optimiser step ----
        run.phase("update")
        for epoch in range(args.update_epochs):
            for groups in run.minibatches(step * args.update_epochs + epoch, len(rollout) // G):  # indices of prompts
                # A minibatch has whole groups, so that each prompt runs through the model once.
                minibatch = rollout.select((groups[:, None] * G + torch.arange(G)).flatten())
                # Counts of the whole minibatch: the losses of its micro-batches then add up to its loss, however it is split.
                tokens = run.sum(minibatch.lengths.sum())[0]

                def policy_loss_of(batch: common.Rollout) -> Tensor:  # called for each micro-batch; the results are summed
                    mask = batch.completion_mask  # (b, C)
                    logprobs, entropy = common.completion_logprobs(policy, batch, args.temperature, with_entropy=True)
                    ratio = policy_ratio(logprobs, batch.old_logprobs)  # (b, C)
                    loss = surrogate_loss(ratio, batch.advantages, args.clip_low, args.clip_high)
                    clipped = is_clipped(ratio, batch.advantages, args.clip_low, args.clip_high)
                    if args.tis_cap and not sampler.is_exact:  # is_exact: the sampler computes in float32
                        loss = loss * importance_weights(batch.old_logprobs, batch.sampler_logprobs, args.tis_cap)
                    means.add("losses/policy_loss", loss, mask)
                    means.add("losses/entropy", entropy, mask)
                    means.add("losses/approx_kl", kl_estimate(batch.old_logprobs, logprobs, "k3"), mask)
                    means.add("losses/clipfrac", clipped, mask)
                    return (loss * mask).sum() / max(tokens, 1)

                def critic_loss_of(batch: common.Rollout) -> Tensor:
                    mask = batch.completion_mask  # (b, C)
                    values = common.completion_values(critic, batch)  # (b, C)
                    loss = value_loss(values, batch.values, batch.returns, args.value_clip)
                    clipped = loss > 0.5 * (values - batch.returns).square()  # these values get no gradient
                    means.add("losses/value_loss", loss, mask)
                    means.add("losses/vf_clipfrac", clipped, mask)
                    return args.value_coef * (loss * mask).sum() / max(tokens, 1)

                # One model after the other, so that memory holds the activations of one at a time.
                common.accumulate_gradients(run, policy_loss_of, minibatch, [policy], means)
                if critic:
                    common.accumulate_gradients(run, critic_loss_of, minibatch, [critic], means)
                means.add("losses/grad_norm", common.clip_and_step(run, learners, optimizer))

        # ---- Log, evaluate, save: `means` holds averages over the step, `metrics` single numbers ----
        if critic:
            residual = common.mean_and_variance(run, rollout.returns - rollout.values, mask)[1]
            mean, variance = common.mean_and_variance(run, rollout.returns, mask)
            variance = torch.where(variance > (1e-6 * mean).square(), variance, math.nan)  # NaN: equal up to rounding
            means.add("losses/explained_variance", 1 - residual / variance)
        if reference:
            means.add("objective/kl", kl_estimate(rollout.sampler_logprobs, rollout.ref_logprobs, "k3"), mask)
            k1 = kl_estimate(rollout.sampler_logprobs, rollout.ref_logprobs, "k1")
            means.add("objective/kl_seq", (k1 * mask).sum(dim=1), mask.any(dim=1))
        means.add("objective/rlhf_reward", token_rewards.sum(dim=1), mask.any(dim=1))
        metrics = common.step_metrics(run, rollout, scores, means, learners)
        metrics |= {"objective/kl_coef": state["kl_coef"], "charts/learning_rate": lr_share * args.learning_rate}
        if args.kl_target is not None:
            kl_seq, batch = metrics["objective/kl_seq"], args.prompts_per_step * G
            state["kl_coef"] = adapted_kl_coef(state["kl_coef"], kl_seq, args.kl_target, batch, args.kl_horizon)
        # What a resumed run continues from.
        state |= {"step": step, "position": prompt_stream.position, "prompts": prompt_stream.digest}
        if args.eval_every and step % args.eval_every == 0 or step == args.steps:
            sampler.refresh(policy)
            with common.checkpoint_on_error(run, models, optimizer, state | {"unlogged": metrics}):
                metrics |= common.evaluate(run, sampler, tokenizer, eval_prompts, eval_reward)
        run.log(step, metrics)
        run.log_samples(step, repeated_prompts, texts, rollout.scores, scores.extra)
        state["accuracy"] = metrics.get("eval/accuracy", math.nan)
        stopped = run.must_stop()
        if stopped or (args.save_every and step % args.save_every == 0):
            common.save_checkpoint(run, models, optimizer, state)
        if stopped:
            return run.say_stopped(step)

    common.save_final(run, policy, tokenizer)
    return run.say_done(state)


if __name__ == "__main__":
    common.run_script(main, Args)
