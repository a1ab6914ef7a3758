"""A run loses nothing: checkpoints complete or absent, the same end after any interruption, the same curves.

KILLS=20 python -m pytest tests/test_resume.py -k killed    kills a run 20 times, not 3
"""

import dataclasses
import errno
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from threading import Lock

import numpy
import pytest
import safetensors.torch
import torch

import common
import grpo
import helpers
import ppo
import runs

# Together they cover what a checkpoint has to hold: optimiser and schedule, the KL controller, a stream of prompts that
# dynamic sampling moves on unevenly, and all random states (the reward draws noise from two of them).
FLAGS = {
    "grpo": dict(steps=5, save_every=2, reward="uneven", dynamic_sampling=True, num_minibatches=1, warmup_steps=3),
    "ppo": dict(steps=5, save_every=2, kl_target=0.01, kl_horizon=50, warmup_steps=3),
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return runs.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def undisturbed(materials):
    """script -> the folder of a run of 5 steps that nothing disturbed, with checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOISE", "1")
        for script in ("grpo", "ppo"):
            assert runs.run_here(script, runs.arguments(materials, script, materials / script, **FLAGS[script])) == 0
    assert all(runs.scalars(materials / "grpo")["reward/resampled_groups"].values())  # in every step
    return {script: materials / script for script in ("grpo", "ppo")}


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    monkeypatch.setenv("NOISE", "1")


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """A copy of the GRPO run as if it had been killed in step 5."""
    return Path(shutil.copytree(undisturbed["grpo"], tmp_path / "run", ignore=shutil.ignore_patterns("final")))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_end(got, want):
    a, b = runs.final_weights(got), runs.final_weights(want)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert runs.scalars(got) == runs.scalars(want)


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- The same end ----


@pytest.mark.parametrize("script", ["grpo", "ppo"])
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP and SIGHUP", 129)])
def test_stopped_run_resumes_to_the_same_bits(script, name, status, materials, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACT", f"{name} at call 4")  # in step 3 or, resampling, before: not where a checkpoint is due
    monkeypatch.chdir(tmp_path)  # the command runs where the run was started
    argv = runs.arguments(materials, script, tmp_path / "run", **FLAGS[script])
    assert runs.run_here(script, argv) == status
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"stopped after step {names(tmp_path / 'run' / 'checkpoints')[-1][-1]}; to go on: " + (
        f"python {os.path.relpath(runs.ROOT / script)}.py --resume {tmp_path / 'run'}"
    )
    monkeypatch.delenv("ACT")
    assert runs.run_here(script, shlex.split(said[-1].partition("to go on: python ")[2])[1:]) == 0
    assert_same_end(tmp_path / "run", undisturbed[script])


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_reward_function_that_fails_costs_no_step(script, materials, undisturbed, tmp_path, monkeypatch):
    """Not even without --save-every. In GRPO at a call of dynamic sampling, of which there are up to three a step."""
    monkeypatch.setenv("ACT", f"error at call {12 if script == 'grpo' else 4}")
    argv = runs.arguments(materials, script, tmp_path / "run", **FLAGS[script] | {"save_every": 0})
    with pytest.raises(common.UserError, match="on the last process alone.*; the steps before are saved; to go on: "):
        runs.run_here(script, argv)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]
    monkeypatch.delenv("ACT")
    assert runs.run_here(script, ["--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed[script])


@pytest.mark.parametrize("call", [4, 7])
def test_reward_function_that_fails_in_an_evaluation_costs_nothing(call, materials, tmp_path, monkeypatch, capsys):
    """In that after step 2, or in the last one, after which only the evaluation is left to do."""
    assert runs.run_here("grpo", runs.arguments(materials, "grpo", tmp_path / "undisturbed", steps=4, eval_every=2)) == 0
    monkeypatch.setenv("ACT", f"error at call {call}")
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=4, eval_every=2)
    with pytest.raises(common.UserError, match="on the last process alone.*; the steps before are saved; to go on: "):
        runs.run_here("grpo", argv)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002" if call == 4 else "step-000004"]
    monkeypatch.delenv("ACT")
    evaluate, seen = common.evaluate, []
    monkeypatch.setattr(common, "evaluate", lambda run, *args: seen.append(run.trainer_state.global_step) or evaluate(run, *args))
    assert runs.run_here("grpo", ["--resume", str(tmp_path / "run")]) == 0
    assert seen == ([2, 4] if call == 4 else [4])  # what reward functions are told
    assert "nan" not in capsys.readouterr().out.splitlines()[-1]
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_memory_that_runs_out_while_sampling_costs_no_step(script, materials, undisturbed, tmp_path, monkeypatch, capsys):
    sample, calls = common.Sampler.sample, []

    def greedy_of_memory(self, prompts, group_size, uniforms):
        calls.extend([1] * (uniforms is not None and len(prompts) > 2))  # without evaluations and the check of the model
        if len(calls) == 4:
            raise MemoryError
        return sample(self, prompts, group_size, uniforms)

    monkeypatch.setattr(common.Sampler, "sample", greedy_of_memory)
    argv = runs.arguments(materials, script, tmp_path / "run", **FLAGS[script] | {"save_every": 0})
    with pytest.raises(common.UserError, match="^out of memory: take more processes or, .* \\(MemoryError\\); the steps before are saved; to go on: "):
        runs.run_here(script, argv)
    monkeypatch.undo()
    monkeypatch.setenv("NOISE", "1")
    assert [path.name for path in common.checkpoints_of(tmp_path / "run")] == ["step-000003" if script == "ppo" else "step-000002"]
    capsys.readouterr()
    assert runs.run_here(script, ["--resume", str(tmp_path / "run")]) == 0
    assert "first rollout since resuming: " in capsys.readouterr().out
    assert_same_end(tmp_path / "run", undisturbed[script])


def test_evaluations_do_not_change_what_rewards_draw(materials, tmp_path):
    """Else --eval-every, which may change on --resume, would change the training."""
    for name, every in (("often", 1), ("never", 0)):
        assert runs.run_here("ppo", runs.arguments(materials, "ppo", tmp_path / name, eval_every=every)) == 0
    assert runs.largest_difference(tmp_path / "often", tmp_path / "never") == 0


def test_other_prompts_than_those_the_run_began_with_are_said(stopped, materials, tmp_path, capsys):
    """Not where only the place of the file has changed."""
    rows = (materials / "prompts.jsonl").read_text()
    args = json.loads((stopped / "args.json").read_text())
    for name, text in (("moved.jsonl", rows), ("changed.jsonl", rows.replace('"level": "easy"', '"level": "light"', 1))):
        (tmp_path / name).write_text(text)
        (stopped / "args.json").write_text(json.dumps(args | {"dataset": str(tmp_path / name), "steps": 4}))
        assert runs.run_here("grpo", ["--resume", str(stopped)]) == 0
        said = f"{name}: its prompts are not those that the run was started with" in capsys.readouterr().out
        assert said == (name == "changed.jsonl")
        shutil.rmtree(stopped / "final")


def test_reward_function_that_fails_in_the_first_step_leaves_no_checkpoint(materials, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT", "error at call 2")
    with pytest.raises(common.UserError, match="on the last process alone") as caught:
        runs.run_here("ppo", runs.arguments(materials, "ppo", tmp_path / "run"))
    assert "saved" not in str(caught.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_five_gradients_in_a_row_that_are_not_finite_end_the_run_with_a_checkpoint(materials, tmp_path, monkeypatch):
    """Four optimiser steps a rollout: from the first of step 2 on, so that the fifth is the first of step 3."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def fails_from_step_2(*arguments):
        calls.append(clip(*arguments))
        return calls[-1] if len(calls) <= 4 else torch.tensor(math.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fails_from_step_2)
    with pytest.raises(common.UserError, match="^8 gradients in a row were not finite.* saved in .*checkpoints$"):
        runs.run_here("grpo", runs.arguments(materials, "grpo", tmp_path / "run", steps=6))
    monkeypatch.undo()
    assert [path.name for path in common.checkpoints_of(tmp_path / "run")] == ["step-000003"]
    assert runs.scalars(tmp_path / "run")["losses/skipped_updates"] == {1: 0.0, 2: 4.0, 3: 4.0}
    assert runs.run_here("grpo", ["--resume", str(tmp_path / "run")]) == 0
    assert runs.scalars(tmp_path / "run")["losses/skipped_updates"] == {1: 0.0, 2: 4.0, 3: 4.0, 4: 0.0, 5: 0.0, 6: 0.0}


def test_a_notebook_gets_its_ctrl_c_back_after_an_error_in_the_update(materials, tmp_path, monkeypatch):
    def fails(*_):
        raise common.UserError("out of GPU memory")

    monkeypatch.setattr(common, "clip_and_step", fails)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(common.UserError, match="out of GPU memory"):
        runs.run_here("ppo", runs.arguments(materials, "ppo", tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before


ENDS = {"": 0, "SIGINT at call 3": 130, "error at call 3": common.UserError, "SIGINT and SIGINT at call 3": KeyboardInterrupt}


@pytest.mark.parametrize(("act", "end"), ENDS.items())
def test_a_notebook_gets_its_ctrl_c_back(act, end, materials, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT", act)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    argv = runs.arguments(materials, "grpo", tmp_path / "run")
    if isinstance(end, int):
        assert runs.run_here("grpo", argv) == end
    else:
        with pytest.raises(end):
            runs.run_here("grpo", argv)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_resumed_run_may_be_stopped_again_and_moved(materials, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "0"
    monkeypatch.setenv("ACT", "SIGINT at call 2")
    assert runs.run_here("ppo", runs.arguments(materials, "ppo", folder, **FLAGS["ppo"])) == 130
    monkeypatch.setenv("ACT", "SIGINT at call 1")
    for i in range(1, 4):
        folder = folder.rename(tmp_path / str(i))
        assert runs.run_here("ppo", ["--resume", str(folder)]) == 130
    monkeypatch.delenv("ACT")
    assert runs.run_here("ppo", ["--resume", str(folder)]) == 0
    assert_same_end(folder, undisturbed["ppo"])


def test_killed_run_resumes_to_the_same_bits(materials, tmp_path):
    """Real processes, ended by SIGKILL at random moments: while loading, sampling, updating or writing."""
    kills, chance = int(os.environ.get("KILLS", 3)), random.Random(os.environ.get("KILLS_SEED", 0))
    flags = dict(steps=12 * kills, save_every=1, keep_checkpoints=2, dynamic_sampling=True)
    assert runs.run_here("grpo", runs.arguments(materials, "grpo", tmp_path / "undisturbed", **flags)) == 0
    argv, done = runs.arguments(materials, "grpo", tmp_path / "run", **flags), []
    for _ in range(kills):
        process = subprocess.Popen(runs.command("grpo", argv), env=runs.environment(), stdout=subprocess.DEVNULL)
        while not (tmp_path / "run" / "checkpoints").is_dir() or not done and not names(tmp_path / "run" / "checkpoints"):
            assert process.poll() is None
            time.sleep(0.01)
        if done:  # a resumed one: let it get somewhere, most times
            newest, patience = names(tmp_path / "run" / "checkpoints")[-1], time.time() + chance.choice([2, 60, 60])
            while names(tmp_path / "run" / "checkpoints")[-1] == newest and time.time() < patience:
                time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        assert process.poll() is None, "it was to be killed before its end"
        process.kill()
        process.wait()
        done.append([name for name in names(tmp_path / "run" / "checkpoints") if name.startswith("step-")][-1])
        argv = ["--resume", str(tmp_path / "run")]
    assert runs.run_here("grpo", argv) == 0
    print("killed after", *done)
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")
    assert len(names(tmp_path / "run" / "checkpoints")) == 2  # nothing half-written is left


def test_events_are_read_after_those_of_the_same_second(tmp_path):
    """TensorBoard reads a folder's files by name, which begins with the second: what came later must be read later."""
    run = helpers.make_run()
    run.args.resume = str(tmp_path)
    older = tmp_path / f"events.out.tfevents.{int(time.time())}.zz.9"
    older.touch()
    run.open_folder(resumed_at=3)
    run.writer.close()
    assert len(names(tmp_path)) == 2 and names(tmp_path)[0] == older.name


def test_exit_status_and_command_of_a_real_process(materials, tmp_path):
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=1000)
    process = subprocess.Popen(
        runs.command("grpo", argv), env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert any(line.startswith("first rollout") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 143
    assert errors == ""
    assert re.search(r"^stopped after step \d+; to go on: python grpo.py --resume ", said.splitlines()[-1])


@pytest.mark.parametrize("lost", ["terminal", "pipe"])
def test_a_run_whose_output_goes_away_saves_a_checkpoint(lost, materials, tmp_path):
    """A terminal that is closed sends SIGHUP; Ctrl-C in `python grpo.py | tee log` ends tee as well."""
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=1000)
    ours, theirs = os.openpty() if lost == "terminal" else os.pipe()
    command = ["setsid", "--ctty", *runs.command("grpo", argv)] if lost == "terminal" else runs.command("grpo", argv)
    process = subprocess.Popen(command, env=runs.environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while b"first rollout" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    if lost == "pipe":
        process.send_signal(signal.SIGINT)
    assert process.wait(100) == (129 if lost == "terminal" else 130)
    assert [name.startswith("step-") for name in names(tmp_path / "run" / "checkpoints")] == [True]


FORKING = """
import multiprocessing, time
def judged(completions, answer, **_):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join()
    assert child.exitcode == -15, child.exitcode
    return [float(len(text)) for text in completions]
"""


def test_a_reward_function_may_terminate_processes_that_it_forks(materials, tmp_path, capsys):
    (tmp_path / "forking.py").write_text(FORKING)
    argv = runs.arguments(materials, "grpo", tmp_path / "run", reward=f"{tmp_path / 'forking.py'}:judged", reward_timeout=20)
    assert runs.run_here("grpo", argv) == 0
    assert "stopping" not in capsys.readouterr().out


def test_output_that_cannot_show_a_completion_ends_no_run(materials, tmp_path, monkeypatch):
    """Completions of a tokenizer whose digits are Greek letters, on a terminal of ASCII."""
    shutil.copytree(materials / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(re.sub(r'"([0-9])"(?=:)', lambda digit: f'"{chr(0x3B1 + int(digit[1]))}"', path.read_text()))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "\u03b1\u03b2+", "answer": "\u03b3"}\n' * 12)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    flags = dict(model=tmp_path / "model", dataset=tmp_path / "prompts.jsonl", steps=1)
    result = runs.launch("grpo", runs.arguments(materials, "grpo", tmp_path / "run", **flags))
    assert result.returncode == 0, result.stdout
    assert "??+" in result.stdout and result.stdout.splitlines()[-1].startswith("done steps=1")


def test_a_second_run_of_the_same_second_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    folders = []
    for _ in range(3):
        run = helpers.make_run()
        run.open_folder()
        run.close()
        folders.append(run.folder.name.removeprefix("grpo__tiny__addition__1__"))
    assert folders == ["now", "now-2", "now-3"]


def test_what_a_user_keeps_beside_the_checkpoints_is_left_alone(stopped):
    folder = stopped / "checkpoints"
    kept = [folder / name for name in ("step-000004-best", "step-best")]
    for copy in kept:
        shutil.copytree(folder / names(folder)[-1], copy)
    (folder / ".step-000003.partial").mkdir()  # but not what a killed run has half written
    assert [path.name for path in common.checkpoints_of(stopped)] == ["step-000002", "step-000004"]
    assert runs.run_here("grpo", ["--resume", str(stopped), "--keep-checkpoints", "1", "--save-every", "1"]) == 0
    assert names(folder) == sorted([*(copy.name for copy in kept), "step-000005"])


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", -15)])
def test_second_signal_and_one_before_training_stop_at_once(name, status, materials, tmp_path):
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=1000)
    result = runs.launch("grpo", argv, act=f"{name} and {name} at call 3")
    assert result.returncode == status
    assert result.stdout.splitlines()[-1] == "stopping after this step, with a checkpoint; once more stops at once"
    argv = runs.arguments(materials, "grpo", tmp_path / "other", steps=1000)
    result = runs.launch("grpo", argv, act=f"{name} at call 1")  # the evaluation before the first step
    assert result.returncode == status and "Traceback" not in result.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_killed_between_last_step_and_final_model(materials, undisturbed, tmp_path, monkeypatch):
    argv = runs.arguments(materials, "grpo", tmp_path / "run", **FLAGS["grpo"] | {"save_every": 5})
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_final", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run_here("grpo", argv)
    assert runs.run_here("grpo", ["--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed["grpo"])


# ---- Damaged and missing checkpoints ----


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "policy.safetensors"),
    "a bit of the state": lambda folder: flip(folder / "state.pt"),
    "cut off": lambda folder: os.truncate(folder / "reference.safetensors", 1000),
    "a file lost": lambda folder: (folder / "state.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 50),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, stopped, undisturbed, capsys):
    DAMAGES[damage](stopped / "checkpoints" / "step-000004")
    assert runs.run_here("grpo", ["--resume", str(stopped)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: \S+step-000004 is damaged \(.+\); taking the one before", said)
    assert re.search(r"resuming after step 2 from \S+step-000002", said)
    assert_same_end(stopped, undisturbed["grpo"])
    assert names(stopped / "checkpoints") == ["step-000002", "step-000004"]


def test_nothing_but_damaged_checkpoints(stopped):
    for folder in (stopped / "checkpoints").iterdir():
        DAMAGES["a bit"](folder)
    before = content(stopped)
    with pytest.raises(common.UserError, match="no undamaged checkpoint"):
        runs.run_here("grpo", ["--resume", str(stopped)])
    assert content(stopped) == before


def test_a_digest_is_of_the_whole_file(tmp_path):
    """Weights are longer than what is read of them at once."""
    path, data = tmp_path / "weights", bytearray(3 * 2**20)
    digests = set()
    for changed in (None, 0, 2**20, len(data) - 1):
        if changed is not None:
            data[changed] ^= 1
        path.write_bytes(data)
        digests.add(common.file_digest(path))
    assert len(digests) == 4


def test_what_is_saved_of_a_model_are_parameters_and_buffers_that_persist():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    model.register_buffer("kept", torch.ones(1)), model.register_buffer("made_anew", torch.ones(1), persistent=False)
    model.tied = model[0]
    weights = common.weights_of(model)
    norm = ["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert sorted(weights) == sorted(["0.weight", "0.bias", *norm, "kept"]) and weights["kept"] is model.kept
    turned = common.gathered(helpers.make_run(), {"turned": torch.ones(2, 3).t()})["turned"]
    assert turned.shape == (3, 2) and turned.is_contiguous()  # else safetensors refuses it


def test_checkpoint_is_no_place_for_code(stopped):
    """A manipulated state.pt, with a manifest that fits, is refused and runs nothing."""
    folder, mark = stopped / "checkpoints" / "step-000004", stopped / "mark"

    class Evil:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save({"state": Evil()}, folder / "state.pt")
    manifest = {path.name: common.file_digest(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(common.UserError, match="state.pt cannot be loaded, .*: UnpicklingError: Weights only load failed"):
        runs.run_here("grpo", ["--resume", str(stopped)])
    assert not mark.exists()


def test_what_could_not_be_loaded_is_left_out_and_said(tmp_path, capsys):
    """Of the state of a changed script; and an optimiser of its own may keep plain numbers."""
    run, model = helpers.make_run(), torch.nn.Linear(2, 1)
    prompts = common.PromptStream([common.Prompt("1+1=", [1], {})], seed=1)
    run.folder, run.args.resume = tmp_path, str(tmp_path)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"step": 7, "sum": torch.ones(1, 2)}
    kept = {"step": 3, "position": 5, "ema": [torch.ones(2)], "rate": 0.5, "seen": {"a": 1}}
    odd = {"last": deque([1]), "mean": numpy.float64(1), "table": numpy.ones(2), "schedule": lambda step: 1.0, "lock": Lock()}
    common.save_checkpoint(run, {"policy": model}, optimizer, kept | odd)
    said = capsys.readouterr().out
    assert all(f"warning: state['{key}'] is left out of checkpoints" in said for key in odd)
    optimizer = torch.optim.SGD(model.parameters())
    assert str(common.load_checkpoint(run, {"policy": model}, optimizer, prompts)) == str(kept)
    assert str(optimizer.state[model.weight]) == str({"step": 7, "sum": torch.ones(1, 2)})


def test_folders_that_are_no_good_say_what_to_do(stopped, tmp_path):
    with pytest.raises(common.UserError, match=rf"no args.json there\); take {re.escape(str(stopped))}$"):
        common.saved_arguments(stopped / "checkpoints" / "step-000004")
    with pytest.raises(common.UserError, match="not empty, and nothing in it is overwritten"):
        common.check_new_folder(stopped)
    shutil.copy(stopped / "args.json", tmp_path)  # of a run that has ended in the evaluation before its first step
    with pytest.raises(common.UserError, match="a run that has no checkpoint yet; if it has ended, remove the folder$"):
        common.check_new_folder(tmp_path)


def test_a_list_of_optimisers_goes_on_as_it_was(tmp_path):
    """Their moments, and the peaks of their learning rates."""
    run, model = helpers.make_run(), torch.nn.Linear(2, 1)
    prompts = common.PromptStream([common.Prompt("1+1=", [1], {})], seed=1)
    run.folder, run.args.resume = tmp_path, str(tmp_path)

    def optimisers():
        return [torch.optim.AdamW([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.2, momentum=0.9)]

    def step(both, share):
        common.set_learning_rate(both, share)
        model(torch.ones(2)).square().sum().backward()
        common.clip_and_step(run, [model], both)
        return [weight.tolist() for weight in model.parameters()]

    both = optimisers()
    step(both, 0.5)
    common.save_checkpoint(run, {"policy": model}, both, {"step": 1, "position": 0})
    after = step(both, 0.25)
    again = optimisers()
    common.load_checkpoint(run, {"policy": model}, again, prompts)
    assert step(again, 0.25) == after and [one.param_groups[0]["lr"] for one in again] == [0.025, 0.05]
    with pytest.raises(common.UserError, match="state.pt cannot be loaded, perhaps another version of this project wrote it"):
        common.load_checkpoint(run, {"policy": model}, again[0], prompts)


def test_the_shard_of_a_tensor_is_left_out_and_said(tmp_path, capsys):
    """Only the first process's would be saved, and all processes would get it."""
    run = helpers.make_run()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shard = torch.distributed.tensor.distribute_tensor(torch.ones(2), mesh)
        assert not common.can_be_loaded(run, "muon", {"state": {0: [shard]}})
        assert "state['muon'] is left out of checkpoints, which take" in capsys.readouterr().out
        assert common.can_be_loaded(run, "muon", {"state": {0: [common.whole(shard)]}})
    finally:
        torch.distributed.destroy_process_group()


def test_damaged_newer_checkpoints_do_not_count_as_kept(stopped):
    flip(stopped / "checkpoints" / "step-000004" / "state.pt")
    seen = []
    saved = common.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_checkpoint", lambda *a: (saved(*a), seen.append(names(stopped / "checkpoints"))))
        assert runs.run_here("grpo", ["--resume", str(stopped), "--save-every", "1", "--keep-checkpoints", "1"]) == 0
    assert seen == [["step-000003", "step-000004"], ["step-000004"], ["step-000005"]]


# ---- What is refused ----


def other_value(field, saved):
    """A value for a flag that differs from the run's."""
    choices = field.metadata["argument"].get("choices")
    if choices:
        return next(choice for choice in choices if choice != saved)
    if isinstance(saved, bool):
        return str(not saved)
    if isinstance(saved, list) or saved is None:
        return "0.123" if "float" in str(field.type) else "3" if "int" in str(field.type) else "true" if "bool" in str(field.type) else "x"
    return str(saved + 1) if isinstance(saved, (int, float)) else f"other-{saved}"


def test_only_these_flags_may_change():
    """What enters the path of the training is not to be added here, and what does not is not to be lost."""
    memory, speed = {"micro_batch_tokens", "gradient_checkpointing"}, {"device", "compile"}
    watched = {"eval_every", "save_every", "keep_checkpoints", "log_samples", "reward_timeout"}
    assert common.RESUME_MAY_CHANGE == {"resume"} | memory | speed | watched


@pytest.mark.parametrize(("module", "script"), [(grpo, "grpo"), (ppo, "ppo")])
def test_flags_that_may_not_change_are_refused_by_name(module, script, undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[script], tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    saved = json.loads((folder / "args.json").read_text())
    for field in dataclasses.fields(module.Args):
        flag, value = "--" + field.name.replace("_", "-"), other_value(field, saved[field.name])
        if field.name in common.RESUME_MAY_CHANGE:
            continue
        said = rf"^{flag} may not change on --resume: the run was started with .*; these may: --compile, .*, --save-every$"
        with pytest.raises(common.UserError, match=said):
            common.parse_args(module.Args, ["--resume", str(folder), flag, value])
        given = saved[field.name]
        if given not in (None, []):  # saying the same again is no change
            value = given if isinstance(given, list) else [given]
            args = common.parse_args(module.Args, ["--resume", str(folder), flag, *map(str, value)])
            assert getattr(args, field.name) == given


def test_flags_that_may_change(stopped, undisturbed):
    changed = ["--save-every", "0", "--keep-checkpoints", "7", "--log-samples", "0", "--reward-timeout", "5"]
    assert runs.run_here("grpo", ["--resume", str(stopped), *changed]) == 0
    assert_same_end(stopped, undisturbed["grpo"])


def test_from_python_the_arguments_have_to_be_those_of_the_run(stopped, undisturbed, materials):
    """A notebook's `Args(resume=...)` would otherwise go on with the defaults: another reward, another seed."""
    with pytest.raises(common.UserError, match=r"^resume='.*': model is 'tiny', but the run was started with '.*/model'; common.parse_args"):
        grpo.main(grpo.Args(resume=str(stopped)))
    saved = json.loads((stopped / "args.json").read_text())
    with pytest.raises(common.UserError, match="kl_coef is 0.5, but the run was started with 0.001"):
        grpo.main(grpo.Args(**saved | {"resume": str(stopped), "kl_coef": 0.5}))
    assert grpo.main(grpo.Args(**saved | {"resume": str(stopped), "save_every": 0})) == 0
    assert_same_end(stopped, undisturbed["grpo"])


def test_a_copied_script_goes_by_its_own_name(stopped, undisturbed, tmp_path, capsys):
    shutil.copy(runs.ROOT / "grpo.py", tmp_path / "mine.py")
    mine = common.import_file(str(tmp_path / "mine.py"))
    args = common.parse_args(mine.Args, ["--resume", str(stopped)])
    assert common.Run(args).script == "mine"
    assert mine.main(args) == 0
    assert "warning: this run was begun by grpo.py and goes on with mine.py" in capsys.readouterr().out
    assert_same_end(stopped, undisturbed["grpo"])


def test_arguments_are_read_back_whatever_their_values(tmp_path):
    """Also of a run whose script lacked a flag of today's, which then has its default."""
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    saved = {"steps": 7, "scale_rewards": False, "kl_coef": 0.0, "eval_every": 0, "log_samples": 3, "system_prompt": ""}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    args = common.parse_args(grpo.Args, ["--resume", str(tmp_path), "--log-samples", "2"])
    assert args == grpo.Args(**saved | {"log_samples": 2, "resume": str(tmp_path)})


def test_what_a_killed_run_left_half_written_is_written_anew(tmp_path):
    (tmp_path / ".final.partial").mkdir(), (tmp_path / ".final.partial" / "half").touch()
    with common.complete_or_absent(tmp_path / "final", "the final model") as partial:
        (partial / "whole").touch()
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["whole"]


def test_the_newest_checkpoint_is_that_of_the_largest_number(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000002", "step-3.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in common.checkpoints_of(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def refusal(argv, script="grpo"):
    """What is said when the script refuses: status 2 and one line."""
    with pytest.raises(common.UserError) as error:
        common.parse_args(runs.SCRIPTS[script].Args, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_finished_run(undisturbed):
    before = content(undisturbed["grpo"])
    line = refusal(["--resume", str(undisturbed["grpo"])])
    assert "has finished" in line and str(undisturbed["grpo"] / "final") in line
    assert content(undisturbed["grpo"]) == before


def test_folders_that_are_no_run_to_go_on_with(stopped, tmp_path, undisturbed):
    assert "nowhere" in refusal(["--resume", str(tmp_path / "nowhere")])
    assert "no args.json" in refusal(["--resume", str(stopped / "checkpoints")])
    assert "not one of ppo.py" in refusal(["--resume", str(stopped)], script="ppo")
    for text in ("", "[1]", '{"model": "tiny"', "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        (tmp_path / "broken" / "checkpoints" / "step-000001").mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / "args.json").write_text(text)
        assert "args.json" in refusal(["--resume", str(tmp_path / "broken")])
    shutil.rmtree(stopped / "checkpoints")
    assert "no checkpoint" in refusal(["--resume", str(stopped)])


@pytest.mark.parametrize(
    "edited, said",
    [
        ({"steps": "many"}, "its args.json: argument --steps: invalid int value: 'many'"),
        ({"loss": "nosuch"}, "its args.json: argument --loss: invalid choice: 'nosuch'"),
        ({"reward_weights": [[1]]}, "its args.json: argument --reward_weights/--reward-weights: invalid float value"),
        ({"steps": 0}, "--steps must be at least 1, not 0"),
    ],
)
def test_edited_arguments_are_checked(stopped, edited, said):
    saved = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(saved | edited))
    assert said in refusal(["--resume", str(stopped)])


def test_checkpoint_of_another_version_is_refused(stopped):
    folder = common.checkpoints_of(stopped)[-1]
    saved = torch.load(folder / "state.pt", weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "random_states"}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"state.pt": common.file_digest(folder / "state.pt")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(common.UserError, match="step-000004/state.pt cannot be loaded, perhaps another version .* wrote it: KeyError: .random_st"):
        runs.run_here("grpo", ["--resume", str(stopped)])


def test_model_that_has_changed_since(stopped, materials, tmp_path):
    saved = json.loads((stopped / "args.json").read_text())
    model = common.tiny_model(common.tiny_tokenizer(), 1)
    model.resize_token_embeddings(20)
    shutil.copytree(materials / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    (stopped / "args.json").write_text(json.dumps(saved | {"model": str(tmp_path / "model")}))
    with pytest.raises(common.UserError, match="--resume .*policy"):
        runs.run_here("grpo", ["--resume", str(stopped)])


# ---- A full disk ----


def test_full_disk_at_the_final_model(stopped, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full_disk)
        with pytest.raises(common.UserError, match=r"--output-dir .*the final model cannot be written.*No space left"):
            runs.run_here("grpo", ["--resume", str(stopped)])
    assert not list(stopped.glob("*final*"))
    assert runs.run_here("grpo", ["--resume", str(stopped)]) == 0
    assert_same_end(stopped, undisturbed["grpo"])


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {  # what fails, in the writing of the second checkpoint
    "models": (safetensors.torch, "save_file"),
    "state": (torch, "save"),
    "manifest": (Path, "write_text"),
    "sync": (os, "fsync"),
    "rename": (Path, "rename"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_full_disk_leaves_the_checkpoint_before(fault, materials, undisturbed, tmp_path, monkeypatch):
    saved, calls = common.save_checkpoint, []

    def save(*arguments):
        calls.append(0)
        with monkeypatch.context() as patch:
            if len(calls) == 2:
                patch.setattr(*FAULTS[fault], full_disk)
            saved(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save)
        with pytest.raises(common.UserError, match=r"--output-dir .*checkpoint of step 4 cannot be written.*No space left"):
            runs.run_here("grpo", runs.arguments(materials, "grpo", tmp_path / "run", **FLAGS["grpo"]))
    assert names(tmp_path / "run" / "checkpoints") == ["step-000002"]
    assert runs.run_here("grpo", ["--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed["grpo"])


# Bytes that a file may have: less than TensorBoard's events, less than a model.
@pytest.mark.parametrize(("limit", "save_every"), [(3000, 0), (200_000, 1)])
def test_full_disk_in_a_real_process(limit, save_every, materials, tmp_path):
    (materials / "tokens.txt").unlink(missing_ok=True)  # the reward function appends to it, in all tests
    result = runs.launch(
        "grpo", runs.arguments(materials, "grpo", tmp_path / "run", steps=2, save_every=save_every),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 2
    assert re.fullmatch(r"grpo\.py: error: --output-dir \S+: .* cannot be written: .*\n", result.stderr), result.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert sys.platform != "linux" or "too large" in result.stderr


def test_a_final_model_with_an_adapter_that_is_not_merged_is_told(materials, tmp_path, capsys):
    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.b = layer, torch.nn.Parameter(torch.zeros(3))

    tokenizer, run = common.tiny_tokenizer(), helpers.make_run()
    run.folder, run.args.resume = tmp_path, "a run, so that no warm start is needed"
    model, _ = common.load_policy(run.args, run, tokenizer)
    common.save_final(run, model, tokenizer)
    assert "adapter" not in capsys.readouterr().out
    attention = model.base_model.layers[0].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    shutil.rmtree(tmp_path / "final")
    common.save_final(run, model, tokenizer)
    assert "merge an adapter before save_final" in capsys.readouterr().out
