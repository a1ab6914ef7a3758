"""The script from its command line to its folder: one real run, what a run costs, and what is refused with one line."""

import ast
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import helpers
import pytest
import runs
import safetensors.torch
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import grpo
import ppo
from runs import SHORT

ROOT = Path(__file__).parents[1]
STEPS = 30


def python(*arguments, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=170)


# ---------------------------------------------------------------- one real run, seed fixed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The built-in model and task for a few steps: (completed process, the run's folder)."""
    folder = tmp_path_factory.mktemp("finished")
    flags = f"--steps {STEPS} --warmup-steps 5 --eval-prompts 100 --eval-every 15 --eval-samples 2 --save-every 10 --output-dir run"
    process = python(ROOT / "grpo.py", *flags.split(), cwd=folder)
    assert process.returncode == 0, process.stderr
    return process, folder / "run"


@pytest.fixture(scope="module")
def events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[1]), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def last_line(process):
    line = process.stdout.strip().splitlines()[-1]
    pattern = r"done steps=(\d+) eval/accuracy_before=(\d\.\d+) eval/accuracy=(\d\.\d+) seconds=(\d+\.\d+) run=(\S+)"
    found = re.fullmatch(pattern, line)
    assert found, line
    return found.groups()


def test_accuracy_rises_and_the_last_line_says_so(finished):
    """Held-out prompts, greedy: 30 steps take this seed from 0.55 to 0.74."""
    steps, before, after, seconds, run = last_line(finished[0])
    assert int(steps) == STEPS and run == "run" and 0 < float(seconds) < 170
    assert 0.15 < float(before) < 0.65 and float(after) > float(before) + 0.12
    assert finished[0].stderr == ""


def test_tensorboard_has_every_scalar_with_finite_values(events):
    every_step = """
        reward/mean reward/std reward/frac_zero_std reward/exact objective/kl objective/kl_seq objective/kl_coef
        losses/policy_loss losses/approx_kl losses/clipfrac losses/entropy losses/grad_norm losses/skipped_updates charts/learning_rate
        completions/mean_length completions/truncated_ratio
        perf/tokens_per_second perf/rollout_seconds perf/update_seconds perf/peak_memory_gb perf/mfu
    """.split()
    evaluations = "eval/accuracy eval/accuracy_easy eval/accuracy_hard eval/pass@1 eval/pass@2".split()
    assert set(every_step + evaluations) <= set(events.Tags()["scalars"])
    for names, steps in ((every_step, list(range(1, STEPS + 1))), (evaluations, [0, 15, STEPS])):
        for name in names:
            assert [event.step for event in events.Scalars(name)] == steps, name
            assert all(torch.tensor(event.value).isfinite() for event in events.Scalars(name)), name


def test_scalars_have_the_values_that_their_names_promise(events, finished):
    values = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    _, before, after, *_ = last_line(finished[0])
    assert values["eval/accuracy"][0] == pytest.approx(float(before), abs=1e-3)
    assert values["eval/accuracy"][-1] == pytest.approx(float(after), abs=1e-3)
    assert all(1 <= length <= 5 for length in values["completions/mean_length"])
    for share in ("reward/frac_zero_std", "losses/clipfrac", "completions/truncated_ratio", "reward/mean", "eval/pass@2"):
        assert all(0 <= value <= 1 for value in values[share]), share
    for name in ("objective/kl", "losses/approx_kl", "losses/entropy", "losses/grad_norm"):
        assert all(value >= -1e-6 for value in values[name]), name
    assert values["reward/exact"] == values["reward/mean"]  # the only function
    for mean, std in zip(values["reward/mean"], values["reward/std"]):  # of a sample of 256 scores, 0 or 1
        assert std == pytest.approx((mean * (1 - mean) * 256 / 255) ** 0.5, abs=1e-5)
    peak = grpo.Args.__dataclass_fields__["learning_rate"].metadata["by_model"][0]
    schedule = type("Args", (), {"steps": STEPS, "warmup_steps": 5})
    want = [peak * common.learning_rate_share(schedule, step) for step in range(1, STEPS + 1)]
    assert values["charts/learning_rate"] == pytest.approx(want, rel=1e-5)
    assert values["eval/pass@2"][0] >= values["eval/pass@1"][0]


def test_tensorboard_has_arguments_and_samples_as_text(events):
    def text(tag):
        return events.Tensors(tag + "/text_summary")[-1].tensor_proto.string_val[0].decode()

    assert "| group_size | 8 |" in text("arguments") and f"| steps | {STEPS} |" in text("arguments")
    header, _, *rows = text("completions/samples").splitlines()
    assert header == "| prompt | completion | score |" and len(rows) == 4
    assert all(re.fullmatch(r"\| \d\d\+\d\d= \| [\d+=]* \| [01] \|", row) for row in rows), rows


def test_final_model_loads_in_transformers_and_reproduces_the_accuracy(finished):
    """transformers' own generate, with no setting but greedy, gets as many held-out sums right as the last line says."""
    process, run = finished
    model = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    rows = common.addition_rows("test")[::5]  # what --eval-prompts 100 takes
    prompts = torch.tensor(tokenizer([row["prompt"] for row in rows]).input_ids)
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=5)
    texts = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    right = sum(text == row["answer"] for text, row in zip(texts, rows))
    assert right / 100 == pytest.approx(float(last_line(process)[2]), abs=1e-9)
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<end>"
    trained = safetensors.torch.load_file(run / f"checkpoints/step-{STEPS:06}/policy.safetensors")
    assert trained and all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.items())


def test_args_json_holds_every_argument(finished):
    saved = json.loads((finished[1] / "args.json").read_text())
    assert set(saved) == {field.name for field in dataclasses.fields(grpo.Args)}
    assert (saved["steps"], saved["group_size"], saved["dataset"], saved["seed"]) == (STEPS, 8, "addition", 1)


def test_only_the_newest_checkpoints_are_kept_and_none_is_half_written(finished):
    assert sorted(path.name for path in (finished[1] / "checkpoints").iterdir()) == ["step-000020", "step-000030"]


# ---------------------------------------------------------------- what a run computes and what it does not


def counted(monkeypatch, name):
    """List of one entry for each call of common.<name> from here on."""
    calls, function = [], getattr(common, name)
    monkeypatch.setattr(common, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))
    return calls


@pytest.mark.parametrize(
    "flags, copies, passes",
    [
        ("--kl-coef 0", 0, 0),  # no reference; one update a rollout, so the old policy is the current one
        ("--kl-coef 0.1", 1, 2),  # a reference: one pass a step
        ("--kl-coef 0 --num-minibatches 2 --update-epochs 2", 0, 0),  # the sampler's log-probs are exact in float32
        ("--kl-coef 0 --dtype bfloat16", 1, 0),  # the copy that samples
        ("--kl-coef 0 --dtype bfloat16 --num-minibatches 2", 1, 2),  # and old log-probs in the trainer's precision
    ],
)
def test_models_and_passes_that_are_not_needed_do_not_exist(script, monkeypatch, tiny_folder, flags, copies, passes):
    frozen, logprobs = counted(monkeypatch, "frozen_copy"), counted(monkeypatch, "logprobs_without_gradient")
    assert script("--model", tiny_folder, *SHORT, *flags.split()) == 0
    assert (len(frozen), len(logprobs)) == (copies, passes)


def test_on_policy_training_takes_over_the_samplers_logprobs_and_learns_the_same(script, monkeypatch, tiny_folder, tmp_path):
    """One update a rollout: the trainer makes no logits before the backward pass. Two updates: it does."""
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_):\n    return [sum(i) / 10 for i in completion_ids]\n")
    flags = ["--reward", "rewards.py:length", "--learning-rate", "0.001", "--kl-coef", "0"]
    forward_passes, over_all_blocks = [], common.HeadLogprobs.over_all_blocks
    monkeypatch.setattr(common.HeadLogprobs, "over_all_blocks", lambda *inputs: forward_passes.append(1) or over_all_blocks(*inputs))

    def train(name, *more):
        forward_passes.clear()
        assert script("--model", tiny_folder, *SHORT, *flags, *more, "--output-dir", name) == 0
        return len(forward_passes), AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict()

    taken_over, weights = train("taken-over")
    off_policy, _ = train("off-policy", "--num-minibatches", "2")
    completion_logprobs = common.completion_logprobs
    monkeypatch.setattr(common, "completion_logprobs", lambda *args, from_sampler=False, **more: completion_logprobs(*args, **more))
    made_anew, same = train("made-anew")
    assert (made_anew - taken_over, off_policy - taken_over) == (2, 4)  # the optimiser steps; the rest is `check_model`'s
    assert max(float((weights[name] - same[name]).abs().max()) for name in weights) < 1e-5  # the steps are of 1e-4


@pytest.mark.parametrize("loss", list(grpo.LOSS_DEFAULTS))
def test_every_loss_runs_and_changes_the_policy(script, tiny_folder, tmp_path, capsys, loss):
    """A reward that some get: rewards the length, so that no group is without spread."""
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_):\n    return [float(len(i)) + sum(i) / 100 for i in completion_ids]\n")
    reward = ["--reward", "rewards.py:length", "--learning-rate", "0.01", "--num-minibatches", "2"]
    assert script("--model", tiny_folder, *SHORT, "--loss", loss, *reward, "--output-dir", "run") == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_folder, tmp_path / "run/final"))
    assert all(after[name].isfinite().all() for name in after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "done steps=2" in capsys.readouterr().out.splitlines()[-1]


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(script, tiny_folder, tmp_path):
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_):\n    return [sum(i) / 10 for i in completion_ids]\n")
    weights = []
    for i, seed in enumerate((3, 3, 4)):
        flags = ["--reward", "rewards.py:length", "--learning-rate", "0.01", "--seed", seed, "--output-dir", f"run{i}"]
        assert script("--model", tiny_folder, *SHORT, *flags) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"run{i}/final").get_output_embeddings().weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_only_bounds_memory_does_not_change_a_run(script, monkeypatch, tiny_folder, tmp_path):
    """Neither the weights nor a logged number, the gradient's norm among them (which Adam alone would hide)."""
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_):\n    return [sum(i) / 10 for i in completion_ids]\n")
    weights, logged, log = [], [], common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda run, step, metrics: logged.append(metrics) or log(run, step, metrics))
    lean = (["--micro-batch-tokens", 16384], ["--micro-batch-tokens", 30], ["--micro-batch-tokens", 1], ["--gradient-checkpointing"])
    for i, flags in enumerate(lean):
        flags = [*flags, "--reward", "rewards.py:length", "--kl-coef", "0.1", "--output-dir", f"run{i}"]
        assert script("--model", tiny_folder, *SHORT, *flags) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"run{i}/final").get_output_embeddings().weight)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=0)
    for first, *others in zip(*(logged[i : i + 3] for i in range(0, 12, 3))):  # each run: an evaluation and two steps
        for other in others:
            same = {name: value for name, value in other.items() if not name.startswith("perf/")}
            assert same == pytest.approx({name: first[name] for name in same}, rel=1e-4, abs=1e-6)
    assert float(logged[1]["losses/grad_norm"]) > 1e-3


@pytest.mark.parametrize("algorithm, backend", [("grpo", "inductor"), ("ppo", "aot_eager")])
def test_compiled_runs_log_what_others_do(algorithm, backend, tmp_path, monkeypatch):
    """Reference, policy and critic, with and without gradients, in float32 on a CPU."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(common, "matrix_rate", lambda *_: 1e9)
    materials, logged = runs.make_materials(tmp_path), []
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        argv = runs.arguments(materials, algorithm, tmp_path / name, micro_batch_tokens=2048, kl_coef=0.1, log_samples=0)
        with helpers.compiling_with(backend):
            assert runs.run_here(algorithm, [*argv, *flags]) == 0
        logged.append(runs.scalars(tmp_path / name))
    plain, compiled = logged
    assert plain.keys() == compiled.keys() and plain["losses/grad_norm"][3] > 1e-3
    for name in plain:
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name


def test_compiling_where_nothing_can_be_compiled_is_one_line_and_status_2(script, tiny_folder, monkeypatch, capfd):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    assert script("--model", tiny_folder, *SHORT, "--compile", "--output-dir", "run") == 2
    said = "grpo.py: error: --compile: torch.compile does not work here: RuntimeError: InvalidCxxCompiler: no"
    assert capfd.readouterr().err.splitlines()[-1].startswith(said)


def test_ref_refresh_makes_the_reference_the_current_policy(script, monkeypatch, tiny_folder, tmp_path):
    """With a refresh after step 1 the KL of step 2 is 0; without one it is not."""
    (tmp_path / "rewards.py").write_text("def length(completion_ids, **_):\n    return [sum(i) / 10 for i in completion_ids]\n")
    kl, log = [], common.Run.log
    monkeypatch.setattr(common.Run, "log", lambda run, step, metrics: kl.append(metrics.get("objective/kl")) or log(run, step, metrics))
    flags = ["--reward", "rewards.py:length", "--learning-rate", "0.01", "--kl-coef", "0.1"]
    for refresh in (0, 1):
        assert script("--model", tiny_folder, *SHORT, *flags, "--ref-refresh", refresh, "--output-dir", f"run{refresh}") == 0
    assert kl[1] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-4  # after an evaluation: steps 1 and 2
    assert kl[4] == pytest.approx(0, abs=1e-6) and kl[5] == pytest.approx(0, abs=1e-6)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_folder, tmp_path / "run1/final"))
    assert any(not torch.equal(before[name], after[name]) for name in before)  # not the policy that became the reference


def test_dynamic_sampling_replaces_groups_and_keeps_prompts_texts_and_scores_together():
    """Prompts that start with an even digit score 0 whatever is answered: others take their places, as far as allowed."""
    run = helpers.make_run(prompts_per_step=6, group_size=3, max_new_tokens=4, max_resamples=3)
    tokenizer = common.tiny_tokenizer()
    sampler = common.Sampler(common.tiny_model(tokenizer, 0), {tokenizer.eos_token_id}, 1.0, 4)
    texts = [f"{a}+{b}=" for a in range(8) for b in range(10, 13)]
    stream = common.PromptStream([common.Prompt(tokenizer(text).input_ids, text, {}) for text in texts], seed=0)

    def odd(prompts, completion_ids, **_):
        return [sum(ids) / 10 if int(prompt[0]) % 2 else 0.0 for prompt, ids in zip(prompts, completion_ids)]

    rewards = [common.Reward("odd", odd)]
    step_prompts = [prompt for prompt in stream.next(6) for _ in range(3)]
    rollout = sampler.sample([prompt.ids for prompt in step_prompts[::3]], 3, run.uniforms(1, 0, 18, 4))
    texts, ids = common.decode(tokenizer, rollout)
    scores = common.score(rewards, step_prompts, texts, ids)
    before = int(grpo.has_equal_scores(scores.total, 3).sum())
    kept = scores.total[~grpo.has_equal_scores(scores.total, 3).repeat_interleave(3)].tolist()
    replaced = grpo.resample_equal_groups(run, sampler, tokenizer, stream, rewards, 1, rollout, step_prompts, texts, ids, scores)

    after = int(grpo.has_equal_scores(scores.total, 3).sum())
    assert after < before <= replaced <= 3 * before
    assert set(kept) <= set(scores.total.tolist())
    new_texts, new_ids = common.decode(tokenizer, rollout)
    assert (texts, ids) == (new_texts, new_ids)
    assert scores.total.tolist() == pytest.approx(odd([prompt.prompt for prompt in step_prompts], new_ids))
    assert torch.equal(scores.by_function["odd"], scores.total)
    for b, prompt in enumerate(step_prompts):
        assert rollout.prompt_ids[b].tolist()[-len(prompt.ids) :] == prompt.ids
        assert step_prompts[b // 3 * 3] is prompt and rollout.prompt_index[b] == rollout.prompt_index[b // 3 * 3]
    with torch.no_grad():  # and the log-probs are those of these tokens after these prompts
        scored = common.completion_logprobs(sampler.model, rollout, 1.0)
    torch.testing.assert_close(scored, rollout.sampler_logprobs, atol=1e-4, rtol=0)


def test_evaluation_leaves_out_what_no_reward_applies_to():
    """Of four samples: prompt a has none that counts, b one that is right, c two of three right, d four wrong."""
    run = helpers.make_run(eval_samples=4, max_new_tokens=2)
    tokenizer = common.tiny_tokenizer()
    sampler = common.Sampler(common.tiny_model(tokenizer, 0), {tokenizer.eos_token_id}, 1.0, 2)
    verdicts = {"1+1=": [None] * 4, "1+2=": [1.0, None, None, None], "1+3=": [0.0, 1.0, None, 1.0], "1+4=": [0.0] * 4}
    prompts = [common.Prompt(tokenizer(text).input_ids, text, {"level": text[2]}) for text in verdicts]
    prompts[3].columns["level"] = None

    def some(prompts, **_):  # called with the greedy completions, one a prompt, and with the samples
        copies = len(prompts) // len(verdicts)
        return [score for text in prompts[::copies] for score in verdicts[text][:copies]]

    metrics = common.evaluate(run, sampler, tokenizer, prompts, common.Reward("some", some))
    assert metrics["eval/accuracy"] == metrics["eval/reward"] == pytest.approx(1 / 3)  # b is right, c and d are not
    levels = {name: value for name, value in metrics.items() if name.startswith("eval/accuracy_")}
    assert levels == {"eval/accuracy_2": 1.0, "eval/accuracy_3": 0.0}
    assert metrics["eval/pass@1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["eval/pass@2"] == pytest.approx((1 + 0) / 2) and metrics["eval/pass@4"] == 0.0


def test_an_evaluation_reward_that_gives_less_than_1_is_said_once(capsys):
    run, tokenizer = helpers.make_run(max_new_tokens=2), common.tiny_tokenizer()
    sampler = common.Sampler(common.tiny_model(tokenizer, 0), {tokenizer.eos_token_id}, 1.0, 2)
    prompts = [common.Prompt(tokenizer(text).input_ids, text, {}) for text in ("1+1=", "1+2=")]
    for scores, times in [([0.0, 0.0], 0), ([0.0, 1.0], 0), ([0.0, 0.9], 1), ([0.0, 0.9], 0)]:
        common.evaluate(run, sampler, tokenizer, prompts, common.Reward("some", lambda completions, scores=scores: scores))
        assert capsys.readouterr().out.count("warning: no evaluation answer gets 1 from some, which is what") == times


def test_a_weight_does_not_change_what_evaluation_counts_as_right():
    args = grpo.Args(reward=["exact", "format"], reward_weights=[0.5, 2.0])
    rewards, eval_reward = common.load_all_rewards(args, None)
    assert [reward.weight for reward in rewards] == [0.5, 2.0]
    assert (eval_reward.name, eval_reward.function, eval_reward.weight) == ("exact", common.exact_reward, 1.0)


def test_gsm8k_is_its_own_reward():
    for flags, name in (({}, "gsm8k"), ({"dataset": "d"}, "exact"), ({"reward": ["format"]}, "format")):
        (reward,), eval_reward = common.load_all_rewards(grpo.Args(model="m", **flags), None)
        assert reward.name == eval_reward.name == name


def test_a_file_with_a_reward_for_training_and_one_for_evaluation_is_executed_once(tmp_path):
    """A second module of it would have a name under which processes that a function spawns do not find it."""
    (tmp_path / "executed_once.py").write_text("def one(**_): pass\ndef other(**_): pass\n")
    args = grpo.Args(reward=[f"{tmp_path}/executed_once.py:one"], eval_reward=f"{tmp_path}/executed_once.py:other")
    (reward,), eval_reward = common.load_all_rewards(args, None)
    assert reward.function.__module__ == eval_reward.function.__module__ == "executed_once"


@pytest.mark.parametrize("flags", ["--dynamic-sampling", "--advantage rloo", "--advantage batch", "--overlong-buffer 2", "--tis-cap 0 --dtype bfloat16"])
def test_options_of_the_family_run_to_the_end(script, tiny_folder, tmp_path, flags, capsys):
    (tmp_path / "rewards.py").write_text("def some(completion_ids, **_):\n    return [None if i[0] % 3 == 0 else sum(i) / 10 for i in completion_ids]\n")
    assert script("--model", tiny_folder, *SHORT, "--reward", "rewards.py:some", "--eval-reward", "exact", *flags.split()) == 0
    assert "done steps=2" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("after", ["rollout.scores = scores.total", "    rollout.ref_logprobs = common."])
@pytest.mark.parametrize("module", [grpo, ppo])
def test_what_a_changed_script_scores_nan_counts_nowhere(module, after, tiny_folder, tmp_path):
    """A README's line: here completions of less than 4 tokens are rejected after they were scored, or passed by the reference."""
    source = Path(module.__file__).read_text()
    line = re.search(rf"^        {re.escape(after)}.*\n", source, re.MULTILINE)[0]
    assert source.count(line) == 1
    more = "        rollout.scores = rollout.scores.masked_fill((rollout.lengths < 4).to(run.device), math.nan)\n"
    (tmp_path / "changed.py").write_text(source.replace(line, line + more))
    changed = common.import_file(str(tmp_path / "changed.py"))
    flags = dict(model=str(tiny_folder), dataset="addition", device="cpu", steps=1, prompts_per_step=32, max_new_tokens=4)
    flags |= dict(temperature=3.0, eval_prompts=1, num_minibatches=1, update_epochs=1)
    for name, mine in (("before", module), ("after", changed)):
        assert mine.main(mine.Args(**flags, output_dir=str(tmp_path / name))) == 0
    lengths = [helpers.scalars(tmp_path / name)["completions/mean_length"][0] for name in ("before", "after")]
    assert lengths[0] < 4 and lengths[1] == 4


def test_dense_rewards_reach_the_update(script, tiny_folder, tmp_path):
    """A list of rewards, one a token, trains; all equal ones change nothing at all."""
    (tmp_path / "rewards.py").write_text(
        "def dense(completion_ids, **_):\n    return [[t / 10 for t in i] for i in completion_ids]\n"
        "def equal(completion_ids, **_):\n    return [[0.1] * len(i) for i in completion_ids]\n"
    )
    for name, same in (("dense", False), ("equal", True)):
        flags = ["--reward", f"rewards.py:{name}", "--eval-reward", "exact", "--kl-coef", "0", "--output-dir", name]
        assert script("--model", tiny_folder, *SHORT, *flags) == 0
        before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_folder, tmp_path / name / "final"))
        assert all(torch.equal(before[key], after[key]) for key in before) == same


def test_an_evaluation_that_judges_nothing_is_said(script, tiny_folder, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text("def none(prompts, **_):\n    return [None] * len(prompts)\n")
    for reward, said in (("rewards.py:none", True), ("exact", False)):
        assert script("--model", tiny_folder, *SHORT, "--reward", "exact", "--eval-reward", reward, "--output-dir", reward[-4:]) == 0
        assert ("none gives None to all evaluation prompts" in " ".join(capsys.readouterr().out.split())) == said


def test_replay_trains_on_the_completions_of_two_rollouts(tiny_folder, tmp_path, monkeypatch):
    """As README has it. From the second step on; what was sampled before keeps the log-probs that it was sampled with."""
    source = Path(grpo.__file__).read_text()
    for old, new in {
        "    for step in run.steps(": "    last = None\n    for step in run.steps(",
        "on_policy = args.update_epochs * args.num_minibatches == 1": "on_policy = False",
        '        run.phase("update")\n': '        last, joined = rollout, rollout.join(last) if last else rollout\n        run.phase("update")\n',
        "epoch, len(rollout) // G)": "epoch, len(joined) // G)",
        "minibatch = rollout.select(": "minibatch = joined.select(",
    }.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "changed.py").write_text(source)
    changed, seen, accumulate = common.import_file(str(tmp_path / "changed.py")), [], common.accumulate_gradients
    monkeypatch.setattr(common, "accumulate_gradients", lambda *args: seen.append(args[2]) or accumulate(*args))
    flags = ["--model", str(tiny_folder), *map(str, SHORT), "--num-minibatches", "2", "--output-dir", str(tmp_path / "run")]
    assert changed.main(common.parse_args(changed.Args, flags)) == 0
    sizes = [len(minibatch) for minibatch in seen]
    assert sizes[0] == sizes[1] and sizes[2:] == [2 * sizes[0]] * 2

    def rows(minibatches):
        parts = [[(*ids, round(sum(logprobs), 4)) for ids, logprobs in zip(part.completion_ids.tolist(), part.old_logprobs.tolist())] for part in minibatches]
        return Counter(tuple(x for x in row if x) for part in parts for row in part)

    assert not rows(seen[:2]) - rows(seen[2:])  # all that the first step saw is there again


def test_stopping_early_ends_a_run_as_usual(tiny_folder, tmp_path, capsys):
    """As README has it: `break` at the end of a step."""
    source, line = Path(grpo.__file__).read_text(), "        stopped = run.must_stop()\n"
    assert source.count(line) == 1
    (tmp_path / "changed.py").write_text(source.replace(line, "        if step == 2:\n            break\n" + line))
    changed = common.import_file(str(tmp_path / "changed.py"))
    flags = ["--model", str(tiny_folder), *map(str, SHORT), "--steps", "5", "--output-dir", str(tmp_path / "run")]
    assert changed.main(common.parse_args(changed.Args, flags)) == 0
    assert "done steps=2 " in capsys.readouterr().out.splitlines()[-1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


@pytest.mark.parametrize("flags, said", [("", False), ("--advantage rloo", True), ("--no-scale-rewards", True), ("--overlong-buffer 2", True)])
def test_flags_that_do_not_act_on_lists_of_rewards_are_said(tiny_folder, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def dense(completion_ids, **_):\n    return [[t / 10 for t in i] for i in completion_ids]\n")
    rewards = ["--reward", "rewards.py:dense", "--eval-reward", "exact"]
    grpo.main(common.parse_args(grpo.Args, ["--model", str(tiny_folder), *map(str, SHORT), *rewards, *flags.split()]))
    assert ("do not act on lists of rewards" in capsys.readouterr().out) == said


@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_functions_of_trl_read_the_state_and_log_numbers_and_columns(script, monkeypatch, tiny_folder, tmp_path, module):
    """Steps done at each call: the first evaluation, two rollouts, the last evaluation."""
    (tmp_path / "rewards.py").write_text(
        "def logs(completions, trainer_state, log_extra, log_metric, **_):\n"
        "    print(trainer_state.global_step, trainer_state.max_steps, file=open('seen.txt', 'a'))\n"
        "    log_extra('gold | one', ['x%d' % i for i in range(len(completions))])\n"
        "    log_metric('twice', trainer_state.global_step)\n"
        "    log_metric('twice', 3.0)\n"
        "    return [len(text) / 10 for text in completions]\n"
    )
    flags = ["--model", str(tiny_folder), *SHORT, "--reward", "rewards.py:logs", "--output-dir", "logs"]
    flags = [flag if module is grpo else flag.replace("group-size", "samples-per-prompt") for flag in flags]
    tables = []
    monkeypatch.setattr(SummaryWriter, "add_text", lambda self, name, text, step: tables.append((name, text)))
    assert module.main(common.parse_args(module.Args, flags)) == 0
    assert (tmp_path / "seen.txt").read_text().splitlines() == ["0 2", "0 2", "1 2", "2 2"]
    assert helpers.scalars(tmp_path / "logs")["reward/metric/twice"] == [1.5, 2.0]
    [first, _] = [text.splitlines() for name, text in tables if name == "completions/samples"]
    assert first[0] == "| prompt | completion | score | gold \\| one |" and first[1] == "| --- | --- | --- | --- |"
    assert [line.split(" | ")[-1] for line in first[2:]] == ["x0 |", "x2 |", "x4 |", "x6 |"]  # four of eight


def test_a_score_of_0_beside_lists_trains_and_lists_of_0_and_1_are_warned_of(script, tiny_folder, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(
        "def right(completion_ids, **_):\n    return [float(i[0] % 2) for i in completion_ids]\n"
        "def zeros(completion_ids, **_):\n    return [[0.0] * len(i) for i in completion_ids]\n"
        "def steps(completion_ids, **_):\n    return [[0.0] * (len(i) - 1) + [float(i[0] % 2)] for i in completion_ids]\n"
    )
    for names, learns in ((["right", "zeros"], True), (["steps"], False)):
        flags = [flag for name in names for flag in ("--reward", f"rewards.py:{name}")]
        flags += ["--eval-reward", "exact", "--kl-coef", "0", "--output-dir", names[0]]
        assert script("--model", tiny_folder, *SHORT, *flags) == 0
        assert (max(helpers.scalars(tmp_path / names[0])["losses/grad_norm"]) > 0) == learns
        assert ("give a wrong step -1" in capsys.readouterr().out) != learns


def test_table_of_samples_holds_no_control_characters(script, tiny_folder, tmp_path, capsys):
    """Line breaks, tabs, marks that turn the direction, and what clears a terminal: a cell stays on its line."""
    rows = [{"prompt": f"{i}+1=\r\n\t\x1b[2J\u2028\u202e\x07|é漢", "answer": "1"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert script("--model", tiny_folder, *SHORT, "--dataset", "rows.jsonl", "--max-prompt-tokens", "99", "--output-dir", "run") == 0
    shown = capsys.readouterr().out.splitlines()
    table = shown[shown.index("   score                         prompt completion") :]
    assert len(table) == 1 + 4 + 1 and table[-1].startswith("done ")
    assert all(line.isprintable() and "+1=" in line and "|é漢" in line for line in table[1:-1]), table


def test_explained_variance_of_equal_returns_is_no_number(script, tiny_folder, tmp_path):
    """Whatever the critic says: dividing by what rounding leaves of their variance gave -4e8."""
    (tmp_path / "rewards.py").write_text(
        "def equal(completions, **_):\n    return [0.3 for _ in completions]\n"
        "def other(completion_ids, **_):\n    return [float(len(i)) for i in completion_ids]\n"
    )
    flags = [flag.replace("--group-size", "--samples-per-prompt") for flag in SHORT]
    for name, is_known in (("equal", False), ("other", True)):
        learn = ["--critic-learning-rate", "0.01", "--num-minibatches", "1", "--kl-coef", "0"]
        assert script("--model", tiny_folder, *flags, *learn, "--reward", f"rewards.py:{name}", "--output-dir", name, module=ppo) == 0
        explained = helpers.scalars(tmp_path / name)["losses/explained_variance"]
        assert [math.isfinite(value) for value in explained] == [is_known] * 2, explained


# ---------------------------------------------------------------- arguments


def test_importing_does_nothing_but_define(tmp_path):
    """No network, no CUDA, no argument parsing, no output, no file, no change of the process."""
    program = f"""
import os, signal, socket, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["x", "--no-such-flag"]
os.environ.clear()  # of what these tests have set themselves
import torch, transformers
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from transformers import modeling_layers  # sets a variable of its own
def process(): return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_num_threads(), torch.initial_seed(), dict(os.environ)
before = process()
import common, grpo, ppo
assert before == process()
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""
    process = python("-c", program, cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_every_flag_is_read_somewhere(module):
    """`args.<field>`, also as run.args.<field>; setting it does not count."""
    read = set()
    for file in (f"{module.__name__}.py", "common.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if (owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")) == "args":
                    read.add(node.attr)
    assert not {field.name for field in dataclasses.fields(module.Args)} - read


def test_flags_take_dashes_and_underscores_and_lists_repeat():
    args = common.parse_args(grpo.Args, ["--group_size", "4", "--prompts-per-step=6", "--reward", "exact", "--reward", "format"])
    assert (args.group_size, args.prompts_per_step, args.reward) == (4, 6, ["exact", "format"])
    args = common.parse_args(grpo.Args, ["--no-scale-rewards", "--clip-high", "inf", "--reward-weights", "1", "0.5"])
    assert args.scale_rewards is False and args.clip_high == float("inf") and args.reward_weights == [1.0, 0.5]


@dataclasses.dataclass
class MoreArgs(grpo.Args):
    entropy_coef: float = 0.02
    is_new: bool = False
    layers: list[int] = dataclasses.field(default_factory=list)


def test_a_copied_script_may_have_plain_fields():
    """Without `flag` there is no help and no bound, but a flag all the same."""
    assert (MoreArgs().entropy_coef, MoreArgs().layers) == (0.02, [])
    argv = ["--entropy-coef", "0.1", "--is-new", "--layers", "1", "--layers", "2"]
    args = common.parse_args(MoreArgs, argv)
    assert (args.entropy_coef, args.is_new, args.layers, args.group_size) == (0.1, True, [1, 2], 8)
    assert common.parse_args(MoreArgs, common.as_flags(dataclasses.asdict(args))) == args


def test_arguments_from_python_may_be_paths_and_single_names_and_stay_what_they_are(tiny_folder, tmp_path):
    """So that a sweep may change --loss in between, whose defaults for the clip differ."""
    flags = dict(model=tiny_folder, steps=1, prompts_per_step=2, max_new_tokens=4, eval_prompts=2, eval_every=0, device="cpu")
    args = grpo.Args(**flags, dataset="addition", reward="exact", output_dir=tmp_path / "grpo")
    assert args.model == str(tiny_folder) and args.reward == ["exact"]
    before = dataclasses.asdict(args)
    assert grpo.main(args) == 0 and dataclasses.asdict(args) == before
    args.loss, args.output_dir = "dapo", str(tmp_path / "dapo")
    assert grpo.main(args) == 0
    clips = [json.loads((tmp_path / loss / "args.json").read_text())["clip_high"] for loss in ("grpo", "dapo")]
    assert clips == [0.2, 0.28]


def test_threads_that_a_reward_leaves_behind_do_not_keep_the_process(tmp_path):
    (tmp_path / "pool.py").write_text(
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\n\ndef judge(completions, **_):\n"
        "    with ThreadPoolExecutor(2) as pool:\n        return list(pool.map(lambda _: time.sleep(100), completions))\n"
    )
    flags = ["--reward", "pool.py:judge", "--reward-timeout", "1", "--eval-reward", "exact", "--eval-prompts", "2", "--output-dir", "run"]
    process = python(ROOT / "grpo.py", *flags, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr == "grpo.py: error: reward judge took longer than --reward-timeout 1 seconds\n"


def test_too_little_memory_is_one_line(script, tiny_folder, monkeypatch, capsys):
    """Python's and PyTorch's own: numbers that no machine has room for. Other errors stay what they are."""
    flags = ["--model", tiny_folder, "--dataset", "addition", "--max-new-tokens", "5", "--device", "cpu", "--eval-prompts", "2"]
    assert script(*flags, "--eval-samples", 10**13) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("grpo.py: error: out of memory: take more processes or, in a new run, fewer --prompts-per-step, ")
    monkeypatch.setattr(common, "evaluate", mock.Mock(side_effect=[MemoryError(), RuntimeError("shapes do not match")]))
    assert script(*flags) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--eval-samples (MemoryError)")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        script(*flags)


def test_the_number_of_processes_without_a_launcher_is_one_line(tmp_path):
    process = python(ROOT / "grpo.py", cwd=tmp_path, WORLD_SIZE="2")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("grpo.py: error: WORLD_SIZE is set, but not all that torchrun sets beside it: ")


def test_defaults_depend_on_the_model_and_dataset_of_tiny_is_addition():
    tiny, real = grpo.Args(), common.parse_args(grpo.Args, ["--model", "somebody/model"])
    assert (tiny.dataset, real.dataset) == ("addition", "gsm8k")
    for name in ("steps", "max_new_tokens", "learning_rate"):
        assert getattr(tiny, name) != getattr(real, name)
    with pytest.raises(common.UserError, match="--group-size must be at least 2"):
        grpo.Args(group_size=1)
    with pytest.raises(common.UserError, match="--kl-estimator must be one of k1, k2, k3, not K3"):
        grpo.Args(kl_estimator="K3")
    assert common.parse_args(grpo.Args, ["--kl-coef", "0"]).kl_coef == 0  # 0 is no missing value
    weights = common.parse_args(grpo.Args, ["--reward-weights", "-1e-3", "-.5"]).reward_weights
    assert weights == [-1e-3, -0.5]  # no flag called -1e-3


# ---------------------------------------------------------------- what the user must mend: one line, status 2


FILES = {
    "good.jsonl": '{"prompt": "1+1=", "answer": "2"}\n' * 20,
    "empty.jsonl": "",
    "blank.jsonl": "\n  \n",
    "broken.jsonl": '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+1=", \n',
    "array.jsonl": '[1, 2]\n',
    "number.jsonl": '{"prompt": 3}\n',
    "no_answer.jsonl": '{"prompt": "1+1="}\n' * 20,
    "rewards.py": "def good(completions, **_):\n    return [1.0] * len(completions)\n\nnot_a_function = 3\n",
    "syntax.py": "def f(:\n",
    "full/file.txt": "something",
}  # fmt: skip

# command line -> what the line must say; all of it found before a model loads
BAD_INPUT = {
    "--no-such-flag 3": "no-such-flag",
    "--group 4": "--group",
    "surplus": "surplus",
    "--steps": "--steps",
    "--group-size 1": "--group-size must be at least 2, not 1",
    "--group-size eight": "--group-size",
    "--group-size 2.5": "--group-size",
    "--group-size -8": "--group-size must be at least 2, not -8",
    "--steps 0": "--steps must be at least 1",
    "--prompts-per-step 0": "--prompts-per-step",
    "--max-new-tokens 0": "--max-new-tokens",
    "--micro-batch-tokens 0": "--micro-batch-tokens",
    "--learning-rate 0": "--learning-rate must be above 0",
    "--learning-rate nan": "--learning-rate must be a finite number, not nan",
    "--learning-rate inf": "--learning-rate must be a finite number",
    "--temperature 0": "--temperature must be at least 0.001",
    "--eval-dataset=": "--eval-dataset is empty",
    "--resume=": "--resume is empty",
    "--reward=": "--reward is empty",
    "--device=cpu:x": "--device cpu:x",
    "--temperature -1": "--temperature",
    "--kl-coef -0.1": "--kl-coef must be at least 0",
    "--kl-coef nan": "--kl-coef",
    "--clip-low -0.1": "--clip-low must be at least 0",
    "--clip-high nan": "--clip-high",
    "--clip-high 1e300": "--clip-high must be a finite number, not 1e+300",
    "--reward-timeout 1e20": "--reward-timeout must be at most",
    "--max-grad-norm 0": "--max-grad-norm",
    "--reward-timeout nan": "--reward-timeout",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--seed 2000000000000": "--seed",
    "--loss nosuch": "--loss",
    "--kl-estimator k4": "--kl-estimator",
    "--dtype float16": "--dtype",
    "--advantage gae": "--advantage",
    "--advantage rloo --scale-rewards": "--scale-rewards: --advantage rloo divides by no standard deviation",
    "--advantage batch --loss dr_grpo": "--advantage batch names the standard deviation to divide by: add --scale-rewards",
    "--loss cispo --clip-low 0.2": "--clip-low: --loss cispo bounds the ratio from above only",
    "--ref-refresh -1": "--ref-refresh",
    "--max-resamples 0": "--max-resamples",
    "--trust-remote-code perhaps": "--trust-remote-code",
    "--device warp": "--device warp",
    "--num-minibatches 33": "--num-minibatches 33",
    "--prompts-per-step 4 --num-minibatches 5": "--num-minibatches 5",
    "--num-minibatches 3": "--prompts-per-step 32 cannot be split evenly between --num-minibatches 3",
    "--reward nosuch": "no reward 'nosuch'",
    "--reward nosuch.py:f": "nosuch.py",
    "--reward rewards.py:nosuch": "nosuch",
    "--reward rewards.py:not_a_function": "not_a_function",
    "--reward syntax.py:f": "syntax.py:1",
    "--eval-reward nosuch": "nosuch",
    "--reward exact --reward-weights 1 2": "--reward-weights has 2 numbers for 1",
    "--reward exact --reward format --reward-weights 1": "--reward-weights has 1 numbers for 2 rewards",
    "--reward exact --reward-weights nan": "--reward-weights",
    "--reward exact --reward-weights inf": "--reward-weights",
    "--dataset nosuch.jsonl": "dataset nosuch.jsonl: No such file",
    "--dataset empty.jsonl": "empty.jsonl",
    "--dataset blank.jsonl": "blank.jsonl",
    "--dataset broken.jsonl": "broken.jsonl:2",
    "--dataset array.jsonl": "array.jsonl:1",
    "--dataset number.jsonl": "number.jsonl:1",
    "--dataset good.jsonl --prompt-column question": "--prompt-column",
    "--dataset good.jsonl --answer-column result": "--answer-column",
    "--dataset no_answer.jsonl": "answer",
    "--dataset nosuch/nosuch": "nosuch/nosuch",
    "--dataset ./nosuch/rows.json": "--dataset ./nosuch/rows.json: there is no such file or folder",
    "--eval-dataset nosuch.jsonl": "nosuch.jsonl",
    "--ref-refresh 2 --kl-coef 0": "--ref-refresh: with --kl-coef 0",
    "--overlong-buffer 6": "--overlong-buffer 6: more than --max-new-tokens 5",
    "--resume nosuch": "nosuch",
    "--resume full": "full",
    "--output-dir full": "--output-dir full: not empty, and nothing in it is overwritten (--resume goes on with a run)",
    "--output-dir rewards.py": "--output-dir rewards.py",
    "--output-dir rewards.py/run": "--output-dir rewards.py/run",
}


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.fixture
def with_files(tmp_path):
    (tmp_path / "full").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def assert_refused(status, captured, expected, folder, before):
    assert status == 2
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("grpo.py: error: "), captured.err
    assert expected in lines[0]
    assert "Traceback" not in captured.out + captured.err and "Error(" not in captured.err
    assert listing(folder) == before  # nothing was written


@pytest.fixture
def no_model_loads(monkeypatch):
    monkeypatch.setattr(common, "load_policy", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("command", list(BAD_INPUT))
def test_bad_input_is_one_line_and_status_2_before_a_model_loads(script, with_files, no_model_loads, capfd, command):
    before = listing(with_files)
    status = script("--device", "cpu", *command.split())
    assert_refused(status, capfd.readouterr(), BAD_INPUT[command], with_files, before)


# found with the tokenizer and the config at hand
BAD_WITH_TOKENIZER = {
    "--model nosuch": "--model nosuch",
    "--model full": "--model full",
    "--model ./no/such": "--model ./no/such: there is no such file or folder",
    "--model ./none": "--model ./none: there is no such file or folder",
    "--model DIR --system-prompt Hello": "--system-prompt",
    "--model DIR --max-prompt-tokens 3": "--max-prompt-tokens 3",
    "--model DIR --max-new-tokens 100": "--max-new-tokens 100",
    "--model DIR --reward-model nosuch": "--reward-model nosuch",
    "--model DIR --reward-model no/such/dir/at/all": "--reward-model no/such/dir/at/all: there is no such file or folder",
}


@pytest.mark.parametrize("command", list(BAD_WITH_TOKENIZER))
def test_what_the_tokenizer_shows_is_refused_before_the_weights_load(
    script, with_files, tiny_folder, no_model_loads, capfd, command
):
    before = listing(with_files)
    status = script(*SHORT, *command.replace("DIR", str(tiny_folder)).split())
    assert_refused(status, capfd.readouterr(), BAD_WITH_TOKENIZER[command], with_files, before)


def test_a_critic_that_is_not_there_is_refused_before_a_model_loads(script, with_files, no_model_loads, capfd):
    assert script("--device", "cpu", "--critic-model", "full", module=ppo) == 2
    assert capfd.readouterr().err.startswith("ppo.py: error: --critic-model full: cannot be loaded: ")
    assert script("--device", "cpu", "--critic-model", "../none", module=ppo) == 2
    assert capfd.readouterr().err == "ppo.py: error: --critic-model ../none: there is no such file or folder\n"


def test_a_default_folder_that_cannot_be_made_is_refused_before_a_model_loads(script, with_files, no_model_loads, capfd):
    (with_files / "runs").write_text("a file")
    before = listing(with_files)
    assert_refused(script("--device", "cpu"), capfd.readouterr(), "runs is a file, or", with_files, before)


def test_a_folder_whose_name_is_too_long_is_refused_in_one_line(script, tiny_folder, capfd):
    assert script("--model", tiny_folder, *SHORT, "--output-dir", "x" * 300) == 2
    assert capfd.readouterr().err.startswith(f"grpo.py: error: --output-dir {'x' * 300}: cannot be written: OSError: ")


def test_a_folder_beside_the_runs_is_in_nobodys_way(with_files, monkeypatch):
    monkeypatch.chdir(with_files)
    (with_files / "runs/new").mkdir(parents=True)
    (with_files / "runs/new/args.json").write_text("{}")
    assert common.Run(common.parse_args(grpo.Args, ["--device", "cpu"])).folder is None


def test_more_positions_than_the_model_has_are_refused(script, with_files, capfd, tmp_path_factory):
    """A model with a table of positions cannot write more tokens than that has."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = common.tiny_tokenizer()
    helpers.make_model("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before = listing(with_files)
    status = script("--model", folder, *SHORT, "--max-new-tokens", "100")
    assert_refused(status, capfd.readouterr(), "--max-new-tokens", with_files, before)


@pytest.mark.parametrize("more", [0, 20])
def test_a_bad_answer_is_named_with_file_and_line(tmp_path, more):
    """Among the rows to train on (there are fewer than 10), and wherever the split puts it."""
    good, path = {"prompt": "a", "answer": "#### 1", "target": 5, "nums": [2, 3]}, tmp_path / "rows.jsonl"
    for name, bad, named in [
        ("gsm8k", {"answer": "none"}, "reward gsm8k: no number in the answer 'none'; .* --answer-column"),
        ("countdown", {"nums": ["x", 3]}, "reward countdown: .*'x'"),
        ("countdown", {"nums": 5}, "reward countdown: .*not iterable"),
        ("countdown", {"target": "1/0"}, "reward countdown: .*1"),
    ]:
        path.write_text("\n".join(map(json.dumps, [good] * 3 + [good | bad] + [good] * more)))
        args = grpo.Args(dataset=str(path), reward=[name])
        with pytest.raises(common.UserError, match=rf"^{path}:4: {named}"):
            common.load_train_and_eval_rows(args, *common.load_all_rewards(args, None))


def test_a_reward_that_fails_in_the_run_is_one_line_and_status_2(script, with_files, tiny_folder, capfd):
    (with_files / "fails.py").write_text("def f(completions, **_):\n    return [1 / 0 for _ in completions]\n")
    assert script("--model", tiny_folder, *SHORT, "--reward", "fails.py:f") == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and "fails.py:2" in error[0] and "ZeroDivisionError" in error[0]


def test_bad_input_in_a_process_of_its_own(with_files):
    command = "--dataset broken.jsonl"
    before = listing(with_files)
    process = python(ROOT / "grpo.py", *command.split(), cwd=with_files)
    assert process.returncode == 2 and process.stdout == "" and listing(with_files) == before
    assert process.stderr.startswith("grpo.py: error: ") and process.stderr.count("\n") == 1
    assert BAD_INPUT[command] in process.stderr


@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_help_names_every_flag_in_one_form(script, capsys, module):
    assert script("--help", module=module) == 0
    text = capsys.readouterr().out
    assert all("--" + field.name.replace("_", "-") in text for field in dataclasses.fields(module.Args))
    assert not re.search(r"--\w+_", text)
