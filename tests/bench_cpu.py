"""Whole training steps of this project against TRL's, on CPU cores, run by hand.

    python tests/bench_cpu.py                                       # GRPO and PPO, this project and the TRL that is installed
    python tests/bench_cpu.py --trl-python A/bin/python --trl-ppo-python B/bin/python
    python tests/bench_cpu.py --only grpo --workload W2 --profile   # where a step's time goes
    python tests/bench_cpu.py --against ../other-checkout           # two versions of this project

GRPO is compared with trl 1.16, PPO with trl 1.10, the last with a PPOTrainer; without them this project runs alone.

What is measured: sample, reward, reference, advantages, one update (PPO: --update-epochs of them), AdamW, all in
float32. Both systems load the same folder: a Llama with random weights whose embedding of the end token is set so that
lengths are geometric. PPOTrainer knows no groups: it gets each prompt as often as this project samples it. The reward
function, the same in both, is called once a step, and there each system waits for its turn: so they take turns step by
step, in processes of their own with the same number of threads, and what else runs on the machine hits both; on a busy
machine the ratio of the CPU seconds is the one to trust. A step lasts from one call of the reward function to the next;
the first one is left out. Ratios are of the seconds per completion token, since what was sampled differs a little.
Memory is the largest resident size of the process. The floor is the step's matrix products alone, without any padding or
repeated prompt, at the rate at which this machine multiplies two float32 matrices of 1024 x 1024. The phases of this
project's step are compared with floors of their own, in seconds of wall time.
"""

import argparse
import functools
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PAD, END = 0, 1


@dataclass
class Workload:
    hidden: int
    layers: int
    vocabulary: int
    prompt_tokens: int
    prompts: int  # in a step
    group: int
    max_new_tokens: int
    end_chance: float  # at every token: mean length (1 - (1 - p)^max_new_tokens) / p
    micro_batch_tokens: int  # of this project; the leanest of those that are as fast as any
    trl_micro_batch: int  # sequences; the fastest of those tried
    steps: int
    gradient_checkpointing: bool = False  # of this project; TRL would be 2 % leaner with it in W3, and no faster

    @property
    def sequences(self):
        return self.prompts * self.group


WORKLOADS = {
    "W1": Workload(128, 4, 40, 8, 32, 8, 12, 0.135, 1024, 64, 20),  # mean length about 6
    "W2": Workload(256, 6, 4096, 64, 8, 8, 128, 0.0106, 1024, 16, 7),  # 67
    "W3": Workload(256, 4, 151_936, 16, 4, 8, 64, 0.0185, 2048, 8, 5, True),  # 36
}
KL_COEF, LEARNING_RATE = 0.05, 1e-6
PHASES = {}  # of this project's last finished step: name -> seconds


# =============================================================================
# The same model, prompts and reward for both systems
# =============================================================================


def build(folder: Path, w: Workload):
    """Model, tokenizer and prompts as files."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=w.vocabulary, hidden_size=w.hidden, intermediate_size=3 * w.hidden, num_hidden_layers=w.layers,
        num_attention_heads=w.hidden // 32, num_key_value_heads=w.hidden // 64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    # The first component is 1 in every embedding, so it is much the same in every final state, and adds the same to
    # every logit but those of the end token (its chance is set here) and the padding token (it is never sampled).
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 1.0
        embeddings[PAD, 0] = -3.0
        tokens = torch.randint(2, w.vocabulary, (8, w.prompt_tokens + w.max_new_tokens))
        states = model.base_model(tokens).last_hidden_state.flatten(0, 1)[::16]
        for _ in range(20):
            chance = (states @ embeddings.T).softmax(dim=-1)[:, END].mean()
            embeddings[END, 0] += (w.end_chance / chance).log() / states[:, 0].mean()
    model.generation_config = transformers.GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder / "model")
    vocabulary = {"<pad>": PAD, "<end>": END} | {f"w{i}": i for i in range(2, w.vocabulary)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    prompts = torch.randint(2, w.vocabulary, (1024, w.prompt_tokens)).tolist()
    rows = [{"prompt": " ".join(f"w{token}" for token in tokens)} for tokens in prompts]
    loaded = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert loaded([row["prompt"] for row in rows]).input_ids == prompts
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@functools.cache
def parent():
    return socket.socket(fileno=int(os.environ["BENCH_SOCKET"])).makefile("rw")


def take_turns(lengths: list[int]):
    """Tell the parent that a step is done, and wait until it is this process's turn again."""
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    numbers = {"cpu_seconds": time.process_time(), "megabytes": megabytes, "mean_length": sum(lengths) / len(lengths)}
    numbers["phases"] = sys.modules["__main__"].PHASES  # the scripts load this file once more, as that of the reward function
    parent().write(json.dumps(numbers) + "\n")
    parent().flush()
    answer = parent().readline()
    if answer == "stop\n":
        raise KeyboardInterrupt  # what no reward function's caller catches
    if not answer:
        os._exit(0)


def reward(completions, completion_ids, **_):
    lengths = [len(ids) for ids in completion_ids]
    if len(lengths) >= int(os.environ["BENCH_SEQUENCES"]):  # not the evaluation before training
        take_turns(lengths)
    return [n % 7 / 7 for n in lengths]


# =============================================================================
# The systems: each runs in a process of its own, until its parent ends it
# =============================================================================


def run_ours(algorithm: str, folder: Path, w: Workload, options):
    sys.path.insert(0, str(options.checkout))
    import common
    import grpo
    import ppo

    script, log = {"grpo": grpo, "ppo": ppo}[algorithm], common.Run.log

    def log_and_remember(run, step, metrics):
        PHASES.update({name[5:-8]: value for name, value in metrics.items() if re.fullmatch("perf/.*_seconds", name)})
        log(run, step, metrics)

    common.Run.log = log_and_remember
    flags = {
        "model": folder / "model", "dataset": folder / "prompts.jsonl", "reward": f"{__file__}:reward", "reward-timeout": 0,
        "prompts-per-step": w.prompts, "max-new-tokens": w.max_new_tokens, "steps": 10_000, "kl-coef": KL_COEF,
        "learning-rate": LEARNING_RATE, "warmup-steps": 0, "num-minibatches": 1, "eval-every": 0, "eval-prompts": 1,
        "output-dir": folder / f"run-{os.getpid()}", "device": "cpu", "log-samples": 0,
        "gradient-checkpointing": w.gradient_checkpointing,
    }  # fmt: skip
    if algorithm == "grpo":
        flags |= {"group-size": w.group, "update-epochs": 1, "micro-batch-tokens": w.micro_batch_tokens}
    else:  # twice as large: a twelfth less time, and still less memory than PPOTrainer's
        flags |= {"micro-batch-tokens": 2 * w.micro_batch_tokens}
        flags |= {"samples-per-prompt": w.group, "update-epochs": options.update_epochs, "critic-learning-rate": LEARNING_RATE}
    script.main(common.parse_args(script.Args, [text for name, value in flags.items() for text in (f"--{name}", str(value))]))


def trl_arguments(folder: Path, w: Workload, options):
    """What makes TRL fastest on a CPU: float32, no checkpointing, fused AdamW, the best micro-batch, nothing reported."""
    return dict(
        output_dir=str(folder / "trl"), learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch_fused",
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=10_000, temperature=1.0, per_device_train_batch_size=options.trl_micro_batch,
        gradient_accumulation_steps=w.sequences // options.trl_micro_batch,
    )  # fmt: skip


def run_trl_grpo(folder: Path, w: Workload, options):
    import datasets
    import trl

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    config = trl.GRPOConfig(
        **trl_arguments(folder, w, options), max_steps=10_000, num_generations=w.group, max_completion_length=w.max_new_tokens,
        beta=KL_COEF, num_iterations=1, loss_type="grpo", model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trl.GRPOTrainer(str(folder / "model"), reward_funcs=reward, args=config, train_dataset=datasets.Dataset.from_list(rows)).train()


def run_trl_ppo(folder: Path, w: Workload, options):
    import datasets
    import torch
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class LengthReward(torch.nn.Module):
        """Takes the place of PPOTrainer's reward model and costs as little as `reward` does in the other systems."""

        base_model_prefix = "backbone"

        def backbone(self, input_ids, attention_mask, **_):
            return transformers.utils.ModelOutput(hidden_states=(attention_mask,))

        def score(self, mask):
            lengths = mask.sum(dim=1) - w.prompt_tokens
            take_turns(lengths.tolist())
            return (lengths % 7 / 7)[:, None, None].expand(*mask.shape, 1)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, folder / "model", dtype=torch.float32)
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    rows = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompts = datasets.Dataset.from_list([{"input_ids": ids} for ids in tokenizer(rows).input_ids for _ in range(w.group)])
    config = PPOConfig(
        **trl_arguments(folder, w, options), total_episodes=10_000 * w.sequences, num_ppo_epochs=options.update_epochs,
        num_mini_batches=1, local_rollout_forward_batch_size=w.sequences, response_length=w.max_new_tokens,
        stop_token="eos", kl_coef=KL_COEF, num_sample_generations=0,
    )  # fmt: skip
    PPOTrainer(
        args=config, processing_class=tokenizer, model=load(), ref_model=load(), reward_model=LengthReward(),
        value_model=critic, train_dataset=prompts, eval_dataset=prompts.select(range(8)),
    ).train()  # fmt: skip


# =============================================================================
# Floor
# =============================================================================


def multiplications(w: Workload, length: float, algorithm: str, update_epochs: int) -> dict[str, float]:
    """Floating-point operations of the matrix products in each phase: rollout and reference one forward pass, an update three.

    A prompt is read once in each of them; the last token of a completion is never an input. With a critic (PPO), whose
    values are asked for once before the update, the same again without the vocabulary head.
    """
    kv_heads = 0.5  # of the query heads
    weights = w.layers * w.hidden**2 * (2 + 2 * kv_heads + 9)  # attention, and an MLP of 3 matrices 3 hidden wide
    inputs = w.prompts * w.prompt_tokens + w.sequences * (length - 1)
    seen = w.prompts * w.prompt_tokens**2 / 2 + w.sequences * (length - 1) * (w.prompt_tokens + length / 2)
    body = 2 * weights * inputs + 4 * w.layers * w.hidden * seen
    head = 2 * w.sequences * length * w.hidden * w.vocabulary
    phases = {"rollout": body + head, "reference": body + head, "update": 3 * (body + head)}
    if algorithm == "ppo":
        phases |= {"values": body, "update": 3 * (2 * body + head) * update_epochs}
    return phases


def matrix_rate() -> float:
    """Float32 operations a CPU second of a 1024 x 1024 matrix product."""
    import torch

    a, b, seconds = torch.randn(1024, 1024), torch.randn(1024, 1024), []
    for _ in range(40):
        started = time.process_time()
        a @ b
        seconds.append(time.process_time() - started)
    return 2 * 1024**3 / statistics.median(seconds)


# =============================================================================
# Measuring
# =============================================================================


def child_command(python, what: str, folder: Path, w: Workload, options, checkout: Path = ROOT):
    flags = ["--child", what, "--folder", folder, "--workload", options.name, "--checkout", checkout]
    flags += ["--update-epochs", options.update_epochs, "--trl-micro-batch", options.trl_micro_batch or w.trl_micro_batch]
    flags += ["--threads", options.threads] + ["--profile"] * options.profile
    return [str(x) for x in (python, __file__, *flags)]


class System:
    """A child process that takes its turns."""

    def __init__(self, name: str, command: list[str], w: Workload, threads: int, log: Path):
        self.name, self.log, self.latest = name, log, {}
        self.seconds, self.cpu_seconds, self.lengths, self.phases = [], [], [], []  # of each step
        ours, theirs = socket.socketpair()
        env = os.environ | {"BENCH_SOCKET": str(theirs.fileno()), "BENCH_SEQUENCES": str(w.sequences), "HF_HUB_OFFLINE": "1"}
        env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, stdout=file, stderr=file)
        theirs.close()
        self.channel = ours.makefile("rw")

    def wait(self):
        line = self.channel.readline()
        if not line:
            sys.exit(f"{self.name} ended early:\n" + "".join(self.log.read_text()[-3000:]))
        before, self.latest = self.latest, json.loads(line)
        return self.latest["cpu_seconds"] - before.get("cpu_seconds", 0.0)

    def per_token(self, kind: str) -> float:
        """Of all steps together: what a step costs here depends on the lengths it drew, and TRL's steps hardly do."""
        return sum(getattr(self, kind)) / sum(self.lengths)

    def step(self, counts: bool):
        started = time.perf_counter()
        self.channel.write("go\n")
        self.channel.flush()
        cpu_seconds = self.wait()
        if counts:
            self.seconds.append(time.perf_counter() - started)
            self.cpu_seconds.append(cpu_seconds)
            self.lengths.append(self.latest["mean_length"])
            self.phases.append(self.latest["phases"])


def measure(systems: list[System], steps: int, title: str):
    try:
        for system in systems:
            system.wait()  # set-up and the first rollout
        for step in tqdm(range(-1, steps), desc=title, leave=False):
            for system in systems:
                system.step(counts=step >= 0)
    finally:
        for system in systems:
            system.process.kill()
            system.process.wait()


def report(title: str, systems: list[System], floors: dict[str, float]):
    first, floor = systems[0], sum(floors.values())
    for system in systems:
        ratio, cpu_ratio = (system.per_token(kind) / first.per_token(kind) for kind in ("seconds", "cpu_seconds"))
        memory = system.latest["megabytes"]
        against = f"{ratio:7.2f}x {cpu_ratio:7.2f}x {first.latest['megabytes'] / memory:7.2f}" if system is not first else f"{'':25}"
        cpu = statistics.median(system.cpu_seconds)
        print(
            f"{title:12} {system.name:24} {statistics.median(system.seconds):8.3f} {min(system.seconds):8.3f} - {max(system.seconds):7.3f}"
            f" {cpu:8.3f} {memory:6.0f} {against} {statistics.mean(system.lengths):7.1f} {cpu / floor:7.1f}x",
            flush=True,
        )
        if system is first:
            seconds = {name: statistics.median(phases[name] for phases in system.phases) for name in floors}
            parts = (f"{name} {seconds[name]:.3f} s, {seconds[name] / floors[name]:.1f}x its floor" for name in floors)
            print(f"{'':13}{'; '.join(parts)}", flush=True)


def has(python, module: str) -> bool:
    check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode == 0


def benchmark(options):
    out = functools.partial(subprocess.run, check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
    rate_command = [sys.executable, __file__, "--child", "rate", "--threads", str(options.threads)]
    rate = float(out(rate_command, capture_output=True, text=True).stdout.split()[-1])
    print(f"{options.threads} thread(s), float32 matrix products at {rate / 1e9:.1f} GFLOP/s")
    print(f"{'':37} {'seconds':>8} {'':18} {'CPU':>8} {'peak':>6} {'this one / first':>17} {'first':>7} {'tokens':>7} {'CPU':>8}")
    print(f"{'':37} {'median':>8} {'range':>18} {'seconds':>8} {'MB':>6} {'seconds':>8} {'CPU':>8} {'MB / MB':>7} {'mean':>7} {'/ floor':>8}")
    for algorithm in options.only:
        python = options.trl_python if algorithm == "grpo" else options.trl_ppo_python
        peer = "trl.trainer.grpo_trainer" if algorithm == "grpo" else "trl.experimental.ppo"
        with_trl = not options.no_trl and has(python, peer)
        if not with_trl:
            print(f"{algorithm}: no TRL ({'not wanted' if options.no_trl else f'{python} has no {peer}'}), so this project alone")
        for name in options.workload if algorithm == "grpo" else ["W1"]:
            with tempfile.TemporaryDirectory() as folder:
                options.name, folder = name, Path(folder)
                w = WORKLOADS[name]
                out(child_command(sys.executable, "build", folder, w, options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                commands = {"this project": child_command(sys.executable, f"ours-{algorithm}", folder, w, options)}
                for checkout in options.against:
                    commands[str(checkout)[-24:]] = child_command(sys.executable, f"ours-{algorithm}", folder, w, options, checkout)
                if with_trl:
                    commands["TRL"] = child_command(python, f"trl-{algorithm}", folder, w, options)
                epochs = f" {options.update_epochs} ep" if algorithm == "ppo" else ""
                systems = [System(n, c, w, options.threads, folder / f"{i}.log") for i, (n, c) in enumerate(commands.items())]
                measure(systems, options.steps or w.steps, name)
                length = statistics.mean(systems[0].lengths)
                floors = multiplications(w, length, algorithm, options.update_epochs)
                report(f"{algorithm} {name}{epochs}", systems, {phase: operations / rate for phase, operations in floors.items()})


def profile(options):
    """Print where the time of some steps of this project goes, operator by operator."""
    for algorithm in options.only:
        for name in options.workload if algorithm == "grpo" else ["W1"]:
            with tempfile.TemporaryDirectory() as folder:
                options.name, folder = name, Path(folder)
                w = WORKLOADS[name]
                subprocess.run(child_command(sys.executable, "build", folder, w, options), check=True)
                system = System(name, child_command(sys.executable, f"ours-{algorithm}", folder, w, options), w, options.threads, folder / "log")
                system.wait()
                for _ in range(options.steps or 3):
                    system.step(counts=True)
                system.channel.write("stop\n")
                system.channel.flush()
                system.process.wait()
                print(f"{algorithm} {name}\n{(folder / 'log').read_text()}")


def run_child(options):
    import torch

    torch.set_num_threads(options.threads)
    if options.child == "rate":
        return print(matrix_rate())
    system, _, algorithm = options.child.partition("-")
    w = WORKLOADS[options.workload[0]]
    if system == "build":
        build(options.folder, w)
    elif system == "trl":
        {"grpo": run_trl_grpo, "ppo": run_trl_ppo}[algorithm](options.folder, w, options)
    elif options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            try:
                run_ours(algorithm, options.folder, w, options)
            except KeyboardInterrupt:
                pass
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    else:
        run_ours(algorithm, options.folder, w, options)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), help="of GRPO; PPO runs W1 only")
    parser.add_argument("--only", nargs="+", default=["grpo", "ppo"], choices=["grpo", "ppo"])
    parser.add_argument("--steps", type=int, help="timed steps of each system (default: 5 to 20, by workload)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--update-epochs", type=int, default=1, help="of PPO (TRL's default is 4)")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl 1.16")
    parser.add_argument("--trl-ppo-python", default=sys.executable, help="an interpreter that has trl 1.10")
    parser.add_argument("--trl-micro-batch", type=int, help="sequences (default: what was fastest)")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="other checkouts of this project")
    parser.add_argument("--profile", action="store_true", help="print the operators of some steps of this project instead")
    for name in ("--child", "--folder", "--checkout"):
        parser.add_argument(name, type=Path if name in ("--folder", "--checkout") else str, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    options = parse()
    run_child(options) if options.child else profile(options) if options.profile else benchmark(options)
