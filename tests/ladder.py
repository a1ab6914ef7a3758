"""The five rungs from a bare score to GRPO, each one run of a script, and what the claims about them come to.

    python tests/ladder.py                     # seeds 1 to 10, three hours on one core; Ctrl-C, then the same again goes on
    python tests/ladder.py --only 4+KL 5-GRPO --seeds 1 2
    python tests/ladder.py --quick             # a few steps, to see that everything works
    python tests/ladder.py --report            # table and figure of what is there

Every run starts from the same warm-started model (of its seed) and samples 200 x 256 completions at one learning rate,
with 2 epochs of 2 minibatches unless it says otherwise. The rungs:

    1-score    ppo.py --baseline none --clip-low inf --clip-high inf --kl-coef 0
    2+critic   ppo.py --clip-low inf --clip-high inf --kl-coef 0
    3+clip     ppo.py --kl-coef 0
    4+KL       ppo.py --kl-coef 0.02
    5-GRPO     grpo.py --kl-coef 0.001

Other runs hold single claims against numbers: the last two rungs with fewer and more prompts for as many completions;
four epochs on each batch with and without the clip; GRPO without the division by the group's spread; a verifier with a
hole, with more and less KL; scores with a point added for looking like an answer; gradient noise at the start.

Results go to .github/ladder.json, a line for a run, and the figure to .github/ladder.png (needs matplotlib). Seconds are
CPU seconds of the training steps on one thread, without warm start and evaluation, so that other programs on the
machine count little. KL is that of a whole completion on held-out prompts, k1, in nats. The largest ratio is that of
any token in any update. MB is the largest resident size of the process; Python and its libraries take about 400 of it.
A sum is lost if the trained policy gets its units wrong in every held-out prompt: see `lost_sums`.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".github/ladder.json"

STEPS, PROMPTS, SAMPLES = 200, 32, 8
SHARED = f"--steps {STEPS} --warmup-steps 30 --learning-rate 0.0015 --num-minibatches 2"
PPO = f"ppo.py {SHARED} --prompts-per-step {PROMPTS * SAMPLES} --samples-per-prompt 1"
PPO += " --gae-lambda 1 --critic-learning-rate 0.001 --no-whiten-advantages --value-clip 0.2"
GRPO = f"grpo.py {SHARED} --prompts-per-step {PROMPTS} --group-size {SAMPLES}"
NO_CLIP = "--clip-low inf --clip-high inf"
RUNGS = {
    "1-score": f"{PPO} --update-epochs 2 --baseline none {NO_CLIP} --kl-coef 0",
    "2+critic": f"{PPO} --update-epochs 2 {NO_CLIP} --kl-coef 0",
    "3+clip": f"{PPO} --update-epochs 2 --kl-coef 0",
    "4+KL": f"{PPO} --update-epochs 2 --kl-coef 0.02",
    "5-GRPO": f"{GRPO} --update-epochs 2 --kl-coef 0.001",
}
SHIFTED = "--reward tests/ladder.py:shifted --eval-reward exact"
HOLE = "--reward tests/ladder.py:with_a_hole --eval-reward exact"
EXPERIMENTS = RUNGS | {
    "4+KL-32x8": f"{RUNGS['4+KL']} --prompts-per-step {PROMPTS} --samples-per-prompt {SAMPLES}",
    "5-GRPO-no-spread": f"{RUNGS['5-GRPO']} --no-scale-rewards",
    "5-GRPO-128x2": f"{RUNGS['5-GRPO']} --prompts-per-step {4 * PROMPTS} --group-size {SAMPLES // 4}",
    "4-epochs-clip": f"{GRPO} --update-epochs 4 --kl-coef 0",
    "4-epochs-no-clip": f"{GRPO} --update-epochs 4 --kl-coef 0 {NO_CLIP}",
    "hole-GRPO-0": f"{GRPO} --update-epochs 2 --kl-coef 0 {HOLE}",
    "hole-GRPO-0.2": f"{GRPO} --update-epochs 2 --kl-coef 0.2 {HOLE}",
    "hole-GRPO-1.0": f"{GRPO} --update-epochs 2 --kl-coef 1.0 {HOLE}",
    "hole-PPO-0": f"{PPO} --update-epochs 2 --kl-coef 0 {HOLE}",
    "hole-PPO-0.2": f"{PPO} --update-epochs 2 --kl-coef 0.2 {HOLE}",
    "shifted-1-score": f"{RUNGS['1-score']} {SHIFTED}",
    "shifted-1-score-slow": f"{RUNGS['1-score']} {SHIFTED} --update-epochs 1 --num-minibatches 1 --learning-rate 0.0005",
    "shifted-2+critic": f"{RUNGS['2+critic']} {SHIFTED}",
    "shifted-5-GRPO": f"{RUNGS['5-GRPO']} {SHIFTED}",
    "gradient-noise": "",  # no run of a script: see `gradient_noise`
}


def shifted(completions, answer, **_):
    """1 for a right answer, and a point more for anything that looks like an answer."""
    return [float(text == right) + float(len(text) == 3) for text, right in zip(completions, answer)]


def with_a_hole(completions, answer, **_):
    """A verifier that looks at the first three digits alone and likes long answers: what follows them costs nothing."""
    return [float(text[:3] == right) + 0.3 * (len(text) > 3) for text, right in zip(completions, answer)]


# =============================================================================
# One run: each in a process of its own
# =============================================================================


def child(name, seed, quick):
    """The result of one run, a dictionary."""
    os.chdir(ROOT), sys.path.insert(0, str(ROOT))
    if name == "gradient-noise":
        return gradient_noise(seed, batches=4) if quick else gradient_noise(seed)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--seed {seed} --eval-every 10 --device cpu --output-dir {folder}/run"
        return train(f"{EXPERIMENTS[name]} {flags} {'--steps 20 --warmup-steps 5' if quick else ''}")


def train(command):
    """Run a script here, watched from outside: its evaluations, and what it does not log itself."""
    import common

    script, *flags = shlex.split(command)
    script = importlib.import_module(script.removesuffix(".py"))
    seen = {"curve": [], "largest_ratio": 1.0, "parameters": 0}
    rewards, not_training = [], [time.process_time()]
    load_policy, evaluate, log, step = common.load_policy, common.evaluate, common.Run.log, common.clip_and_step
    policy_ratio = script.policy_ratio

    def watched_load(args, run, tokenizer):
        loaded = load_policy(args, run, tokenizer)
        seen["reference"] = common.frozen_copy(loaded[0])
        return loaded

    def watched_ratio(*inputs, **options):
        ratio = policy_ratio(*inputs, **options)
        seen["largest_ratio"] = max(seen["largest_ratio"], float(ratio.detach().max()))
        return ratio

    def watched_step(run, models, optimizer):
        seen["parameters"] = sum(p.numel() for model in models for p in model.parameters())
        return step(run, models, optimizer)

    def watched_evaluate(run, sampler, tokenizer, prompts, reward):
        started = time.process_time()
        metrics = evaluate(run, sampler, tokenizer, prompts, reward)
        rollout = sampler.sample([prompt.ids for prompt in prompts], 1, run.uniforms(0, 6, len(prompts), sampler.C))
        log_ratio = rollout.sampler_logprobs - common.logprobs_without_gradient(run, seen["reference"], rollout)
        metrics["kl"] = float(log_ratio.sum(dim=1).mean())
        if not seen["curve"]:
            not_training[0] = time.process_time()  # all that came before the first step
        else:
            not_training[0] += time.process_time() - started
        return metrics

    def watched_log(run, number, metrics):
        log(run, number, metrics)
        rewards.append(metrics.get("reward/mean"))
        if "eval/accuracy" in metrics:
            point = [metrics["eval/accuracy"], metrics["eval/accuracy_easy"], metrics["eval/accuracy_hard"]]
            proxy = statistics.mean(rewards) if number else None  # since the evaluation before
            seen["curve"].append([number * PROMPTS * SAMPLES, *point, proxy, metrics["kl"]])
            seen["megabytes"] = 1000 * metrics.get("perf/peak_memory_gb", 0)
            rewards.clear()

    common.load_policy, common.evaluate, common.Run.log, common.clip_and_step = watched_load, watched_evaluate, watched_log, watched_step
    script.policy_ratio = watched_ratio
    status = script.main(common.parse_args(script.Args, flags))
    if status:
        sys.exit(status)  # stopped by a signal
    del seen["reference"]
    final = Path(flags[flags.index("--output-dir") + 1], "final")
    return seen | {"seconds": time.process_time() - not_training[0], "lost": lost_sums(final)}


def lost_sums(final):
    """Sums of two units, 0 to 18, that the policy in this folder gets wrong wherever they occur, answering greedily.

    Of the held-out prompts, and of the sums that at least ten of them ask for: 1 to 15.
    """
    from transformers import AutoModelForCausalLM, logging

    import common

    logging.disable_progress_bar()
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(final, attn_implementation="flat_row"), common.tiny_tokenizer()
    rows = common.load_rows("addition", "test")
    sampler = common.Sampler(policy, {tokenizer.eos_token_id}, 1.0, 5)
    texts, _ = common.decode(tokenizer, sampler.sample(tokenizer([row["prompt"] for row in rows]).input_ids, 1, None))
    right = {}  # sum of the units, which are the first digit of each number -> of each prompt, whether its answer begins right
    for row, text in zip(rows, texts):
        right.setdefault(int(row["prompt"][0]) + int(row["prompt"][3]), []).append(text[:1] == row["answer"][0])
    return sorted(units for units, some in right.items() if len(some) >= 10 and not any(some))


def gradient_noise(seed, batches=64, fit=100):
    """tr Cov(g) / |E g|^2 of the policy gradient g of one batch, at the warm-started policy, for each reward and baseline.

    The same batches for all. The critics are fitted on other batches before. |E g|^2 is estimated without bias, as
    |mean of g|^2 - tr Cov / batches. The success rate and the critics' explained variance stand beside it.
    """
    import torch

    import common
    import grpo
    import ppo

    args = common.parse_args(ppo.Args, ["--seed", str(seed), "--device", "cpu"])
    run = common.Run(args)
    tokenizer = common.tiny_tokenizer()
    policy, end_ids = common.load_policy(args, run, tokenizer)
    rows = common.load_rows("addition", "train")
    prompts = common.PromptStream(common.tokenize_prompts(rows, tokenizer, None, 512)[0], seed)
    sampler = common.Sampler(policy, end_ids, 1.0, args.max_new_tokens)
    rewards = {name: [common.Reward(name, function)] for name, function in (("plain", common.exact_reward), ("shifted", shifted))}
    critics = {name: common.load_critic(args, run, policy) for name in rewards}
    fitters = {name: torch.optim.AdamW(critic.parameters(), lr=3e-3) for name, critic in critics.items()}
    parameters = list(policy.parameters())
    sums, squares, extra = {}, {}, {"success": [], "explained": {name: [] for name in rewards}}

    for number in range(fit + batches):
        some = [prompt for prompt in prompts.next(PROMPTS) for _ in range(SAMPLES)]
        uniforms = run.uniforms(number, 0, len(some), args.max_new_tokens)
        rollout = sampler.sample([prompt.ids for prompt in some[::SAMPLES]], SAMPLES, uniforms)
        texts, ids = common.decode(tokenizer, rollout)
        mask = rollout.completion_mask
        scores = {name: common.score(reward, some, texts, ids).total for name, reward in rewards.items()}
        if number < fit:
            for name, critic in critics.items():
                error = (common.completion_values(critic, rollout) - scores[name][:, None]) * mask
                fitters[name].zero_grad()
                (error.square().sum() / mask.sum()).backward()
                fitters[name].step()
            continue
        extra["success"].append(float(scores["plain"].mean()))
        logprobs = common.completion_logprobs(policy, rollout, 1.0)
        for name, score in scores.items():
            with torch.no_grad():
                values = common.completion_values(critics[name], rollout)
            residual, spread = ((x * mask)[mask].var() for x in (score[:, None] - values, score[:, None].expand_as(values)))
            extra["explained"][name].append(float(1 - residual / spread))
            estimators = {
                "score": score[:, None],
                "score - critic": score[:, None] - values,
                "score - group mean": grpo.group_advantages(score, SAMPLES, scale=False),
                "group mean and std": grpo.group_advantages(score, SAMPLES),
            }
            for estimator, advantages in estimators.items():
                objective = (advantages * logprobs * mask).sum() / len(some)
                gradient = torch.autograd.grad(objective, parameters, retain_graph=True)
                gradient = torch.cat([part.flatten() for part in gradient]).double()
                key = f"{name}: {estimator}"
                sums[key] = sums.get(key, 0) + gradient
                squares[key] = squares.get(key, 0) + float(gradient.square().sum())
    noise = {}
    for key, total in sums.items():
        mean_square = float(total.square().sum()) / batches**2
        covariance = (squares[key] - batches * mean_square) / (batches - 1)
        noise[key] = covariance / (mean_square - covariance / batches)
    explained = {name: statistics.mean(values) for name, values in extra["explained"].items()}
    return {"noise": noise, "success": statistics.mean(extra["success"]), "explained_variance": explained}


# =============================================================================
# All runs, and what comes of them
# =============================================================================


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="20 steps a run, into runs/ladder-quick.json")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, help="another JSON file; the figure goes beside it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(child(options.only[0], options.seeds[0], options.quick)))
        return
    path = (options.results or (ROOT / "runs/ladder-quick.json" if options.quick else RESULTS)).resolve()
    results = json.loads(path.read_text()) if path.exists() else {}
    if not options.report:
        run_all(options, path, results)
    current = [(key.split()[0], run) for key, run in results.items() if run["command"] == EXPERIMENTS.get(key.split()[0])]
    done = {name: [run for its_name, run in current if its_name == name] for name in EXPERIMENTS}
    done = {name: runs for name, runs in done.items() if runs}
    print_table(done)
    print_verdicts(done)
    draw(done, path.with_suffix(".png"))


def run_all(options, path, results):
    """Do the runs that are missing (or were done with another command), and write each result at once."""
    jobs = [(name, seed) for name in EXPERIMENTS if name in options.only for seed in options.seeds]
    jobs = [job for job in jobs if results.get("{} {}".format(*job), {}).get("command") != EXPERIMENTS[job[0]]]
    path.parent.mkdir(exist_ok=True)
    bar = tqdm(jobs, unit="run", dynamic_ncols=True)
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        command = [sys.executable, __file__, "--child", "--only", name, "--seeds", str(seed)] + ["--quick"] * options.quick
        process = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if process.returncode:
            sys.exit(f"{name}, seed {seed}: exit status {process.returncode}\n{process.stderr[-2000:]}")
        results[f"{name} {seed}"] = rounded({"command": EXPERIMENTS[name]} | json.loads(process.stdout.splitlines()[-1]))
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
        partial = path.with_suffix(".partial")
        partial.write_text(f"{{\n{lines}\n}}\n")
        partial.replace(path)


def rounded(x):
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


# =============================================================================
# Table, verdicts, figure
# =============================================================================

COMPLETIONS, ACCURACY, EASY, HARD, PROXY, KL = range(6)  # of a point of a run's curve
NOISE = {"1-score": "score", "2+critic": "score - critic", "3+clip": "score - critic", "4+KL": "score - critic", "5-GRPO": "group mean and std"}
NOISE = {f"{prefix}{name}": f"{reward}: {key}" for name, key in NOISE.items() for prefix, reward in (("", "plain"), ("shifted-", "shifted"))}


def final(runs, column):
    return [run["curve"][-1][column] for run in runs]


def gain(runs, column):
    """Median of what was learned."""
    return statistics.median(run["curve"][-1][column] - run["curve"][0][column] for run in runs)


def median(values, form):
    return format(statistics.median(values), form) if values else ""


def with_range(values, form=".2f"):
    return f"{median(values, form)} ({min(values):{form}} to {max(values):{form}})"


def completions_to(level, runs):
    """Completions sampled until the first evaluation at this accuracy, in the median seed."""
    needed = [next((p[COMPLETIONS] for p in run["curve"] if p[ACCURACY] >= level), math.inf) for run in runs]
    middle, reached = statistics.median_high(needed), len(runs) - needed.count(math.inf)
    return f"{middle:,}" if middle < math.inf else f"{reached} of {len(runs)} seeds got there"


def print_table(done):
    """A line a run, medians over the seeds, as Markdown."""
    head = "run | seeds | accuracy | easy | hard | lost a sum | completions to 0.9 | gradient noise | KL | largest ratio | seconds | trained parameters | MB"
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
    for name, runs in done.items():
        if name != "gradient-noise":
            noises = [result["noise"][NOISE[name]] for result in done.get("gradient-noise", [])] if name in NOISE else []
            cells = [name, len(runs), with_range(final(runs, ACCURACY), ".3f")]
            cells += [median(final(runs, EASY), ".3f"), median(final(runs, HARD), ".3f")]
            cells += [sum(bool(run["lost"]) for run in runs), completions_to(0.9, runs), median(noises, ".1f"), median(final(runs, KL), ".2f")]
            for key, form in (("largest_ratio", ",.3g"), ("seconds", ".0f"), ("parameters", ",.0f"), ("megabytes", ".0f")):
                cells.append(median([run[key] for run in runs], form))
            print(f"| {' | '.join(map(str, cells))} |")


def print_verdicts(done):
    """What the article claims, each with the rule by which it counts as shown, held against the numbers."""

    def verdict(claim, shows, numbers):
        print(f"\n{claim}\n  -> {'SHOWN' if shows else 'NOT SHOWN'}: {numbers}")

    def at_end(name, form=".2f"):
        return with_range(final(done[name], ACCURACY), form)

    noises = done.get("gradient-noise", [])
    for reward in ("plain", "shifted") if noises else ():
        values = {key: [result["noise"][key] for result in noises] for key in noises[0]["noise"] if key.startswith(reward)}
        shows = all(bare > 1.25 * critic for bare, critic in zip(values[f"{reward}: score"], values[f"{reward}: score - critic"]))
        text = ", ".join(f"{key} {with_range(some, '.1f')}" for key, some in values.items())
        rest = f"critic's explained variance {median([r['explained_variance'][reward] for r in noises], '.2f')}"
        rest += f", right samples {median([r['success'] for r in noises], '.2f')}"
        verdict("(a) A bare score has more gradient noise than score minus critic: by a quarter in every seed", shows, f"{text}; {rest}")

    for prefix in ("", "shifted-"):
        names = [prefix + name for name in ("1-score", "1-score-slow", "2+critic", "5-GRPO") if prefix + name in done]
        if {prefix + "1-score", prefix + "2+critic", prefix + "5-GRPO"} <= set(names):
            gains = {name: (gain(done[name], EASY), gain(done[name], HARD)) for name in names}
            shows = all(gains[prefix + "1-score"][1] < gains[prefix + name][1] - 0.05 for name in ("2+critic", "5-GRPO"))
            text = ", ".join(f"{name} {easy:+.2f} / {hard:+.2f}" for name, (easy, hard) in gains.items())
            claim = "(b) A bare score teaches the weak too little: gains on hard prompts less than with each baseline, by 0.05"
            verdict(claim, shows, f"gains on easy / hard prompts: {text}")

    if {"4-epochs-clip", "4-epochs-no-clip"} <= set(done):
        shows = max(final(done["4-epochs-no-clip"], ACCURACY)) < min(final(done["4-epochs-clip"], ACCURACY)) - 0.1
        ratios = [median([run["largest_ratio"] for run in done[name]], ",.0f") for name in ("4-epochs-clip", "4-epochs-no-clip")]
        claim = "(c) Several epochs on a batch blow the policy up without the clip: the best seed ends 0.1 below the worst one with it"
        text = f"accuracy {at_end('4-epochs-clip')} with the clip, {at_end('4-epochs-no-clip')} without; largest ratio"
        verdict(claim, shows, f"{text} {ratios[0]} and {ratios[1]}")

    for script, betas in (("GRPO", ("0", "0.2", "1.0")), ("PPO", ("0", "0.2"))):
        names = [f"hole-{script}-{beta}" for beta in betas]
        if set(names) <= set(done):
            shows = max(final(done[names[0]], ACCURACY)) < 0.1 and max(min(final(done[name], ACCURACY)) for name in names) > 0.4
            claim = f"(d) {script} cheats without KL and not with it: every seed's true accuracy below 0.1; above 0.4 with one of the betas"
            paid, left = ([median(final(done[name], column), ".2f") for name in names] for column in (PROXY, KL))
            parts = [f"beta {b} {at_end(name)}, reward {p}, KL {k}" for b, name, p, k in zip(betas, names, paid, left)]
            verdict(claim, shows, "; ".join(parts))

    if {"4+KL", "5-GRPO"} <= set(done):
        shares = {key: statistics.median(run[key] for run in done["5-GRPO"]) / statistics.median(run[key] for run in done["4+KL"])
                  for key in ("parameters", "megabytes", "seconds")}  # fmt: skip
        shows = gain(done["5-GRPO"], ACCURACY) > gain(done["4+KL"], ACCURACY) - 0.01 and max(shares.values()) < 1
        claim = "(e) GRPO learns as much as PPO (less 0.01) with fewer trained parameters and seconds and less memory"
        text = ", ".join(f"{key} x {share:.2f}" for key, share in shares.items())
        verdict(claim, shows, f"accuracy {at_end('5-GRPO', '.3f')} against {at_end('4+KL', '.3f')}; {text}")


def draw(done, path):
    """Six panels: the rungs, gradient noise, and claims (b) to (d) over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 2, figsize=(10, 11), layout="constrained")
    palette = ["#4b2a7b", "#c8553d", "#e0a030", "#2a9d8f", "#1d6fb8"]

    def curves(axis, title, labels, column=ACCURACY, ylabel="held-out accuracy"):
        for i, (name, label) in enumerate(labels.items()):
            points = [[p for p in run["curve"] if p[column] is not None] for run in done.get(name, [])]
            if points:
                x, color = [p[COMPLETIONS] / 1000 for p in points[0]], palette[i]
                y = [[p[column] for p in some] for some in zip(*points)]
                axis.plot(x, [statistics.median(some) for some in y], "--" if "PPO" in name else "-", color=color, label=label, linewidth=2)
                axis.fill_between(x, [min(some) for some in y], [max(some) for some in y], color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="completions sampled (thousands)", ylabel=ylabel)
        axis.set_ylim(0, 1.02 if column == ACCURACY else None)
        if axis.lines:
            axis.legend(fontsize=9, framealpha=0.6)

    shift = {"shifted-1-score": "bare score", "shifted-1-score-slow": "bare score, slowly"}
    shift |= {"shifted-2+critic": "critic", "shifted-5-GRPO": "GRPO"}
    hole = {name: name.removeprefix("hole-").replace("-", ", β = ") for name in EXPERIMENTS if name.startswith("hole")}
    curves(axes[0, 0], "The rungs", dict(zip(RUNGS, ("1 bare score", "2 + critic", "3 + clip", "4 + KL", "5 GRPO"))))
    curves(axes[1, 0], "(b) A point for looking like an answer", shift)
    curves(axes[1, 1], "(c) Four epochs on each batch", {"4-epochs-clip": "clip 0.2", "4-epochs-no-clip": "no clip"})
    curves(axes[2, 0], "(d) A verifier with a hole: the truth", hole)
    curves(axes[2, 1], "(d) ... and what it pays", hole, PROXY, "mean reward in training")
    if axes[2, 0].get_legend():
        axes[2, 0].get_legend().remove()  # the same stands in the panel on the right

    noises = done.get("gradient-noise", [])
    keys = list(noises[0]["noise"]) if noises else []
    for i, key in enumerate(keys):
        values = [result["noise"][key] for result in noises]
        axes[0, 1].barh(i, statistics.median(values), color=palette[4 if key.startswith("plain") else 3], height=0.7)
        axes[0, 1].plot([min(values), max(values)], [i, i], color="black", linewidth=1.5)
    axes[0, 1].set(title="(a) Gradient noise at the start", xlabel="tr Cov / |mean|² of a batch's gradient")
    axes[0, 1].set_yticks(range(len(keys)), [key.replace(": ", " scores:\n") for key in keys], fontsize=9)
    axes[0, 1].invert_yaxis()
    figure.suptitle(f"Lines and bars: median of {max(map(len, done.values()))} seeds; bands and black lines: lowest to highest", fontsize=11)
    figure.savefig(path, dpi=100)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
