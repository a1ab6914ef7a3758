"""Two processes do what one does: the same updates, whole checkpoints, decisions taken together."""

import shutil
import time
from unittest import mock

import pytest
import torch

import common
import helpers
import runs

CASES = {"grpo": {"loss": "grpo"}, "grpo dapo": {"loss": "dapo", "num_minibatches": 1}}
CASES["ppo"] = {"kl_target": 0.001, "kl_horizon": 50}
CASES["grpo lists"] = {"reward": "lists"}
CASES["grpo dynamic"] = {"reward": "uneven", "dynamic_sampling": True}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return runs.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module", params=CASES)
def one_and_two(request, materials):
    """The same run of three steps in one process and in two: (script, folder, folder)."""
    script, folders = request.param.split()[0], [materials / f"{request.param} {n}" for n in (1, 2)]
    flags = dict(CASES[request.param], save_every=2)
    assert runs.run_here(script, runs.arguments(materials, script, folders[0], **flags)) == 0
    (materials / "tokens.txt").unlink()
    result = runs.launch(script, runs.arguments(materials, script, folders[1], **flags), processes=2)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("done steps=3") == 1  # only the first process speaks
    return script, *folders


def test_weights_equal_those_of_one_process(materials, one_and_two):
    _, one, two = one_and_two
    tokens = [line.split() for line in (materials / "tokens.txt").read_text().splitlines()]
    assert [n for rank, n in tokens if rank == "0"] != [n for rank, n in tokens if rank == "1"]  # uneven lengths
    assert runs.largest_difference(one, two) < 1e-6


@pytest.mark.parametrize("one_and_two", ["grpo dynamic"], indirect=True)
def test_dynamic_sampling_replaces_groups_in_both_processes(one_and_two):
    for folder in one_and_two[1:]:
        replaced = runs.scalars(folder)["reward/resampled_groups"]
        assert sum(replaced.values()) > 3 * 4  # more than one process has prompts


@pytest.mark.parametrize("one_and_two", ["grpo lists"], indirect=True)
def test_lists_of_rewards_in_one_process_only_are_taken_as_such_in_both(materials, one_and_two):
    seen = [line.split() for line in (materials / "lists.txt").read_text().splitlines()]
    first, second = ([has for rank, has in seen if rank == wanted][-5:] for wanted in "01")  # evaluations before and after
    assert any(a != b for a, b in zip(first[1:4], second[1:4], strict=True)), seen


def test_metrics_equal_those_of_one_process(one_and_two):
    _, one, two = one_and_two
    assert (want := runs.scalars(one)).keys() == (got := runs.scalars(two)).keys()
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name


def test_run_started_on_two_resumes_on_one(one_and_two, tmp_path):
    script, _, two = one_and_two
    shutil.copytree(two, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    assert runs.run_here(script, ["--resume", str(tmp_path / "run")]) == 0
    assert runs.largest_difference(two, tmp_path / "run") < 1e-6
    runs.scalars(tmp_path / "run")


@pytest.mark.parametrize("one_and_two", ["ppo"], indirect=True)
def test_run_started_on_one_resumes_on_two(one_and_two, tmp_path):
    script, one, _ = one_and_two
    shutil.copytree(one, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    result = runs.launch(script, ["--resume", str(tmp_path / "run")], processes=2)
    assert result.returncode == 0, result.stdout
    assert runs.largest_difference(one, tmp_path / "run") < 1e-6


def test_norms_stay_float32_in_sharded_layers_of_bfloat16(materials, tmp_path):
    """As under autocast in one process, and in the sampler's copy: at first policy and reference are the same."""
    tokenizer = common.tiny_tokenizer()
    config = helpers.FAMILIES["gpt2"]()
    config.vocab_size = len(tokenizer)
    helpers.config_model(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for processes in (1, 2):
        argv = runs.arguments(materials, "grpo", tmp_path / str(processes), model=tmp_path / "model", dtype="bfloat16")
        result = runs.launch("grpo", argv, processes)
        assert result.returncode == 0, result.stdout
        assert abs(runs.scalars(tmp_path / str(processes))["objective/kl_seq"][1]) < 1e-5


TWICE = f"""
import os, random, shutil, sys
sys.path.insert(0, {str(runs.ROOT)!r})
import torch.distributed
import common, grpo

rank = int(os.environ["RANK"])

def noise(completions, **_):  # of which the second process draws twice as much
    return [sum(random.random() for _ in range(1 + rank)) for _ in completions]

def twice(args):
    assert grpo.main(args) == 0
    if rank == 0:
        shutil.copytree(args.output_dir, args.output_dir + "-resumed", ignore=shutil.ignore_patterns("final"))
    torch.distributed.barrier()
    return grpo.main(common.parse_args(grpo.Args, ["--resume", args.output_dir + "-resumed"]))

if __name__ == "__main__":
    common.run_script(twice, grpo.Args)
"""


def test_every_process_resumes_with_random_states_of_its_own(materials, tmp_path):
    """Where they differ, since the reward functions of one process have drawn more than those of the other."""
    (tmp_path / "twice.py").write_text(TWICE)
    argv = runs.arguments(materials, "grpo", tmp_path / "run", reward=tmp_path / "twice.py:noise", save_every=2)
    result = runs.launch(str(tmp_path / "twice"), argv, processes=2)
    assert result.returncode == 0 and "resuming after step 2" in result.stdout, result.stdout
    assert runs.largest_difference(tmp_path / "run", tmp_path / "run-resumed") < 1e-6


@pytest.mark.parametrize("one_and_two", ["grpo", "grpo dynamic"], indirect=True)
def test_error_of_one_process_ends_all_with_one_line_and_costs_no_step(materials, one_and_two, tmp_path):
    script, _, two = one_and_two
    case, call = ("grpo dynamic", 8) if "dynamic" in two.name else ("grpo", 3)  # both in the second step
    argv = runs.arguments(materials, script, tmp_path / "run", **CASES[case])
    result = runs.launch(script, argv, processes=2, act=f"error at call {call}")
    assert result.stdout.count("grpo.py: error: reward") == 1, result.stdout
    assert "on the last process alone" in result.stdout and "the steps before are saved; to go on: " in result.stdout
    assert result.stdout.count("exitcode  : 2 ") == 2, result.stdout  # torchrun's report of its two processes
    assert "stopping after this step" not in result.stdout
    assert runs.run_here(script, ["--resume", str(tmp_path / "run")]) == 0
    assert runs.largest_difference(two, tmp_path / "run") < 1e-6


@pytest.mark.parametrize(("call", "saved"), [(1, []), (2, []), (4, ["step-000002"])])
def test_error_of_one_process_in_an_evaluation_or_the_first_step(call, saved, materials, tmp_path):
    argv = runs.arguments(materials, "grpo", tmp_path / "run", eval_every=2)
    result = runs.launch("grpo", argv, processes=2, act=f"error at call {call}")
    assert result.stdout.count("grpo.py: error: reward") == 1, result.stdout
    assert [path.name for path in (tmp_path / "run").glob("checkpoints/*")] == saved


def test_process_that_dies_ends_the_other(materials, tmp_path):
    started = time.time()
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=50)
    result = runs.launch("grpo", argv, processes=2, act="SIGKILL at call 3")
    assert result.returncode != 0
    assert time.time() - started < 120  # loading included
    assert not (tmp_path / "run" / "final").exists()


def test_signal_to_one_process_stops_both_with_a_checkpoint(materials, tmp_path):
    argv = runs.arguments(materials, "grpo", tmp_path / "run", steps=50)
    result = runs.launch("grpo", argv, processes=2, act="SIGINT at call 3")
    assert result.stdout.count("to go on: torchrun ... grpo.py --resume") == 1, result.stdout
    assert "exitcode  : 130 " in result.stdout  # the process that is last may get torchrun's SIGTERM on its way out
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_minibatches_are_the_same_for_any_number_of_processes(world, parts, monkeypatch):
    run = helpers.make_run(prompts_per_step=16, num_minibatches=parts)
    want = [part.tolist() for part in run.minibatches(7, 16)]
    assert sorted(sum(want, [])) == list(range(16))
    run.world, got, sizes = world, [[] for _ in range(parts)], set()
    for run.rank in range(world):
        for part, mine in zip(got, run.minibatches(7, 16 // world), strict=True):
            part += (mine + run.rank * 16 // world).tolist()
            sizes.add(len(mine))
    assert got == want
    if parts > 1:
        with pytest.raises(common.UserError, match=f"a rollout of 9 prompts cannot be split evenly between --num-minibatches {parts}"):
            run.minibatches(7, 9)
    assert sizes == {16 // world // parts}  # each process has as much to do in each


def test_every_process_makes_as_many_passes():
    rollout, _, _ = helpers.ragged_rollout()
    run = helpers.make_run(micro_batch_tokens=15)
    own = len(common.micro_batches(rollout, 15))
    run.max = lambda number: number + 2
    batches = list(common.each_micro_batch(run, rollout))
    assert len(batches) == own + 2
    assert all(batch.lengths.tolist() == [0] and not batch.completion_mask.any() for _, batch in batches[own:])
    model = helpers.make_model("llama")
    table = common.logprobs_without_gradient(run, model, rollout)
    want = common.completion_logprobs(model, rollout, run.args.temperature).detach()
    assert torch.allclose(table, want, atol=1e-6)
    _, empty = batches[-1]
    common.completion_logprobs(model, empty, 1.0).sum().backward()  # what keeps the processes' backward passes in step
    assert all(float(gradient.abs().max()) == 0 for gradient in helpers.gradients(model).values())


@pytest.mark.parametrize(("has_gpu", "backend"), [(False, "gloo"), (True, "cpu:gloo,cuda:nccl")])
def test_small_messages_go_by_gloo_where_there_are_gpus_too(has_gpu, backend, monkeypatch):
    init = mock.Mock(side_effect=RuntimeError("enough"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(RuntimeError, match="enough"):
        common.join_processes()
    assert init.call_args.args == (backend,)
