"""The five rungs from a bare score to GRPO, each one run of a script, and what the claims about them come to.

    python tests/ladder.py                     # seeds 1 to 5, about an hour on one core; Ctrl-C, then the same again goes on
    python tests/ladder.py --only 4+KL 5-GRPO --seeds 1 2
    python tests/ladder.py --quick             # a few steps, to see that everything works
    python tests/ladder.py --report            # table and figure of what is there

Every run starts from the same warm-started model (of its seed) and samples 150 x 256 completions at one learning rate,
with 2 epochs of 2 minibatches unless it says otherwise. The rungs:

    1-score    ppo.py --baseline none --clip-low inf --clip-high inf --kl-coef 0
    2+critic   ppo.py --clip-low inf --clip-high inf --kl-coef 0
    3+clip     ppo.py --kl-coef 0
    4+KL       ppo.py --kl-coef 0.001
    5-GRPO     grpo.py --kl-coef 0.001

Results go to .github/ladder.json, a line for a run, and the figure to .github/ladder.png (needs matplotlib). Seconds are
CPU seconds of the training steps on one thread, without warm start and evaluation, so that other programs on the
machine count little. KL is that of a whole completion on held-out prompts, k1, in nats.
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
RESULTS, FIGURE = ROOT / ".github/ladder.json", ROOT / ".github/ladder.png"

STEPS, PROMPTS, SAMPLES = 150, 32, 8
SHARED = f"--steps {STEPS} --prompts-per-step {PROMPTS} --warmup-steps 30 --learning-rate 0.0015 --num-minibatches 2"
PPO = f"ppo.py {SHARED} --samples-per-prompt {SAMPLES}"
GRPO = f"grpo.py {SHARED} --group-size {SAMPLES}"
NO_CLIP = "--clip-low inf --clip-high inf"
RUNGS = {
    "1-score": f"{PPO} --update-epochs 2 --baseline none {NO_CLIP} --kl-coef 0",
    "2+critic": f"{PPO} --update-epochs 2 {NO_CLIP} --kl-coef 0",
    "3+clip": f"{PPO} --update-epochs 2 --kl-coef 0",
    "4+KL": f"{PPO} --update-epochs 2 --kl-coef 0.001",
    "5-GRPO": f"{GRPO} --update-epochs 2 --kl-coef 0.001",
}
SHIFTED = "--reward tests/ladder.py:shifted --eval-reward exact"
HOLE = "--reward tests/ladder.py:with_a_hole --eval-reward exact"
EXPERIMENTS = RUNGS | {
    "4-epochs-clip": f"{GRPO} --update-epochs 4 --kl-coef 0",
    "4-epochs-no-clip": f"{GRPO} --update-epochs 4 --kl-coef 0 {NO_CLIP}",
    "hole-KL-0": f"{GRPO} --update-epochs 2 --kl-coef 0 {HOLE}",
    "hole-KL-0.2": f"{GRPO} --update-epochs 2 --kl-coef 0.2 {HOLE}",
    "hole-KL-1.0": f"{GRPO} --update-epochs 2 --kl-coef 1.0 {HOLE}",
    "hole-PPO-KL-0": f"{PPO} --update-epochs 2 --kl-coef 0 {HOLE}",
    "hole-PPO-KL-0.2": f"{PPO} --update-epochs 2 --kl-coef 0.2 {HOLE}",
    "shifted-1-score": f"{RUNGS['1-score']} {SHIFTED}",
    "shifted-1-score-clip": f"{PPO} --update-epochs 2 --baseline none --kl-coef 0 {SHIFTED}",
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

    def watched_load(args, run):
        loaded = load_policy(args, run)
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
    return seen | {"seconds": time.process_time() - not_training[0]}


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
    run = common.Run(args, "ladder")
    policy, tokenizer, end_ids = common.load_policy(args, run)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
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
    done = {name: [run for key, run in results.items() if key.split()[0] == name and run["command"] == EXPERIMENTS[name]] for name in EXPERIMENTS}
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
NOISE_OF = {"1-score": "score", "2+critic": "score - critic", "3+clip": "score - critic", "4+KL": "score - critic", "5-GRPO": "group mean and std"}
NOISE_OF |= {name: f"plain: {key}" for name, key in NOISE_OF.items()} | {f"shifted-{name}": f"shifted: {key}" for name, key in NOISE_OF.items()}


def final(runs, column):
    return [run["curve"][-1][column] for run in runs]


def completions_to(level, run, column=ACCURACY):
    """Completions sampled until the first evaluation at this accuracy; infinity if there is none."""
    return next((point[COMPLETIONS] for point in run["curve"] if point[column] >= level), math.inf)


def median(values, form):
    return format(statistics.median(values), form) if values else ""


def with_range(values, form=".2f"):
    return f"{median(values, form)} ({min(values):{form}} to {max(values):{form}})"


def print_table(done):
    """A line a run, medians over the seeds, as Markdown."""
    table = ["run, seeds | accuracy | easy | hard | completions to 0.9 | gradient noise | KL | largest ratio | seconds | trained parameters | MB"]
    table += ["|".join(["---"] * 11)]
    for name, runs in done.items():
        if name == "gradient-noise":
            continue
        needed = [completions_to(0.9, run) for run in runs]
        reached = [count for count in needed if count < math.inf]
        cells = [f"{name}, {len(runs)}", with_range(final(runs, ACCURACY), ".3f"), median(final(runs, EASY), ".3f"), median(final(runs, HARD), ".3f")]
        cells += [f"{statistics.median_high(needed):,}" if statistics.median_high(needed) < math.inf else f"{len(reached)} of {len(runs)} got there"]
        cells += [median([result["noise"][NOISE_OF[name]] for result in done.get("gradient-noise", [])], ".1f") if name in NOISE_OF else ""]
        cells += [median(final(runs, KL), ".2f")]
        cells += [median([run[key] for run in runs], form) for key, form in (("largest_ratio", ",.3g"), ("seconds", ".0f"), ("parameters", ","), ("megabytes", ".0f"))]
        table.append(" | ".join(cells))
    print("\n".join(f"| {line} |" for line in table))


def print_verdicts(done):
    """What the article claims, held against the numbers. Each rule stands in its line."""

    def verdict(claim, shows, numbers):
        print(f"\n{claim}\n  {'shows' if shows else 'DOES NOT SHOW'}: {numbers}")

    def have(*names):
        return all(name in done for name in names)

    if have("gradient-noise"):
        results = done["gradient-noise"]
        for reward in ("plain", "shifted"):
            names = [key for key in results[0]["noise"] if key.startswith(reward)]
            values = {key.split(": ")[1]: [result["noise"][key] for result in results] for key in names}
            shows = all(bare > 1.25 * critic for bare, critic in zip(values["score"], values["score - critic"]))
            text = "; ".join(f"{key} {with_range(noises, '.1f')}" for key, noises in values.items())
            explained = median([result["explained_variance"][reward] for result in results], ".2f")
            claim = f"(a) A bare score has a noisier gradient than score minus critic (by a quarter in every seed), {reward} scores"
            verdict(claim, shows, f"tr Cov / |mean|^2 of a batch's gradient: {text}. The critic explains {explained} of the scores' variance")
        print(f"  share of right samples at the start: {median([result['success'] for result in results], '.2f')}")

    for prefix, reward in (("", "plain scores"), ("shifted-", "shifted scores")):
        names = [prefix + name for name in ("1-score", "1-score-clip", "2+critic", "5-GRPO") if have(prefix + name)]
        if have(*(prefix + name for name in ("1-score", "2+critic", "5-GRPO"))):
            lag = {name: statistics.mean(p[EASY] - p[HARD] for run in done[name] for p in run["curve"][1:]) for name in names}
            gain = {name: [statistics.median(run["curve"][-1][c] - run["curve"][0][c] for run in done[name]) for c in (EASY, HARD)] for name in names}
            claim = f"(b) Without a baseline the weak are paid too little ({reward}: hard prompts lag by 0.05 more, or end 0.05 lower)"
            others = [name for name in names if "score" not in name]
            bare = prefix + "1-score"
            shows = all(lag[bare] > lag[name] + 0.05 or gain[bare][1] < gain[name][1] - 0.05 for name in others)
            text = "; ".join(f"{name} {gain[name][0]:+.2f} / {gain[name][1]:+.2f}, mean gap {lag[name]:.2f}" for name in names)
            verdict(claim, shows, f"gain on easy / hard prompts, and mean of easy minus hard over the run: {text}")

    if have("4-epochs-clip", "4-epochs-no-clip"):
        clip, free = (final(done[name], ACCURACY) for name in ("4-epochs-clip", "4-epochs-no-clip"))
        ratios = [median([run["largest_ratio"] for run in done[name]], ",.3g") for name in ("4-epochs-clip", "4-epochs-no-clip")]
        claim = "(c) Without the clip, four epochs on a batch blow the policy up (every seed ends below every one with it, by 0.1 in the median)"
        shows = max(free) < min(clip) and statistics.median(clip) > statistics.median(free) + 0.1
        verdict(claim, shows, f"accuracy {with_range(clip)} with, {with_range(free)} without; largest ratio {ratios[0]} and {ratios[1]}")

    holes = {name.removeprefix("hole-KL-"): runs for name, runs in done.items() if name.startswith("hole")}
    if len(holes) > 1 and "0" in holes:
        claim = "(d) A reward that can be cheated is cheated without KL, and not with it (true accuracy below 0.1, and above 0.5)"
        shows = max(final(holes["0"], ACCURACY)) < 0.1 and max(min(final(runs, ACCURACY)) for runs in holes.values()) > 0.5
        text = (f"beta {beta}: true {with_range(final(runs, ACCURACY))}, reward {median(final(runs, PROXY), '.2f')}" for beta, runs in holes.items())
        verdict(claim, shows, "; ".join(text))

    if have("4+KL", "5-GRPO"):
        ppo, grpo = done["4+KL"], done["5-GRPO"]
        ratio = {key: statistics.median(run[key] for run in grpo) / statistics.median(run[key] for run in ppo) for key in ("parameters", "megabytes", "seconds")}
        claim = "(e) GRPO does as well as PPO (median accuracy less 0.01) with fewer parameters, seconds and less memory"
        better = statistics.median(final(grpo, ACCURACY)) >= statistics.median(final(ppo, ACCURACY)) - 0.01
        text = f"accuracy {with_range(final(grpo, ACCURACY), '.3f')} against {with_range(final(ppo, ACCURACY), '.3f')}; "
        verdict(claim, better and max(ratio.values()) < 1, text + ", ".join(f"{key} x {value:.2f}" for key, value in ratio.items()))


def draw(done, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 2, figsize=(10, 11), layout="constrained")

    def curves(axis, title, labels, column=ACCURACY, ylabel="held-out accuracy"):
        colors = plt.get_cmap("viridis")([0.0, 0.25, 0.5, 0.72, 0.92] if len(labels) > 4 else [0.05, 0.4, 0.65, 0.9])
        for (name, label), color in zip(labels.items(), colors):
            points = [[p for p in run["curve"] if p[column] is not None] for run in done.get(name, [])]
            if points:
                x = [p[COMPLETIONS] / 1000 for p in points[0]]
                y = [[p[column] for p in some] for some in zip(*points)]
                axis.plot(x, [statistics.median(some) for some in y], color=color, label=label, linewidth=2)
                axis.fill_between(x, [min(some) for some in y], [max(some) for some in y], color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="completions sampled (thousands)", ylabel=ylabel)
        axis.set_ylim(0, 1.02 if column == ACCURACY else None)
        if axis.lines:
            axis.legend(fontsize=10, framealpha=0.7)

    hole = {"hole-KL-0": "no KL", "hole-KL-0.2": "beta 0.2", "hole-KL-1.0": "beta 1.0"}
    shift = {"shifted-1-score": "bare score", "shifted-1-score-clip": "bare score, clipped", "shifted-2+critic": "critic", "shifted-5-GRPO": "group mean (GRPO)"}
    curves(axes[0, 0], "The rungs", {name: name[0] + " " + name[1:].strip("-") for name in RUNGS})
    curves(axes[1, 0], "(b) A point for looking like an answer", shift)
    curves(axes[1, 1], "(c) Four epochs on each batch", {"4-epochs-clip": "clip 0.2", "4-epochs-no-clip": "no clip"})
    curves(axes[2, 0], "(d) A verifier with a hole: the truth", hole)
    curves(axes[2, 1], "(d) ... and what it pays", hole, PROXY, "mean reward in training")

    axis, results = axes[0, 1], done.get("gradient-noise", [])
    for i, key in enumerate(results[0]["noise"] if results else []):
        values = [result["noise"][key] for result in results]
        color = plt.get_cmap("viridis")(0.25 if key.startswith("plain") else 0.72)
        axis.barh(i, statistics.median(values), color=color, height=0.7)
        axis.plot([min(values), max(values)], [i, i], color="black", linewidth=1.5)
    if results:
        axis.set_yticks(range(len(results[0]["noise"])), [key.replace(": ", "\n") for key in results[0]["noise"]], fontsize=9)
        axis.invert_yaxis()
    axis.set(title="(a) Gradient noise at the start", xlabel="tr Cov / |mean|² of a batch's gradient")
    seeds = max(map(len, done.values()))
    figure.suptitle(f"Lines: median of {seeds} seeds; bands and black lines: lowest to highest seed", fontsize=11)
    figure.savefig(path, dpi=100)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
