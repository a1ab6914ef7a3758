"""Short real runs of both scripts for several test files: a model that needs no warm start, prompts, rewards, launching."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import grpo
import ppo

ROOT = Path(__file__).parents[1]
SCRIPTS = {"grpo": grpo, "ppo": ppo}
SHORT = "--dataset addition --steps 2 --prompts-per-step 4 --group-size 2 --max-new-tokens 4 --eval-prompts 4 --device cpu".split()

REWARDS = '''
import os, random, signal
from pathlib import Path

import numpy
import torch

rank, world, calls = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), 0
act, _, at = os.environ.get("ACT", "").partition(" at call ")  # what the last process does; evaluation is a call, too

def digits(completions, answer, completion_ids, **_):
    """Digits of the answer in the completion, and noise; writes down how many tokens this process has sampled."""
    global calls
    calls += 1
    noise = 0.01 * (random.random() + numpy.random.rand() + torch.rand(()).item()) if os.environ.get("NOISE") else 0.0
    if act and calls == int(at) and rank == world - 1:
        for name in act.split(" and "):
            if name == "error":
                raise RuntimeError("on the last process alone")
            os.kill(os.getpid(), getattr(signal, name))
    with open(Path(__file__).with_name("tokens.txt"), "a") as file:
        print(rank, sum(map(len, completion_ids)), file=file)
    return [sum(text.count(digit) for digit in want) / (1 + len(text)) + noise * i
            for i, (text, want) in enumerate(zip(completions, answer))]

def uneven(completions, answer, completion_ids, **_):
    """The same score, but the same one for all answers to about half of the prompts, which dynamic sampling replaces."""
    return [0.25 if want[0] in "02468" else score for score, want in zip(digits(completions, answer, completion_ids), answer)]

def lists(completions, answer, completion_ids, **_):
    """The same score, for a few prompts in two parts; writes down whether this process has such a prompt."""
    scores = digits(completions, answer, completion_ids)
    with open(Path(__file__).with_name("lists.txt"), "a") as file:
        print(rank, any(want[0] == "5" for want in answer), file=file)
    return [[0.5] + [0] * (len(ids) - 2) + [score - 0.5] if want[0] == "5" and len(ids) > 1 else score
            for score, want, ids in zip(scores, answer, completion_ids)]
'''


def make_materials(folder):
    """A model of random weights, which ends its completions at random, 60 prompts and a file of rewards."""
    tokenizer = common.tiny_tokenizer()
    common.tiny_model(tokenizer, seed=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, common.addition_rows("train")[:60])))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def arguments(materials, script, output, **changed):
    """The command line of a run of 3 steps; a learning rate of 1e-4, since Adam magnifies rounding in gradients near 0."""
    flags = dict(model=materials / "model", dataset=materials / "prompts.jsonl", output_dir=output, device="cpu")
    flags |= dict(reward="digits", max_new_tokens=12, micro_batch_tokens=64)
    flags |= dict(steps=3, prompts_per_step=8, update_epochs=2, num_minibatches=2, eval_every=0, eval_prompts=4)
    flags |= dict(learning_rate=1e-4, warmup_steps=0)
    flags |= dict(group_size=4) if script == "grpo" else dict(samples_per_prompt=4, critic_learning_rate=1e-4)
    flags |= changed
    flags["reward"] = flags["reward"] if ":" in str(flags["reward"]) else f"{materials / 'rewards.py'}:{flags['reward']}"
    return [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), str(value))]


def run_here(script, argv):
    """A run in this process; returns the exit status."""
    module = SCRIPTS[script]
    return module.main(common.parse_args(module.Args, argv))


def command(script, argv, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / f"{script}.py"), *argv]


def environment(**added):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **added}


def launch(script, argv, processes=1, timeout=300, act="", **options):
    """A run in processes of its own, to its end; output and errors come together as text unless `options` say else."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | options
    argv = command(script, argv, processes)
    with tempfile.TemporaryDirectory() as folder:  # torchrun leaves a folder of logs
        env = environment(ACT=act, TMPDIR=folder)
        return subprocess.run(argv, env=env, text=True, timeout=timeout, check=False, **options)


def final_weights(output):
    return safetensors.torch.load_file(output / "final" / "model.safetensors")


def largest_difference(output, other):
    """Between the final weights of two runs."""
    a, b = final_weights(output), final_weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def scalars(output):
    """What TensorBoard shows of a run: name -> {step: value}, without what depends on the clock. No step twice."""
    reader = EventAccumulator(str(output), size_guidance={"scalars": 0}).Reload()
    events = {name: reader.Scalars(name) for name in reader.Tags()["scalars"] if not name.startswith("perf/")}
    for name, points in events.items():
        steps = [point.step for point in points]
        assert steps == sorted(set(steps)), (name, steps)
    return {name: {point.step: point.value for point in points} for name, points in events.items()}
