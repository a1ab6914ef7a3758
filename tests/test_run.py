"""What a `Run` says, logs, draws and catches, and what an evaluation asks of it."""

import itertools
import math
import os
import signal
import sys
import time
import types

import helpers
import pytest
import torch

import common

# ---- What it says ----

FINE = {"reward/mean": 0.5, "reward/std": 0.3, "reward/frac_zero_std": 0.8}  # each as near to advice as it may be
FINE |= {"completions/truncated_ratio": 0.5, "completions/mean_length": 9.0, "objective/kl_seq": 9.0}
ADVICE = [
    ({"completions/truncated_ratio": 1.0}, "no completion ends: the end token was never sampled; raise --max-new-tokens\n"),
    ({"completions/truncated_ratio": 0.51}, "most completions are cut off at --max-new-tokens; raise it\n"),
    ({"completions/truncated_ratio": 0.99}, "most completions are cut off at --max-new-tokens; raise it\n"),
    ({"reward/mean": math.nan, "reward/std": math.nan}, "no reward function applied to any completion (all gave None)"),
    ({"reward/std": 0.0, "reward/frac_zero_std": 1.0}, "all scores are equal, so nothing is learned; unless all answers are"),
    ({"reward/frac_zero_std": 0.81}, "most groups have equal scores; take easier or harder prompts, or a larger --group-size\n"),
    ({"losses/policy_loss": math.nan}, "losses/policy_loss or objective/kl is no number"),
    ({"objective/kl": math.nan}, "losses/policy_loss or objective/kl is no number"),
    ({"objective/kl_seq": 9.1}, "the policy is more than 1 nat a token from the reference; raise --kl-coef or lower"),
]


@pytest.mark.parametrize(("changed", "said"), ADVICE)
def test_each_advice_is_given_once_where_it_holds_and_not_before(run, capsys, changed, said):
    run.advise({"eval/accuracy": 0.5})  # an evaluation alone
    assert capsys.readouterr().out == ""
    run.advise(FINE)
    assert capsys.readouterr().out == "first rollout: mean score 0.5, 50% cut off, 80% of groups with equal scores\n"
    run.advise(FINE | changed)
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {said}") and out.count("\n") == 1
    for metrics in (FINE | changed, FINE, FINE | changed):
        run.advise(metrics)
    assert capsys.readouterr().out == ""


def test_the_first_rollout_is_described_without_what_a_script_does_not_log(run, capsys):
    ppos = {name: value for name, value in FINE.items() if name not in ("reward/frac_zero_std", "objective/kl_seq")}
    run.advise(ppos)
    assert capsys.readouterr().out == "first rollout: mean score 0.5, 50% cut off\n"
    other = helpers.make_run()
    other.advise(ppos | {"completions/truncated_ratio": math.nan, "reward/mean": math.nan, "reward/std": math.nan})
    assert capsys.readouterr().out.startswith("first rollout: no scores\nwarning: no reward function applied")


def test_a_line_every_few_seconds_and_always_one_of_the_last_step(capsys, monkeypatch):
    """With the newest of each number, whichever step it is of."""
    run, written = helpers.make_run(steps=4), []
    run.writer = types.SimpleNamespace(add_scalar=lambda *point: written.append(point), flush=lambda: None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    points = [("eval/accuracy", 0.25, 1), ("objective/kl", 0.5, 2), ("objective/kl", 0.125, 3), ("perf/tokens_per_second", 1234.4, 4)]
    for name, value, step in points:
        now += 4
        run.log(step, {name: value})
    assert capsys.readouterr().out == "step 1/4 acc 0.25\nstep 3/4 acc 0.25 kl 0.125\nstep 4/4 acc 0.25 kl 0.125 tok/s 1234\n"
    assert written == points


def test_defaults_of_other_models_than_the_tiny_one_are_said_to_a_new_run_alone(capsys, monkeypatch):
    monkeypatch.setattr(common, "check_resumed", lambda args: None)
    helpers.make_run(model="m", max_new_tokens=7)
    said = capsys.readouterr().out
    assert said.startswith("defaults of models other than the tiny one: --dataset gsm8k") and "--max-new-tokens" not in said
    assert "None" not in said  # of flags with one default for all models
    helpers.make_run(model="m", resume="run"), helpers.make_run()
    assert capsys.readouterr().out == ""


def test_table_of_samples_is_of_prompts_all_over_the_rollout(capsys):
    """After the last step in the terminal, too."""
    run, tables = helpers.make_run(steps=4, log_samples=3), []
    run.writer = types.SimpleNamespace(add_text=lambda tag, text, step: tables.append(text.splitlines()))
    prompts, extra = [common.Prompt([1], f"p{i}|", {}) for i in range(8)], {"note": list("abcdefgh")}
    prompts[2].prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "p2|"}]
    completions = ["c"] * 5 + ["b" * 1000 + "c" * 9000 + "e" * 1000] * 3
    run.log_samples(3, prompts, completions, torch.arange(8.0), extra)
    assert tables[0][0] == "| prompt | completion | score | note |" and capsys.readouterr().out == ""
    long = f"{'b' * 1000} ... {'e' * 1000}"
    want = ["| p0\\| | c | 0 | a |", "| system: a user: p2\\| | c | 2 | c |", f"| p5\\| | {long} | 5 | f |"]
    assert tables[0][2:] == want
    run.log_samples(4, prompts[:2], ["c", "d"], torch.arange(2.0), {})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(tables[1]) == 2 + 2 and shown[1:] == [["0", "p0|", "c"], ["1", "p1|", "d"]]
    run.args.log_samples = 0
    run.log_samples(4, prompts, ["c"] * 8, torch.arange(8.0), {})
    assert len(tables) == 2 and capsys.readouterr().out == ""


def test_bars_are_shown_by_the_first_process_on_a_terminal(monkeypatch):
    for rank, terminal, shown in (("0", True, True), ("1", True, False), ("0", False, False)):
        monkeypatch.setenv("RANK", rank), monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert common.progress([], "a bar").disable != shown


# ---- Processes, steps and signals ----


@pytest.mark.parametrize(("world", "prompts", "parts"), [(3, 32, 2), (2, 6, 2), (1, 9, 2), (3, 4, 1)])
def test_prompts_that_cannot_be_split_between_processes_and_minibatches_are_refused(world, prompts, parts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world)), monkeypatch.setenv("RANK", "0")
    between = f"{world} processes and " * (world > 1) + f"--num-minibatches {parts}$"
    with pytest.raises(common.UserError, match=f"^--prompts-per-step {prompts} cannot be split evenly between {between}"):
        helpers.make_run(prompts_per_step=prompts, num_minibatches=parts)
    assert helpers.make_run(prompts_per_step=2 * world * parts, num_minibatches=parts).world == world


def test_what_cannot_be_split_evenly_is_refused():
    run = helpers.make_run(num_minibatches=2)
    with pytest.raises(common.UserError, match="^a rollout of 63 prompts cannot be split evenly between --num-minibatches 2$"):
        run.minibatches(1, 63)
    run.world = 2
    with pytest.raises(common.UserError, match="^Run.own_part: 3 items cannot be split evenly between 2 processes$"):
        run.own_part([1, 2, 3])


def test_the_seconds_of_a_phase_end_with_the_next(run, monkeypatch):
    for name, now in (("rollout", 10.0), ("update", 12.0), (None, 15.0)):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        run.phase(name)
    assert run.seconds == {"rollout": 2.0, "update": 3.0}


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    """root may write anywhere, so it is told that it may not."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for folder in (tmp_path, tmp_path / "run" / "1"):
        said = f"^--output-dir {folder}: {tmp_path} is a file, or a folder that cannot be written to$"
        with pytest.raises(common.UserError, match=said):
            common.check_new_folder(folder)
    assert not any(tmp_path.iterdir())


def test_reward_functions_read_how_many_steps_are_done():
    run = helpers.make_run(steps=4)
    steps = run.steps(3)
    assert next(steps) == 3 and run.trainer_state.global_step == 2 and run.trainer_state.max_steps == 4
    assert list(steps) == [4]


def test_signals_stop_a_run_but_not_one_that_is_ignored(run):
    """nohup lets its command ignore SIGHUP, and a run that it starts has to outlive its terminal."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run.catch_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != before
    signal.raise_signal(signal.SIGHUP)
    assert not run.must_stop()
    signal.raise_signal(signal.SIGTERM)
    assert run.must_stop() and run.stop_signal == signal.SIGTERM
    run.give_signals_back()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_is_not_for_processes_that_a_reward_function_forks_but_they_may_be_terminated(run):
    run.catch_signals()
    for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, signal.SIGTERM)):
        child = os.fork()
        if child == 0:
            signal.raise_signal(number)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == status
    assert not run.must_stop()


def test_a_closed_terminal_does_not_silence_output_that_goes_elsewhere(run, capfd):
    run.catch_signals()
    signal.raise_signal(signal.SIGHUP)
    os.write(1, b"to a file\n"), os.write(2, b"to a file\n")
    out, err = capfd.readouterr()
    assert "to a file\n" in out and "to a file\n" in err


# ---- What it draws ----


def test_uniforms_depend_on_seed_step_and_purpose():
    keys = list(itertools.product((1, 2), (0, 1, 2), range(16)))
    draws = [tuple(helpers.make_run(seed=seed).uniforms(step, purpose, 4).tolist()) for seed, step, purpose in keys]
    assert len(set(draws)) == len(keys) and all(0 <= x < 1 for draw in draws for x in draw)
    assert torch.equal(helpers.make_run(seed=2).uniforms(1, 3, 2, 2).flatten(), torch.tensor(draws[keys.index((2, 1, 3))]))


@pytest.mark.parametrize("purpose", [-1, 16])
def test_a_purpose_that_would_be_one_of_another_step_is_refused(run, purpose):
    with pytest.raises(common.UserError, match=f"^Run.uniforms: purpose {purpose} is not one of 0 to 15$"):
        run.uniforms(1, purpose, 4)


def test_minibatches_are_drawn_anew_each_time_and_take_one_of_neighbours_each():
    run = helpers.make_run(num_minibatches=2)
    splits = [[part.tolist() for part in run.minibatches(number, 64)] for number in range(1, 5)]
    plain = [list(range(32)), list(range(32, 64))], [list(range(0, 64, 2)), list(range(1, 64, 2))]
    assert len({str(split) for split in (*splits, *plain, *(split[::-1] for split in splits))}) == 10
    assert all([i // 2 for i in part] == list(range(32)) for split in splits for part in split)


# ---- Evaluation ----


def evaluation(rank=0, world=1, prompts=4, reward=lambda completions, **_: [1.0] * len(completions), **flags):
    """What `evaluate` of one of so many processes gives, and for each of its prompts the random numbers of its samples."""
    run, tokenizer, given = helpers.make_run(max_new_tokens=2, **flags), common.tiny_tokenizer(), {}
    run.rank, run.world, run.gather = rank, world, lambda value: [value]
    sampler = common.Sampler(common.tiny_model(tokenizer, 0), {tokenizer.eos_token_id}, 1.0, 2)
    sample, ids = sampler.sample, [[i // 10 % 10, 10, i % 10, 10, i // 100] for i in range(prompts)]

    def recording(prompts, copies, uniforms):
        if uniforms is not None:
            assert uniforms.shape == (len(prompts) * copies, 2)
            given.update({tuple(ids): rows.tolist() for ids, rows in zip(prompts, uniforms.view(len(prompts), copies, 2), strict=True)})
        return sample(prompts, copies, uniforms)

    sampler.sample = recording
    rows = [common.Prompt(tokens, "1+1=", {}) for tokens in ids]
    return common.evaluate(run, sampler, tokenizer, rows, common.Reward("some", reward)), given


def test_no_two_samples_of_an_evaluation_share_their_random_numbers_and_processes_change_none():
    """Of so many prompts that each process samples them in several parts."""
    _, want = evaluation(prompts=300, eval_samples=4)
    rows = [tuple(row) for rows in want.values() for row in rows]
    assert len(want) == 300 and len(rows) == len(set(rows)) == 1200
    parts = [evaluation(rank, 2, 300, eval_samples=4)[1] for rank in (0, 1)]
    assert [len(part) for part in parts] == [150, 150] and parts[0] | parts[1] == want


def test_a_prompt_may_have_more_samples_than_are_taken_at_once():
    metrics, given = evaluation(prompts=2, eval_samples=300)
    assert metrics["eval/pass@256"] == metrics["eval/pass@300"] == 1.0 and [len(rows) for rows in given.values()] == [300, 300]


def test_a_reward_that_takes_too_long_in_an_evaluation_is_ended():
    def slow(completions, **_):
        time.sleep(3)
        return [1.0] * len(completions)

    with pytest.raises(common.UserError, match="reward some took longer than --reward-timeout 0.05 seconds"):
        evaluation(reward=slow, reward_timeout=0.05)


def test_long_prompts_are_evaluated_a_few_at_a_time_and_the_cache_is_given_up(monkeypatch):
    sample, free, seen = common.Sampler.sample, common.Sampler.free, []
    monkeypatch.setattr(common.Sampler, "sample", lambda self, prompts, *args: seen.append(len(prompts)) or sample(self, prompts, *args))
    monkeypatch.setattr(common.Sampler, "free", lambda self: seen.append("freed") or free(self))
    evaluation(prompts=5, max_prompt_tokens=2**16, eval_samples=2)
    assert [x for x in seen if x != "freed"] == [2, 2, 2, 2, 1, 1]
    assert seen[-3:] == ["freed"] * 3  # on a CPU also by each call, before and after
