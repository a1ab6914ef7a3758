"""Group Relative Policy Optimization (GRPO) for language models, in one file.

The policy answers each prompt G times. An answer's advantage is its score compared with the other answers to the same
prompt, so no value network is needed. A clipped surrogate keeps each update small, and a KL term keeps the policy near
the frozen reference model it started from.

    python grpo.py                                                                  # tiny model, about a minute, no GPU
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k --group-size 8
    python grpo.py --model DIR --dataset prompts.jsonl --reward rewards.py:correct --reward rewards.py:format

Papers: GRPO arXiv:2402.03300 (DeepSeekMath); Dr. GRPO arXiv:2503.20783; DAPO arXiv:2503.14476; GSPO arXiv:2507.18071;
CISPO arXiv:2506.13585; KL estimators: Schulman, "Approximating KL divergence" (2020).

Where this differs from the papers:
 1. Standard deviations are of the sample (divided by G - 1), as in TRL and verl; 1e-4 is added to them, as in TRL.
 2. --kl-coef is 0.001 with every --loss. DeepSeekMath uses 0.04; Dr. GRPO, DAPO and CISPO use no KL (--kl-coef 0).
 3. dapo and cispo divide by the number of tokens of an optimiser step; their papers by that of each prompt's group.
 4. --dynamic-sampling ends after --max-resamples rounds; DAPO goes on until no group has equal scores.
 5. Truncated importance weights (--tis-cap) correct for a sampler in bfloat16.
 6. The learning rate decays linearly to 0.

Letters: N prompts per step, G completions per prompt, B = N G sequences (split between the processes; b in a micro-batch),
C tokens in the longest completion. Column t of every (B, C) tensor is completion token t.
"""

import math
from dataclasses import dataclass, replace

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
    steps: int = flag(tiny=300, real=500, help="number of rollouts", at_least=1)
    prompts_per_step: int = flag(32, "N, prompts per rollout, over all processes", at_least=1)
    group_size: int = flag(8, "G, completions of each prompt", at_least=2)
    max_prompt_tokens: int = flag(512, "longer prompts are dropped", at_least=1)
    max_new_tokens: int = flag(tiny=5, real=512, help="maximum tokens of a completion", at_least=1)
    temperature: float = flag(1.0, "divides the logits, in sampling and in all log-probs", at_least=1e-3)
    # Algorithm
    loss: str = flag("grpo", "member of the GRPO family", choices=["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
    advantage: str = flag(
        "group", "minus the group's mean, over the std of group or batch; or leave-one-out", choices=["group", "batch", "rloo"]
    )
    scale_rewards: bool | None = flag(help="divide by that std (default: yes; no for dr_grpo and rloo)")
    clip_low: float | None = flag(
        help="for A < 0, ratios are clipped below 1 - this; inf: no clip (default: 0.2; gspo 3e-4, cispo inf)", at_least=0
    )
    clip_high: float | None = flag(
        help="for A > 0 (cispo: any A), ratios are clipped above 1 + this; inf: no clip (default: 0.2; dapo 0.28, gspo 4e-4)",
        at_least=0,
    )
    kl_coef: float = flag(0.001, "beta, weight of the KL to the reference; 0: no reference model", at_least=0)
    kl_estimator: str = flag(
        "k3", "estimator of that KL; on average k1's gradient is 0 and k2's is the KL's", choices=["k1", "k2", "k3"]
    )
    ref_refresh: int = flag(0, "steps between updates of the reference to the current policy; 0: none", at_least=0)
    tis_cap: float = flag(2.0, "cap of the importance weights that correct for a bfloat16 sampler; 0: none", at_least=0)
    dynamic_sampling: bool = flag(False, "sample other prompts in place of those whose answers all score the same")
    max_resamples: int = flag(3, "maximum rounds of --dynamic-sampling in a step", at_least=1, at_most=8)
    overlong_buffer: int = flag(0, "number of last tokens over which a penalty rises to 1 point; 0: no penalty", at_least=0)
    update_epochs: int = flag(tiny=2, real=1, help="passes over each rollout", at_least=1)
    num_minibatches: int = flag(tiny=2, real=1, help="optimiser steps in each pass", at_least=1)
    # Optimisation
    learning_rate: float = flag(tiny=1.5e-3, real=1e-6, help="peak learning rate", above=0)
    warmup_steps: int = flag(tiny=30, real=10, help="steps of linear warm-up", at_least=0)
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


LOSS_DEFAULTS = {  # clip_low, clip_high, scale_rewards: from the paper of each loss; 0.2 if it gives no number
    "grpo": (0.2, 0.2, True),
    "dr_grpo": (0.2, 0.2, False),
    "dapo": (0.2, 0.28, True),
    "gspo": (3e-4, 4e-4, True),
    "cispo": (math.inf, 0.2, True),
}


def with_defaults_of_loss(args: Args) -> tuple[Args, dict[str, float | bool]]:
    """The arguments, with flags that were not given set to the defaults of --loss; and these defaults."""
    defaults = dict(zip(("clip_low", "clip_high", "scale_rewards"), LOSS_DEFAULTS[args.loss]))
    defaults["scale_rewards"] &= args.advantage != "rloo"
    defaults = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return replace(args, **defaults), defaults


def check_flags(args: Args):
    """Refuses flags that contradict each other."""
    if args.advantage == "rloo" and args.scale_rewards:
        raise common.UserError("--scale-rewards: --advantage rloo divides by no standard deviation")
    if args.advantage == "batch" and not args.scale_rewards:
        raise common.UserError("--advantage batch names the standard deviation to divide by: add --scale-rewards")
    if args.loss == "cispo" and args.clip_low < math.inf:
        raise common.UserError("--clip-low: --loss cispo bounds the ratio from above only")
    if args.ref_refresh and not args.kl_coef:
        raise common.UserError("--ref-refresh: with --kl-coef 0 there is no reference")
    if args.overlong_buffer > args.max_new_tokens:
        raise common.UserError(f"--overlong-buffer {args.overlong_buffer}: more than --max-new-tokens {args.max_new_tokens}")


# =============================================================================
# The mathematics
# =============================================================================


def group_advantages(
    scores: Tensor, group_size: int, scale: bool = True, kind: str = "group", batch_std: Tensor | float = 1.0
) -> Tensor:
    """How much better each completion is than the other answers to its prompt: scores (B,), G in a row for each prompt ->
    advantages (B, 1), one for all tokens of a completion.

    group: A_i = (r_i - mean(r)) / (std(r) + 1e-4) within the group, section 4.1.2 of arXiv:2402.03300; without `scale`
    only r_i - mean(r), arXiv:2503.20783. batch: as group, but with the std of all scores, `batch_std`, arXiv:2508.08221.
    rloo: r_i minus the mean of the others, arXiv:2402.14740. A completion without a score (NaN) is left out and gets 0.
    """
    groups = scores.view(-1, group_size)  # (N, G)
    valid = ~groups.isnan()
    count = valid.sum(dim=1, keepdim=True)  # (N, 1)
    mean = groups.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    advantages = torch.where(valid, groups - mean, 0.0)
    if kind == "rloo":
        advantages = advantages * count / (count - 1).clamp(min=1)  # = r_i - mean of the others
    elif scale:
        group_std = (advantages.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        advantages = advantages / ((batch_std if kind == "batch" else group_std) + 1e-4)
    # Equal scores give exactly 0, although the mean of eight times 0.1 is not 0.1 in floating point.
    return advantages.masked_fill(has_equal_scores(scores, group_size)[:, None], 0.0).view(-1, 1)


def has_equal_scores(scores: Tensor, group_size: int) -> Tensor:
    """Groups in which no completion is better than another: (B,) -> (N,)."""
    groups = scores.view(-1, group_size)  # a NaN is neither the highest nor the lowest
    return groups.nan_to_num(-math.inf).amax(dim=1) <= groups.nan_to_num(math.inf).amin(dim=1)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, per_sequence: bool) -> Tensor:
    """rho = pi / pi_old per token: (B, C); or per sequence, exp(mean_t log rho), eq. 7 of arXiv:2507.18071: (B, 1)."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)  # keeps exp finite if the policy diverges
    if per_sequence:
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def surrogate_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), eq. 7 of arXiv:1707.06347: (B, C), for gspo (B, 1)."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def cispo_loss(ratio: Tensor, advantages: Tensor, logprobs: Tensor, clip_high: float) -> Tensor:
    """-stopgrad(min(rho, 1 + eps_high)) A log pi, eq. 4 of arXiv:2506.13585: clips the weight, not the gradient: (B, C)."""
    return -ratio.clamp(max=1 + clip_high).detach() * advantages * logprobs


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap) for a sampler in lower precision than the trainer: (B, C), no gradient.

    Truncated importance sampling: weights tokens drawn from pi_sampler as if pi_old had drawn them.
    """
    return (old_logprobs - sampler_logprobs).clamp(-20, 20).exp().clamp(max=cap).detach()


def kl_estimate(logprobs: Tensor, other_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(pi || other) at tokens sampled from pi, (B, C): k1 = log pi - log other, k2 = k1^2 / 2,
    k3 = exp(-k1) + k1 - 1. k1 and k3 are unbiased; k3 is never negative and varies less while pi is near other."""
    k1 = logprobs - other_logprobs
    if estimator == "k3":  # eq. 4 of arXiv:2402.03300
        k1 = k1.clamp(-20, 20)
        return torch.expm1(-k1) + k1
    return k1.square() / 2 if estimator == "k2" else k1


def token_weights(loss: str, mask: Tensor, sequences: float, tokens: float, max_new_tokens: int) -> Tensor:
    """The weight of each token, (B, C): the loss of a minibatch is the weighted sum of its token losses.

    `sequences` and `tokens` are the numbers in the whole minibatch, over all micro-batches and processes, so that how it
    is split changes nothing.
    """
    if loss == "dr_grpo":  # divided by a constant, section 3.2 of arXiv:2503.20783
        return mask / (max(sequences, 1) * max_new_tokens)
    if loss in ("dapo", "cispo"):  # every token counts the same, eq. 8 of arXiv:2503.14476
        return mask / max(tokens, 1)
    # Any other loss: the mean over sequences of the mean over tokens, eq. 3 of arXiv:2402.03300.
    return mask / (mask.sum(1, keepdim=True).clamp(min=1) * max(sequences, 1))


def is_clipped(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """1 where the clip of the surrogate binds, so that the token gets no gradient, else 0: (B, C)."""
    return (((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))).float()


def process_advantages(step_rewards: Tensor, group_size: int, step_ends: Tensor | None = None) -> Tensor:
    """Process supervision, section 4.1.3 of arXiv:2402.03300: step_rewards (B, C) -> (B, C).

    A step ends where `step_ends` (B, C) is True, by default where the reward is not 0. `group_advantages` compares the
    step rewards of a group as it compares scores; a token's advantage is the sum of the results for all steps that end
    at it or after it.
    """
    step_ends = step_rewards != 0 if step_ends is None else step_ends
    steps = step_rewards.masked_fill(~step_ends, math.nan).flatten()  # (B C,)
    normalised = group_advantages(steps, group_size * step_rewards.shape[1]).view_as(step_rewards)
    return normalised.flip(1).cumsum(1).flip(1)


def without_advantage(advantages: Tensor, group_size: int) -> Tensor:
    """True for groups whose advantages, (B, 1) or (B, C), are all 0, so that nothing is learned from them: (N,)."""
    return (advantages.view(-1, group_size * advantages.shape[1]) == 0).all(dim=1)


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """0 up to L_max - `buffer` tokens, then linearly down to -1 at L_max, eq. 13 of arXiv:2503.14476: (B,)."""
    return -((lengths - (max_new_tokens - buffer)) / buffer).clamp(0, 1)


# =============================================================================
# Training
# =============================================================================


def main(args: Args) -> int:
    # ---- Set-up: all that can be checked without a model is checked before one loads ----
    args, defaults = with_defaults_of_loss(args)
    check_flags(args)
    run = common.Run(args)
    G = args.group_size
    if args.loss != "grpo" and defaults:
        run.say(f"--loss {args.loss} sets " + ", ".join(f"{name} {value}" for name, value in defaults.items()))
    rewards, eval_reward = common.load_all_rewards(args, run)
    train_rows, eval_rows = common.load_train_and_eval_rows(args, rewards, eval_reward)
    tokenizer, config = common.load_tokenizer_and_config(args)
    train_prompts, eval_prompts = common.tokenize_train_and_eval(args, run, tokenizer, config, train_rows, eval_rows)
    prompt_stream = common.PromptStream(train_prompts, args.seed)  # each epoch in a new random order
    policy, end_ids = common.load_policy(args, run, tokenizer)
    # Changes to the policy's layers belong here: the reference and, in bfloat16 or with other processes, the sampler copy it.
    reference = common.shard(run, common.frozen_copy(policy, run.compute_dtype)) if args.kl_coef > 0 else None
    sampler = common.Sampler(
        policy, end_ids, args.temperature, args.max_new_tokens, run.compute_dtype, own_copy=run.world > 1
    )
    common.check_model(run, policy, sampler, tokenizer)
    common.shard(run, policy)  # between the processes; does nothing if there is one
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    models = {"policy": policy} | ({"reference": reference} if reference else {})
    state = {"step": 0}
    if args.resume:
        state = common.load_checkpoint(run, models, optimizer, prompt_stream)
    if args.compile:
        common.compile_layers(policy, reference, sampler.model)
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
            if args.dynamic_sampling:
                resampled = resample_equal_groups(
                    run, sampler, tokenizer, prompt_stream, rewards, step, rollout, repeated_prompts, texts, token_ids, scores
                )
        rollout.scores = scores.total.to(run.device)  # (B,)
        if args.overlong_buffer:
            penalty = overlong_penalty(rollout.lengths, args.max_new_tokens, args.overlong_buffer)
            rollout.scores = rollout.scores + penalty.to(run.device)

        # ---- Reference: log-probs of the same tokens under the frozen model ----
        run.phase("reference")
        if reference:
            rollout.ref_logprobs = common.logprobs_without_gradient(run, reference, rollout)  # (B, C)

        # ---- Advantage: better or worse than the rest of the group ----
        rollout.leave_out(rollout.scores.isnan())  # completions to which no reward function applies count nowhere
        mask = rollout.completion_mask  # (B, C)
        if not run.max(scores.has_lists):  # over all processes, since they compute batch_std together
            batch_std = common.mean_and_variance(run, rollout.scores, ~rollout.scores.isnan())[1].sqrt()  # for "batch" only
            rollout.advantages = group_advantages(rollout.scores, G, args.scale_rewards, args.advantage, batch_std)  # (B, 1)
        else:
            # A reward function returned lists, one number per token: process supervision.
            step_rewards, step_ends = common.dense_table(scores.dense, rollout)  # (B, C)
            rollout.advantages = process_advantages(step_rewards, G, step_ends)  # (B, C)
            warn_of_process_supervision(run, rollout, scores)

        # ---- Update: epochs of minibatches; each minibatch is one optimiser step ----
        # With one update per rollout the policy is still the one that sampled: all ratios are 1, and rollout.old_logprobs
        # stays None. Set on_policy = False if minibatches hold more than this rollout, as with replay.
        on_policy = args.update_epochs * args.num_minibatches == 1
        if not on_policy:
            rollout.old_logprobs = common.old_logprobs(run, sampler, policy, rollout)  # (B, C)
        run.phase("update")
        for epoch in range(args.update_epochs):
            for groups in run.minibatches(step * args.update_epochs + epoch, len(rollout) // G):  # indices of prompts
                # A minibatch has whole groups, so that each prompt runs through the model once.
                minibatch = rollout.select((groups[:, None] * G + torch.arange(G)).flatten())
                # Counts of the whole minibatch: the losses of its micro-batches then add up to its loss, however it is split.
                sequences, tokens = run.sum((minibatch.lengths > 0).sum(), minibatch.lengths.sum())

                def policy_loss_of(batch: common.Rollout) -> Tensor:  # called for each micro-batch; the results are summed
                    mask = batch.completion_mask  # (b, C)
                    # A sampler in float32 already has these log-probs: then only their gradient is computed.
                    logprobs, entropy = common.completion_logprobs(
                        policy, batch, args.temperature, with_entropy=True, from_sampler=on_policy and sampler.is_exact
                    )
                    old_logprobs = logprobs.detach() if on_policy else batch.old_logprobs  # (b, C)
                    ratio = policy_ratio(logprobs, old_logprobs, mask, per_sequence=args.loss == "gspo")  # (b, C) or (b, 1)
                    if args.loss == "cispo":
                        loss = cispo_loss(ratio, batch.advantages, logprobs, args.clip_high)
                        clipped = ratio > 1 + args.clip_high
                    else:
                        loss = surrogate_loss(ratio, batch.advantages, args.clip_low, args.clip_high)
                        clipped = is_clipped(ratio, batch.advantages, args.clip_low, args.clip_high)
                    if args.tis_cap and not sampler.is_exact:  # is_exact: the sampler computes in float32
                        loss = loss * importance_weights(old_logprobs, batch.sampler_logprobs, args.tis_cap)
                    means.add("losses/policy_loss", loss, mask)
                    means.add("losses/entropy", entropy, mask)
                    means.add("losses/approx_kl", kl_estimate(old_logprobs, logprobs, "k3"), mask)
                    means.add("losses/clipfrac", clipped, mask)
                    if reference:
                        loss = loss + args.kl_coef * kl_estimate(logprobs, batch.ref_logprobs, args.kl_estimator)
                    return (loss * token_weights(args.loss, mask, sequences, tokens, args.max_new_tokens)).sum()

                common.accumulate_gradients(run, policy_loss_of, minibatch, [policy], means)
                means.add("losses/grad_norm", common.clip_and_step(run, [policy], optimizer))
        if args.ref_refresh and step % args.ref_refresh == 0:
            common.copy_weights(policy, reference)  # iterative GRPO, algorithm 1 of arXiv:2402.03300

        # ---- Log, evaluate, save: `means` holds averages over the step, `metrics` single numbers ----
        means.add("reward/frac_zero_std", without_advantage(rollout.advantages, G))
        if reference:
            means.add("objective/kl", kl_estimate(rollout.sampler_logprobs, rollout.ref_logprobs, "k3"), mask)
            k1 = kl_estimate(rollout.sampler_logprobs, rollout.ref_logprobs, "k1")
            means.add("objective/kl_seq", (k1 * mask).sum(dim=1), mask.any(dim=1))
        metrics = common.step_metrics(run, rollout, scores, means, [policy])
        metrics |= {"objective/kl_coef": args.kl_coef, "charts/learning_rate": lr_share * args.learning_rate}
        if args.dynamic_sampling:
            metrics["reward/resampled_groups"] = run.sum(resampled)[0]
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


# =============================================================================
# What only some runs need
# =============================================================================


def warn_of_process_supervision(run, rollout, scores):
    """Warn of flags that do not act on lists of rewards, and of lists that teach nothing although the scores differ."""
    is_changed = ((rollout.scores.cpu() - scores.total).abs() > 0).any()  # e.g. by --overlong-buffer
    if run.args.advantage != "group" or not run.args.scale_rewards or is_changed:
        run.warn_once("--advantage, --no-scale-rewards and what changes rollout.scores do not act on lists of rewards")
    if run.args.loss == "gspo":
        run.warn_once("--loss gspo has one ratio for a whole completion: all its tokens share what its steps are worth")
    if not rollout.advantages.any() and not has_equal_scores(scores.total, run.args.group_size).all():
        run.warn_once(
            "nothing is learned from lists of rewards whose steps are all equal: "
            "a step reward of 0 means that no step ends there; give a wrong step -1"
        )


def resample_equal_groups(
    run, sampler, tokenizer, prompt_stream, rewards, step, rollout, repeated_prompts, texts, token_ids, scores
):
    """DAPO's dynamic sampling, section 3.2 of arXiv:2503.14476: replaces groups whose scores are all equal.

    Samples other prompts for them, in at most --max-resamples rounds. Changes `rollout`, `repeated_prompts`, `texts`,
    `token_ids` and `scores` in place; returns the number of replacements.
    """
    args, G, replaced = run.args, run.args.group_size, 0
    for attempt in range(1, args.max_resamples + 1):
        step_rewards, step_ends = common.dense_table(scores.dense, rollout)  # (B, C); a plain score is that of a single step
        groups = without_advantage(process_advantages(step_rewards, G, step_ends), G).cpu().nonzero()[:, 0]
        counts = run.gather(len(groups))  # of all processes, which take prompts from the stream in the order of their ranks
        first, total = sum(counts[: run.rank]), sum(counts)
        if total == 0:
            break
        own = slice(first, first + len(groups))
        others = prompt_stream.next(total)[own]
        # Purposes 7 to 14, one per attempt: the numbers differ from the rollout's, whose purpose is 0.
        uniforms = run.uniforms(step, 6 + attempt, total, G, args.max_new_tokens)[own].flatten(0, 1)
        if len(groups) == 0:
            continue
        rows = (groups[:, None] * G + torch.arange(G)).flatten()
        new = sampler.sample([prompt.ids for prompt in others], G, uniforms)
        new_prompts, (new_texts, new_ids) = [prompt for prompt in others for _ in range(G)], common.decode(tokenizer, new)
        rollout.replace(rows, new)
        new_scores = common.score(rewards, new_prompts, new_texts, new_ids, args.reward_timeout, run.trainer_state)
        scores.replace(rows.tolist(), new_scores)
        for row, *new_ones in zip(rows.tolist(), new_prompts, new_texts, new_ids):
            repeated_prompts[row], texts[row], token_ids[row] = new_ones
        replaced += len(groups)
    return replaced


if __name__ == "__main__":
    common.run_script(main, Args)
