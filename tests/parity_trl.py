"""The same training by TRL's GRPOTrainer and by grpo.py, from the same warm-started models, seeds 1 to 5.

    pip install -r requirements.txt trl==1.16.0 matplotlib
    python tests/parity_trl.py             # ten runs, one after the other, about 20 minutes on one core

Both sample 300 times 8 completions of 32 prompts of the built-in task and make 2 epochs of 2 minibatches on them, with
the loss, clip, KL coefficient, optimiser and schedule of grpo.py's defaults (TRL's KL is multiplied by the ratio, as it
is by default); TRL in float32 without checkpointing, a minibatch in one piece. The policy is evaluated as grpo.py does
it, every 10 rollouts, on the clock of neither. Prints held-out accuracy and the CPU seconds of training, without set-up
and evaluation, so that other jobs on the machine cost neither anything; writes .github/parity_trl.png and .json. A run
that has finished is not repeated (runs/parity_trl/).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / ".github/parity_trl.png"
SEEDS = range(1, 6)
EVERY = 10  # rollouts between evaluations
PHASES = ("rollout", "reward", "reference", "update")


def ours(seed):
    """Accuracies as [rollouts, accuracy], and seconds of training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sys.path.insert(0, str(ROOT))
    import common
    import grpo

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--seed {seed} --eval-every {EVERY} --device cpu --output-dir {folder}/run"
        grpo.main(common.parse_args(grpo.Args, flags.split()))
        events = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0}).Reload()
        curve = [[point.step, point.value] for point in events.Scalars("eval/accuracy")]
        return {"curve": curve, "seconds": sum(p.value for name in PHASES for p in events.Scalars(f"perf/{name}_seconds"))}


def theirs(seed):
    import datasets
    import transformers
    import trl

    sys.path.insert(0, str(ROOT))
    import common
    import grpo

    args = common.parse_args(grpo.Args, ["--seed", str(seed), "--device", "cpu"])
    run = common.Run(args)
    tokenizer = common.tiny_tokenizer()
    policy, end_ids = common.load_policy(args, run, tokenizer)  # warm-started, the same for both
    rewards, eval_reward = common.load_all_rewards(args, run)
    train_rows, eval_rows = common.load_train_and_eval_rows(args, rewards, eval_reward)
    _, eval_prompts = common.tokenize_train_and_eval(args, run, tokenizer, policy.config, train_rows, eval_rows)
    sampler = common.Sampler(policy, end_ids, args.temperature, args.max_new_tokens)
    curve, evaluating = [], 0.0

    def evaluate(model, rollouts):
        nonlocal evaluating
        started = time.perf_counter()
        common.copy_weights(model, policy)
        curve.append([rollouts, common.evaluate(run, sampler, tokenizer, eval_prompts, eval_reward)["eval/accuracy"]])
        evaluating += time.perf_counter() - started

    updates = args.update_epochs * args.num_minibatches  # a rollout

    class Evaluate(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, model=None, **_):
            if state.global_step % (EVERY * updates) == 0:
                evaluate(model, state.global_step // updates)

    def exact(completions, answer, **_):
        return [float(text == right) for text, right in zip(completions, answer)]

    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        config = trl.GRPOConfig(
            output_dir=folder, seed=seed, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=10_000, loss_type="grpo", beta=args.kl_coef, epsilon=0.2,
            temperature=1.0, num_generations=args.group_size, max_completion_length=args.max_new_tokens,
            per_device_train_batch_size=args.prompts_per_step * args.group_size // args.num_minibatches,
            steps_per_generation=args.num_minibatches, num_iterations=args.update_epochs, max_steps=args.steps * updates,
            learning_rate=args.learning_rate, lr_scheduler_type="linear", warmup_steps=args.warmup_steps * updates,
            max_grad_norm=args.max_grad_norm, optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0,
        )  # fmt: skip
        rows = datasets.Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in train_rows])
        trainer = trl.GRPOTrainer(
            model, reward_funcs=exact, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Evaluate()]
        )
        evaluate(model, 0)
        started, evaluating = time.perf_counter(), 0.0
        trainer.train()
        return {"curve": curve, "seconds": time.perf_counter() - started - evaluating}


SYSTEMS = {"grpo.py": ours, "TRL": theirs}


def result(system, seed):
    path = ROOT / "runs/parity_trl" / f"{system}-{seed}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--child", system, str(seed)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if process.returncode:
            sys.exit(f"{system}, seed {seed}:\n{process.stderr[-3000:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(process.stdout.splitlines()[-1])
    return json.loads(path.read_text())


def draw(results):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (system, runs), colour in zip(results.items(), ("#0b6bcb", "#d9730d")):
        steps = [step for step, _ in runs[0]["curve"]]
        values = [sorted(run["curve"][i][1] for run in runs) for i in range(len(steps))]
        seconds = statistics.median(run["seconds"] for run in runs)
        axis.plot(steps, [v[len(v) // 2] for v in values], color=colour, label=f"{system}: {seconds:.0f} CPU s", linewidth=2)
        axis.fill_between(steps, [v[0] for v in values], [v[-1] for v in values], color=colour, alpha=0.2)
    axis.set(xlabel="rollouts (256 completions each)", ylabel="held-out accuracy (greedy)", ylim=(0.2, 1.01))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    figure.savefig(FIGURE, dpi=110)


def main():
    if sys.argv[1:2] == ["--child"]:
        time.perf_counter = time.process_time  # which grpo.py reads its phases' seconds from
        print("\n" + json.dumps(SYSTEMS[sys.argv[2]](int(sys.argv[3]))))
        return
    results = {system: [] for system in SYSTEMS}
    for seed in SEEDS:
        for system, runs in results.items():
            runs.append(result(system, seed))
            (before, after), seconds = (runs[-1]["curve"][i][1] for i in (0, -1)), runs[-1]["seconds"]
            print(f"seed {seed} {system:8} accuracy {before:.3f} -> {after:.3f} in {seconds:.1f} CPU s of training", flush=True)
    FIGURE.with_suffix(".json").write_text(json.dumps(results))
    draw(results)


if __name__ == "__main__":
    main()
