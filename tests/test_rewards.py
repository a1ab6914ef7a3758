"""Built-in verifiers, reward files, and how their scores are called, checked and summed."""

import asyncio
import math
import os
import signal
import sys
import textwrap
import threading
import time
import types
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common


def verdict(name, completion, **columns):
    """The built-in reward of one completion, given as text; the chat form must agree."""
    columns = {key: [value] for key, value in columns.items()}
    [score] = common.BUILTIN_REWARDS[name](completions=[completion], **columns)
    chat = [{"role": "assistant", "content": completion}]
    assert common.BUILTIN_REWARDS[name](completions=[chat], **columns) == [score]
    return score


# ---------------------------------------------------------------- verifiers


def test_exact():
    assert verdict("exact", " 42\n", answer="42 ") == 1.0
    assert verdict("exact", "42", answer=42) == 1.0
    assert verdict("exact", "42.", answer="42") == 0.0
    assert verdict("exact", "", answer=None) is None
    assert verdict("exact", "3", answer=3.0) == 1.0  # as pandas writes a column of integers with a gap
    assert verdict("exact", "2.5", answer=2.5) == 1.0


@pytest.mark.parametrize("reward", ["exact", "gsm8k"])
def test_an_answer_in_tags_is_read_there(reward):
    """So that it can go together with the format that asks for them; a draft before does not count."""
    for completion, score in (
        ("<think>2*9</think><answer>18</answer>", 1.0),
        ("<think>2*9</think>\n<answer> 18 </answer>", 1.0),
        ("<think>#### 18</think><answer>7</answer>", 0.0),
        (r"<think>so \boxed{18}?</think><answer>7</answer>", 0.0),
        ("<answer>7</answer> no <answer>18</answer>", 1.0),
        ("<answer>18</answer> no <answer>7</answer>", 0.0),
        ("<answer></answer>18", 0.0),
    ):
        assert verdict(reward, completion, answer="18") == score
    assert verdict("format", "<think>2*9</think><answer>18</answer>") == 1.0


@pytest.mark.parametrize("reward", ["exact", "gsm8k"])
@pytest.mark.parametrize("answer", [["18", "18.0"], {"style": "rule-v2", "ground_truth": "18"}], ids=str)
def test_an_answer_that_is_no_text_or_number_names_its_row(reward, answer, tmp_path):
    row = common.Row(prompt="a", answer=answer)
    row.place = "rows.jsonl:3"
    with pytest.raises(common.UserError, match=rf"^rows.jsonl:3: reward {reward}: the answer .* is no text or number; name the right"):
        common.check_rewards(common.load_rewards([reward]), [row])


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 42.", "42"),
        ("first 7, then 42", "42"),
        ("42.0", "42"),
        ("3.50", "7/2"),
        ("$1,234.50", "2469/2"),
        ("1,234,567", "1234567"),
        ("pick 1,2,42", "42"),
        ("€42", "42"),
        (r"\$42", "42"),
        ("$42$", "42"),
        ("$.50", "1/2"),
        ("is...5", "5"),
        ("42%", "42"),
        ("-42", "-42"),
        ("\u221242", "-42"),
        ("-$42", "-42"),
        ("$-42", "-42"),
        (r"-\$42", "-42"),
        ("(-42)", "-42"),
        ("52-42", "42"),
        ("x-42", "42"),
        ("52 - 10 = -42", "-42"),
        ("1/2", "1/2"),
        ("1/0", None),
        ("007", "7"),
        (r"10\,000", "10000"),
        ("10{,}000", "10000"),
        ("**42**", "42"),
        ("no number", None),
        ("", None),
        ("#### 42", "42"),
        ("7\n####\n42", "42"),
        ("#### 42 apples for 3 boys\nor 5", "42"),
        ("#### 6*7 = 42", "42"),
        ("#### 42\nx = 5", "42"),
        ("#### none\n42", None),
        ("#### 1\n#### $1,042.00", "1042"),
        ("42 ####", None),
        ("42\n#### none", None),
        (r"\boxed{42}", "42"),
        (r"so \boxed{42} for 3", "42"),
        (r"\boxed{1} and \boxed{42}", "42"),
        (r"\boxed{42} #### 5", "42"),
        (r"#### 5 \boxed{42}", "42"),
        (r"\boxed{\$42.00}", "42"),
        (r"\boxed{42\text{ m}^2}", "42"),
        (r"\boxed{\text{Total: } 42}", "42"),
        (r"\boxed{\text{42}}", "42"),
        (r"\boxed {x_1 = {42}}", "42"),
        (r"\boxed{1{,}042\%}", "1042"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\frac{84}{2}}", "42"),
        (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
        (r"42 \boxed{}", None),
        (r"42 \boxed{42", None),
        ("9" * 100, "9" * 100),
        ("9" * 101, None),
        (r"\boxed{" + " " * 1000 + "42}", None),
        (r"\boxed{4\frac{1}{2}}", "9/2"),
        (r"\boxed{-4\dfrac12}", "-9/2"),
        (r"\boxed{\frac12}", "1/2"),
        (r"so \frac{1}{2}", "1/2"),
        ("4 1/2", "9/2"),
        ("#### 4 1/2 pies", "9/2"),
        (r"\boxed{\frac{84}{2} = 42}", "42"),
        (r"\boxed{10^3}", None),
        ("10^3", None),
        ("10³", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"2\sqrt{3}", None),
        (r"\boxed{\sqrt[3]{8}}", None),
        (r"\boxed{12\pi}", None),
        (r"\boxed{\frac{\pi}{2}}", None),
        (r"\boxed{6 \times 7}", None),
        ("#### 6 * 7", None),
        ("#### 6*7 =", None),
        ("#### 50 - $8", None),
        ("6 * 7", None),
        ("x/42", None),
        ("#### x_42", None),
        ("#### x_42 is how this one is called", None),
        ("#### 1.5e3", None),
        ("1e42", None),
        ("5:42", None),
        ("3.14.42", None),
        ("#### 1.234,56", None),
        ("#### 1/2/3", None),
        ("#### 10 000", None),
        ("1_042", "1042"),
        ("#### \u201342 (en dash)", "-42"),
        ("#### 42 (6 = 2*3)", "42"),
        ("#### 42 (six times 7)", "42"),
        ("#### (6 * 7) = 42", "42"),
        ("#### 42 = forty-two", "42"),
        (r"\boxed{42 = x}", "42"),
        (r"\boxed{42^\circ}", "42"),
        (r"\boxed{42^{\circ}}", "42"),
        (r"\boxed{42 \text{ cm}^2}", "42"),
        (r"\boxed{42 \mathrm{~km/h}}", "42"),
        ("#### 42 km/h", "42"),
        ("#### $42/hour", "42"),
        ("#### **42**", "42"),
        ("is *42*", "42"),
        ("is _42_.", "42"),
        ("- Total\n* 42", "42"),
        ("Step 2: 42", "42"),
        ("in 7. 42!", "42"),
        (r"so \(42\)", "42"),
        (r"x \approx 42", "42"),
        (".5.5", None),
        ("#### .1.2", None),
        (r"\boxed{.5.5}", None),
        ("$.50.25", None),
        (".5 1/2", None),
        ("#### 42 ####", "42"),
        ("####42####", "42"),
        ("#### 42\n####", "42"),
        ("\\begin{aligned}\nx &= 42\n\\end{aligned}", "42"),
        (r"x = 42 \implies", "42"),
        (r"\boxed{42 \rm cm}", "42"),
        (r"\frac {1}{2}", "1/2"),
        (r"\frac{1} {2}", "1/2"),
        (r"\frac 12", "1/2"),
        (r"\frac1{2}", "1/2"),
        (r"\cfrac{1}{2}", "1/2"),
        (r"\boxed{4\ \frac{1}{2}}", "9/2"),
        (r"\boxed{1\;042}", None),
        ("#### 1~042", None),
        (r"\boxed{- 42}", "-42"),
        (r"\boxed{-{42}}", "-42"),
        (r"\boxed{ -(42)}", "-42"),
        (r"\boxed{-\text{42 m}}", "-42"),
        ("- 42", "42"),  # an item of a list
        ("#### _-42_", "-42"),
        ("#### \u201042 (hyphen)", "-42"),
        ("#### \u201142 (non-breaking hyphen)", "-42"),
        ("x_-42", None),
        ("#### 1\u20442", "1/2"),
        (r"\boxed{\frac{1}{-2}}", None),
        (r"\boxed{\frac{3x}{4}}", None),
        ("#### 1/.5", None),
        ("#### 6 x 7", None),
        ("6 X 7", None),
        ("#### 0x42", None),
        ("0x42", None),
        ("1'042", None),
        ("x = 42", "42"),
        ("is 42 x", "42"),
    ],
)
def test_gsm8k_number(text, number):
    assert str(common.gsm8k_number(text)) == str(number)


def test_gsm8k_reward():
    published = "He has 6*7=<<6*7=42>>42 apples.\n#### 42"
    assert verdict("gsm8k", "It is 42.0", answer=published) == 1.0
    assert verdict("gsm8k", "It is 43", answer=published) == 0.0
    assert verdict("gsm8k", "none", answer=42) == 0.0
    assert verdict("gsm8k", r"\boxed{1,000}", answer="#### 1000") == 1.0
    assert verdict("gsm8k", "0.30000000000000001", answer="0.3") == 0.0  # exact, no float in between
    assert verdict("gsm8k", "42", answer=None) is None
    with pytest.raises(ValueError, match="no number in the answer 'Paris'"):
        verdict("gsm8k", "42", answer="Paris")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${:,}.00", "#### {:,}\nor 3", r"\boxed{{{}}}"]))
@settings(deadline=None)
def test_gsm8k_reads_every_spelling_of_an_integer(number, spelling):
    assert verdict("gsm8k", "of 17: " + spelling.format(number), answer=str(number)) == 1.0
    assert verdict("gsm8k", "of 17: " + spelling.format(number + 1), answer=str(number)) == 0.0


@pytest.mark.parametrize(
    "completion, score",
    [
        ("(1 + 2) * 8", 1.0),
        ("thinking\n1 + 2 = 3\n(1+2)*8 = 24", 1.0),
        ("<answer>1 + 2</answer> no: <answer> (1+2)*8 </answer> done", 1.0),
        ("<answer>(1 + 2) × 8 = 24.</answer>", 1.0),
        ("<answer>(1 + 2) * 8</answer> in <answer>", 1.0),
        ("-(1 + 2) * -8", 1.0),
        ("<answer>1 + 2 + 8</answer>\n(1 + 2) * 8", 0.0),  # the tags win
        ("(1 + 2) * 8 = 25", 0.0),
        ("(1 + 2) * 8 =", 0.0),
        ("1 * 8 + 2", 0.0),
        ("24", 0.0),
        ("8 * 2 + 8", 0.0),
        ("(1 + 2) * 8 * 1", 0.0),
        ("8 / (2 - 2 * 1)", 0.0),
        ("8 / (2 - 1 - 1)", 0.0),
        ("(1 + 2) * 8 # right", 0.0),
        ("print((1 + 2) * 8)", 0.0),
        ("(1 + 2) * 08", 0.0),
        ("(1 + 2) (8)", 0.0),
        ("8 // 2 * 1", 0.0),
        ("8 ** 2 ** 1", 0.0),
        ("+8 * (1 + 2)", 0.0),
        (" " * 300 + "(1 + 2) * 8", 1.0),
        ("(1\xa0+\t2)·8 \u2013 0", 0.0),
        ("(1\xa0+\t2)·8", 1.0),
        ("8 * 2 \u2013 1", 0.0),
        ("8 * (1 \u2013 \u22122)", 1.0),
        ("(1 + 2) *" + " " * 300 + "8", 0.0),
        ("", 0.0),
        ("()", 0.0),
    ],
)
def test_countdown(completion, score):
    assert verdict("countdown", completion, target=24, nums=[1, 2, 8]) == score
    assert verdict("countdown", completion, answer="24", numbers=[8, 2, 1]) == score


def test_countdown_is_exact_and_checks_its_columns():
    assert verdict("countdown", "8 / (3 - 8 / 3)", target=24, nums=[3, 3, 8, 8]) == 1.0  # a float gives 23.999
    assert verdict("countdown", "1 / 3 + 1 / 3 + 1 / 3", target=1, nums=[1, 1, 1, 3, 3, 3]) == 1.0
    assert verdict("countdown", "8 / (2 - 2)", target=24, nums=[8, 2, 2]) == 0.0
    assert verdict("countdown", "-8 * (1 + 2)", target=-24, nums=[1, 2, 8]) == 1.0
    assert verdict("countdown", "+8 * (1 + 2)", target=-24, nums=[1, 2, 8]) == 0.0
    assert verdict("countdown", "1", target=None, nums=[1]) is None
    assert verdict("countdown", "2 * 3", target=6, nums=["2", 3.0]) == 1.0
    for odd, said in (([2.5, 3], "5/2, 3"), ([-2, 7], "-2, 7")):
        with pytest.raises(ValueError, match=f"the numbers {said} are not all integers from 0 on"):
            verdict("countdown", "2 + 3", target=5, nums=odd)
    with pytest.raises(ValueError, match="nums"):
        verdict("countdown", "1", target=1)


@pytest.mark.parametrize(
    "completion, score",
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a\nb</think>\n\n<answer>\nb</answer>\n", 1.0),
        ("a</think><answer>b</answer>", 1.0),
        ("<think>1 < 2 </b></think><answer></answer>", 1.0),
        ("<answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>b<answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer>c", 0.0),
        ("c<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think><answer>b</answer></think>", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, score):
    assert verdict("format", completion) == score


HUGE = 10**5
HOSTILE = {
    "digits": "9" * HUGE,
    "negative digits": "-" * HUGE + "9",
    "denominator": "1/" + "0" * HUGE,
    "exponent": "1e999999999",
    "power": "9**9**9",
    "power chain": "9" + "**9" * 30_000,
    "minus chain": "-" * 299 + "1",
    "round brackets": "(" * 10**4 + "1" + ")" * 10**4,
    "open brackets": "(" * HUGE,
    "boxes": r"\boxed{" * 10**4,
    "nested braces": r"\boxed{" + "{" * 10**4 + "}" * 10**4,
    "box and spaces": (r"\boxed" + " " * 10) * 6000,
    "fractions": r"\boxed{" + r"\frac{" * 10**4,
    "numbers": "1 " * (HUGE // 2),
    "commas": "1," * (HUGE // 2),
    "groups": ",111" * (HUGE // 4),
    "signs": "$-" * (HUGE // 2),
    "remarks": "1 (" + "=" * HUGE,
    "open remarks": "1 (=" * (HUGE // 4),
    "number and spaces": "1" + " " * HUGE + "=",
    "mixed fractions": "1 1/" * (HUGE // 4),
    "hashes": "#### " * (HUGE // 5),
    "answer tags": "<answer>" * (HUGE // 8),
    "closed tags": "<answer></answer>" * 6000,
    "think tags": "<think>" * (HUGE // 7),
    "angle brackets": "<" * HUGE,
    "equals": "=" * HUGE,
    "lines": "\n" * HUGE,
    "spaces": " " * HUGE,
    "nul": "\0" * HUGE,
    "surrogates": "\ud800" * HUGE,
    "right to left": "\u202e\u200f12" * (HUGE // 4),
    "other digits": "٣²" * (HUGE // 2),
}
COLUMNS = {"answer": [42], "target": [42], "nums": [[6, 7]]}


@pytest.mark.parametrize("reward", common.BUILTIN_REWARDS.values(), ids=common.BUILTIN_REWARDS)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completion_scores_zero_in_no_time(reward, text):
    seconds = []
    for completion in (text, f"<answer>{text}</answer>", f"#### {text}", rf"\boxed{{{text}}}"):
        start = time.process_time()
        assert reward(completions=[completion], **COLUMNS) == [0.0]
        seconds.append(time.process_time() - start)
    # The bound of 50 ms each is meant for the typical machine; a quadratic step takes seconds.
    assert sum(seconds) < 0.4


@given(
    st.lists(
        st.sampled_from(list("0123456789+-*/()=.,$%{}<> \n\\#\0\ud800\u202e") + [r"\boxed{", "<answer>", "</answer>"])
        | st.characters(categories=None),
        max_size=200,
    ).map("".join)
)
@settings(deadline=None, max_examples=150)
def test_no_completion_raises(text):
    for reward in common.BUILTIN_REWARDS.values():
        [score] = reward(completions=[text], **COLUMNS)
        assert score in (0.0, 1.0)


# ---------------------------------------------------------------- loading


@pytest.fixture
def reward_file(tmp_path):
    def write(code, name="rewards.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(code))
        return str(path)

    return write


def test_load_rewards_by_name_and_file(reward_file):
    reward_file("VALUE = 0.5", "neighbour_of_rewards.py")
    path = reward_file(
        """
        import neighbour_of_rewards
        calls = []
        def format(completions, **kwargs):
            calls.append(1)
            return [neighbour_of_rewards.VALUE for _ in completions]
        def count(completions, **kwargs):
            return [float(len(calls)) for _ in completions]
        if __name__ == "__main__":
            raise SystemExit("not a script")
        """
    )
    rewards = common.load_rewards(["format", f"{path}:format", f"{path}:format", f"{path}:count"])
    assert [reward.name for reward in rewards] == ["format", "format_2", "format_3", "count"]
    assert rewards[0].function is common.BUILTIN_REWARDS["format"]
    scores = run(rewards, ["a", "b"])
    assert scores.by_function["format_2"].tolist() == [0.5, 0.5]
    assert scores.by_function["count"].tolist() == [2.0, 2.0]  # one module: the calls of both formats


def test_functions_may_spawn_processes_that_call_their_files_own(reward_file):
    """macOS spawns where Linux forks."""
    path = reward_file(
        """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        def length(text):
            return float(len(text))
        def lengths(completions):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return list(pool.map(length, completions))
        """,
        "spawning_rewards.py",
    )
    assert run(common.load_rewards([f"{path}:lengths"]), ["a", "bcd"]).total.tolist() == [1.0, 3.0]


def test_a_file_that_is_imported_already_is_not_replaced_by_another_module_of_it(reward_file):
    path = reward_file("def f(completions): return [1.0] * len(completions)", "imported_twice.py")
    first, second = common.import_file(path), common.import_file(path)
    assert sys.modules["imported_twice"] is first and sys.modules[second.__name__] is second is not first


def test_the_folder_of_a_reward_file_joins_the_search_path_behind_all_others(reward_file, tmp_path, monkeypatch):
    """What lies beside it hides no library of that name."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "libraries"), *sys.path])
    (tmp_path / "libraries").mkdir()
    reward_file("WHERE = 'library'", "libraries/library_beside_rewards.py"), reward_file("WHERE = 'beside'", "library_beside_rewards.py")
    code = "from library_beside_rewards import WHERE\ndef f(completions):\n    return [float(WHERE == 'library')] * len(completions)"
    before = list(sys.path)
    for name in ("importing_rewards.py", "others_beside_them.py"):
        assert run(common.load_rewards([f"{reward_file(code, name)}:f"]), ["a"]).total.tolist() == [1.0]
    assert sys.path == [*before, str(tmp_path)]


def test_rewards_are_not_logged_under_names_that_other_numbers_have(reward_file):
    names = ["mean", "std", "frac_zero_std", "resampled_groups", "reward_model", "mean", "mean_2"]
    path = reward_file("\n".join(f"def {name}(completions): pass" for name in names))
    rewards = common.load_rewards([f"{path}:{name}" for name in names])
    assert [reward.name for reward in rewards] == [f"{name}_2" for name in names[:5]] + ["mean_3", "mean_2_2"]


@pytest.mark.parametrize(
    "code, attribute, named",
    [
        ("x = 1\ndef f(:\n    pass", "f", "rewards.py:2"),
        ("x = 1\n\n1 / 0", "f", "ZeroDivisionError: division by zero at .*rewards.py:3"),
        ("import no_such_module_at_all", "f", "ModuleNotFoundError.*rewards.py:1"),
        ("raise SystemExit(0)", "f", "SystemExit: 0 at .*rewards.py:1"),
        ("x = 1", "f", "defines no function 'f'"),
        ("f = 1", "f", "defines no function 'f'"),
        ("def f(): pass", "", "defines no function ''"),
    ],
)
def test_reward_file_errors(reward_file, code, attribute, named):
    path = reward_file(code)
    with pytest.raises(common.UserError, match=named) as error:
        common.load_rewards([f"{path}:{attribute}"])
    assert path in str(error.value) and "\n" not in str(error.value)


def test_reward_name_errors(tmp_path):
    for names, named in [
        (["gsm9k"], "no reward 'gsm9k': take exact, gsm8k, countdown, format or file.py:function"),
        (["rewards.py"], "no reward 'rewards.py'"),
        (["rewards.txt:f"], "no reward 'rewards.txt:f'"),
        ([f"{tmp_path}/none.py:f"], "none.py does not exist"),
    ]:
        with pytest.raises(common.UserError) as error:
            common.load_rewards(names)
        assert named in str(error.value)


# ---------------------------------------------------------------- calling


def run(functions, completions, prompts=None, ids=None, **options):
    """score() of plain functions or Rewards on texts; each completion has as many tokens as characters."""
    rewards = [f if isinstance(f, common.Reward) else common.Reward(f"f{i}", f) for i, f in enumerate(functions)]
    prompts = prompts or [common.Prompt([1], "p", {}) for _ in completions]
    ids = ids or [[1] * len(text) for text in completions]
    return common.score(rewards, prompts, completions, ids, **options)


def test_functions_get_keywords_columns_and_chats():
    chat = [{"role": "user", "content": "q"}]
    prompts = [common.Prompt([1], chat, {"answer": "x"}), common.Prompt([1], "text", {"answer": "y", "level": 1})]
    seen = {}

    def function(**kwargs):
        seen.update(kwargs)
        return [0, 0]

    run([function], ["a", "bc"], prompts, [[5], [6, 7]], trainer_state="state")
    assert seen["prompts"] == [chat, "text"]
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], "bc"]
    assert seen["completion_ids"] == [[5], [6, 7]]
    assert seen["answer"] == ["x", "y"] and seen["level"] == [None, 1]
    assert seen["trainer_state"] == "state"


def test_a_function_gets_only_what_it_takes_and_cannot_spoil_the_next():
    def first(completions, completion_ids):
        completions.clear()
        return [float(len(ids)) for ids in completion_ids]

    class Second:
        def __call__(self, completions, *, level=7, **_):
            return [float(len(completions) + level)] * 2

    scores = run([first, Second()], ["a", "bc"])
    assert scores.by_function["f0"].tolist() == [1.0, 2.0] and scores.by_function["f1"].tolist() == [9.0, 9.0]


def test_a_function_may_change_what_it_gets():
    def change(prompts, completions, completion_ids, nums, trainer_state):
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            assert len(prompt) == len(completion) == 1 and nums[i] == [1, 2]  # not what was done to the one before
            prompt.append("more"), completion.append("more"), nums[i].pop(), completion_ids[i].clear()
            prompt[0]["content"] = "other"
        return [0.0] * len(prompts)

    prompt = common.Prompt([1], [{"role": "user", "content": "q"}], {"nums": [1, 2]})
    ids = [[5], [6, 7]]
    for step in range(2):
        run([change, change], ["a", "bc"], [prompt, prompt], ids)
    assert prompt.prompt == [{"role": "user", "content": "q"}] and prompt.columns == {"nums": [1, 2]}
    assert ids == [[5], [6, 7]]


def test_missing_column_is_named_before_and_during_a_run():
    rewards = common.load_rewards(["format", "exact"])
    common.check_rewards(rewards, [{"prompt": "p", "answer": "x"}])
    for check in (lambda: common.check_rewards(rewards, [{"prompt": "p", "level": 1}]), lambda: run(rewards, ["a"])):
        with pytest.raises(common.UserError, match="reward exact needs a column 'answer'.*; name .* with --answer-column$"):
            check()
    with pytest.raises(common.UserError, match=r"reward f0 needs a column 'gold', .*\)$"):
        run([lambda completions, gold: [0.0]], ["a"])


def test_a_keyword_without_default_is_a_column_that_has_to_be_there():
    def demanding(completions, *, gold, level=1, **columns):
        return [float(gold[0])] * len(completions)

    with pytest.raises(common.UserError, match=r"^reward own needs a column 'gold', which the dataset lacks \(beside prompts it has level\)$"):
        common.check_columns([common.Reward("own", demanding)], ["level"])
    common.check_columns([common.Reward("own", demanding)], ["gold"])
    assert run([demanding], ["a"], [common.Prompt([1], "p", {"gold": 3})]).total.tolist() == [3.0]


def test_built_in_rewards_look_at_the_answers_before_a_run():
    def untouched(completions, **kwargs):
        raise AssertionError("a reward file is not called before there are completions")

    common.check_rewards([common.Reward("own", untouched)], [{"prompt": "p"}])
    rows = [{"prompt": "p", "answer": "#### 1"}, {"prompt": "q", "answer": "Paris"}]
    for name, named in [("gsm8k", "no number in the answer 'Paris'"), ("countdown", "needs the columns target")]:
        with pytest.raises(common.UserError, match=named):
            common.check_rewards(common.load_rewards([name]), rows)


def test_a_reward_model_is_tried_on_the_shortest_prompts_which_are_not_dropped_as_too_long():
    seen = []
    reward = common.Reward("reward_model", lambda prompts, completions: seen.extend(map(len, prompts)) or [0.0] * len(prompts))
    common.check_rewards([reward], [{"prompt": "a" * n} for n in range(20, 0, -1)])
    assert seen == list(range(1, 9))


def test_functions_of_trl_style():
    """What TRL's documentation shows: async functions, None, its spelling of ids, logging, the trainer's state."""

    async def later(prompts, completions, **kwargs):
        return [1.0 if completion else 0.0 for completion in completions]

    def task(completions, task, **kwargs):
        return [1.0 if name == "math" else None for name in task]

    def lengths(completions_ids, **kwargs):
        return [float(len(ids)) for ids in completions_ids]

    def logs(completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
        log_extra("gold", ["x"] * len(completions))
        log_metric("step", trainer_state.global_step)
        return [0.0] * len(completions)

    prompts = [common.Prompt([1], "p", {"task": task}) for task in ("math", "code")]
    state = types.SimpleNamespace(global_step=3)
    scores = run([later, task, lengths, logs], ["ab", ""], prompts, [[1, 2], [1]], trainer_state=state)
    assert scores.total.tolist() == [4.0, 1.0] and math.isnan(scores.by_function["f1"][1])
    assert scores.metrics == {"step": [3.0]} and scores.extra == {"gold": ["x", "x"]}
    with pytest.raises(common.UserError, match=r"log_extra\('gold'\) got 1 values for 2 completions at .*test_rewards.py"):
        run([lambda completions, log_extra: log_extra("gold", ["x"])], ["a", "b"])


def test_what_functions_log_follows_replaced_rows():
    def logs(completions, log_extra, log_metric):
        log_extra("upper", [text.upper() for text in completions])
        log_metric("n", len(completions))
        return [0.0] * len(completions)

    scores = run([logs], ["a", "b", "c"])
    scores.replace([0, 2], run([logs], ["x", "y"]))
    assert scores.metrics == {"n": [3.0, 2.0]} and scores.extra == {"upper": ["X", "B", "Y"]}
    silent = run([lambda completions: [0.0] * len(completions)], ["a", "b", "c"])
    silent.replace([0, 2], run([logs], ["x", "y"]))
    assert silent.extra == {"upper": ["X", None, "Y"]}
    scores.replace([1], run([lambda completions: [0.0] * len(completions)], ["z"]))
    assert scores.extra == {"upper": ["X", None, "Y"]}


def test_async_functions_share_one_loop_with_what_their_file_made():
    limit = asyncio.Semaphore(1)

    async def limited(completions):
        async def one(text):
            async with limit:
                await asyncio.sleep(0)
                return float(len(text))

        return await asyncio.gather(*map(one, completions))

    for step in range(2):
        assert run([limited, limited], ["a", "bc"]).total.tolist() == [2.0, 4.0]


def test_async_functions_run_where_a_loop_runs_already():
    """As in a notebook."""

    async def later(completions):
        await asyncio.sleep(0.01)
        return [float(len(text)) for text in completions]

    async def cell():
        return [run([later], ["ab", "c"]).total.tolist() for _ in range(2)]

    assert asyncio.run(cell()) == [[2.0, 1.0]] * 2


def test_weighted_sum_over_the_functions_that_apply():
    rewards = [
        common.Reward("a", lambda completions: [1.0, None, None], 2.0),
        common.Reward("b", lambda completions: [0.5, 0.25, None], -1.0),
    ]
    scores = run(rewards, ["x", "y", "z"])
    assert scores.total.dtype == torch.float32 and not scores.has_lists
    assert scores.dense[:2] == [[1.5], [-0.25]] and scores.dense[2] is None
    assert scores.total[:2].tolist() == [1.5, -0.25] and math.isnan(scores.total[2])
    assert scores.by_function["a"][0] == 1.0 and scores.by_function["a"].isnan().tolist() == [False, True, True]
    assert scores.by_function["b"].tolist()[:2] == [0.5, 0.25]


def test_a_function_of_weight_0_is_watched_and_changes_nothing():
    """Neither where the others give None nor by lists of its own."""
    plain = common.Reward("plain", lambda completions: [1.0, None])
    watched = [common.Reward("number", lambda completions: [2.0, 3.0], 0.0), common.Reward("list", lambda completions: [[1.0], [2.0]], 0.0)]
    alone, beside = run([plain], ["x", "y"]), run([plain, *watched], ["x", "y"])
    assert beside.total[0] == alone.total[0] == 1.0 and beside.total[1].isnan() and alone.total[1].isnan()
    assert (beside.dense, beside.has_lists) == (alone.dense, alone.has_lists) == ([[1.0], None], False)
    assert beside.by_function["number"].tolist() == [2.0, 3.0] and beside.by_function["list"].tolist() == [1.0, 2.0]


def test_dense_rewards_are_weighted_and_scalars_join_the_last_token():
    rewards = [
        common.Reward("steps", lambda completions: [[0.5, 0.0, 1.0], None, None, (1, 2)], 2.0),
        common.Reward("plain", lambda completions: [1.0, 3.0, None, None], 10.0),
    ]
    scores = run(rewards, ["abc", "de", "f", "gh"])
    assert scores.dense == [[1.0, None, 12.0], [None, 30.0], None, [2.0, 4.0]] and scores.has_lists
    assert scores.total[[0, 1, 3]].tolist() == [13.0, 30.0, 6.0] and math.isnan(scores.total[2])
    assert scores.by_function["steps"][[0, 3]].tolist() == [1.5, 3.0]


def test_lists_and_plain_scores_that_replace_each_other_keep_their_tokens():
    for first, second, dense in [([[1, 2], 4], [3], [[None, 3.0], [None, 4.0]]), ([3, 4], [[1, 2]], [[1.0, 2.0], [None, 4.0]])]:
        scores = run([lambda completions: first], ["ab", "cd"])
        scores.replace([0], run([lambda completions: second], ["ab"]))
        assert scores.has_lists and scores.dense == dense


def test_which_tokens_end_a_step():
    """Not those where lists hold 0 or None; always the last one of a plain score, even of 0; none for a weight of 0."""
    rewards = [
        common.Reward("steps", lambda completions: [[None, 0.5, 0], [0, None, 0.0], None]),
        common.Reward("plain", lambda completions: [0, 0.0, 0]),
        common.Reward("against", lambda completions: [[0, -0.5, 0], None, None]),
        common.Reward("watched", lambda completions: [[1, 1, 1], None, 5.0], 0.0),
    ]
    scores = run(rewards, ["abc"] * 3)
    assert scores.dense == [[None, 0.0, 0.0], [None, None, 0.0], [None, None, 0.0]] and scores.total.tolist() == [0.0] * 3
    assert scores.by_function["steps"][:2].tolist() == [0.5, 0.0]
    rollout = common.rollout_of([[1]] * 3, [[2, 2, 2]] * 3, torch.device("cpu"), [0, 0, 0])
    table, ends = common.dense_table([[None, 0.0, 2.0], None, [3.0]], rollout)
    assert table.tolist() == [[0, 0, 2], [0, 0, 0], [3, 0, 0]]
    assert ends.tolist() == [[False, True, True], [False] * 3, [True, False, False]]
    rollout.leave_out(torch.tensor([True, False, False]))
    table, ends = common.dense_table([[None, 0.0, 2.0], None, [3.0]], rollout)
    assert table.tolist() == [[0, 0, 0], [0, 0, 0], [3, 0, 0]] and ends.sum(dim=1).tolist() == [0, 0, 1]


def test_numbers_of_any_library_are_taken():
    values = [True, 1, 1.0, numpy.float32(1), numpy.int64(1), numpy.bool_(True), torch.tensor(1.0), torch.tensor(1)]
    assert run([lambda completions: values], ["x"] * 8).total.tolist() == [1.0] * 8
    odd = [10**30, Fraction(1, 2)]
    total = run([common.Reward("f", lambda completions: odd, 1e-20)], ["x"] * 2).total
    assert total.tolist() == pytest.approx([1e10, 0.5e-20], rel=1e-6, abs=0)
    for array in (numpy.ones(2), torch.ones(2, dtype=torch.bfloat16), (1, 1)):
        assert run([lambda completions: array], ["x"] * 2).total.tolist() == [1.0, 1.0]
    steps = [torch.ones(2), numpy.ones(1), [torch.tensor(1.0)]]
    assert run([lambda completions: steps], ["xy", "x", "x"]).dense == [[1.0, 1.0], [1.0], [1.0]]


@pytest.mark.parametrize(
    "result, named",
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([], "returned 0 scores for 2"),
        (None, "returned NoneType, not a list"),
        (1.0, "returned float, not a list"),
        ({0: 1, 1: 1}, "returned dict, not a list"),
        ("11", "returned str, not a list"),
        ([1.0, math.nan], "sample 1 nan, which is not finite"),
        ([-math.inf, 1.0], "sample 0 -inf, which is not finite"),
        ([1.0, 1e39], "sample 1 1e.39, which is not finite"),
        ([1.0, 10**400], "sample 1 1000.*, which is not finite"),
        ([1.0, torch.tensor(math.nan)], "sample 1 nan, which is not finite"),
        ([1.0, "1"], "sample 1 '1', which is not a number"),
        ([1j, 1.0], "sample 0 1j, which is not a number"),
        ([[1.0], 1.0], "sample 0 1 scores for 2 completion tokens"),
        ([1.0, [1.0, 2.0, 3.0]], "sample 1 3 scores for 2 completion tokens"),
        ([1.0, [1.0, math.nan]], "sample 1 nan, which is not finite"),
        ([1.0, [1.0, [2.0]]], r"sample 1 \[2.0\], which is not a number"),
    ],
)
def test_wrong_scores_name_function_and_sample(result, named):
    with pytest.raises(common.UserError, match=named) as error:
        run([common.Reward("culprit", lambda completions: result)], ["ab", "cd"])
    assert "reward culprit" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_an_exception_names_function_type_message_and_line(reward_file):
    path = reward_file(
        """
        import json
        read = lambda text: json.loads(text)
        def broken(completions, **kwargs):
            return [read(text) for text in completions]
        async def later(completions, **kwargs):
            raise ValueError("two\\nlines")
        async def cancelled(completions, **kwargs):
            import asyncio
            raise asyncio.CancelledError
        def leave(completions, **kwargs):
            raise SystemExit(0)
        def panic(completions, **kwargs):
            raise BaseException("as from Rust")
        def stop(completions, **kwargs):
            raise KeyboardInterrupt
        """
    )
    for name, named in [
        ("broken", rf"reward broken raised JSONDecodeError: Expecting .* at {path}:3"),
        ("later", rf"reward later raised ValueError: two lines at {path}:7, called with 2 completions, the first: 'not json'$"),
        ("leave", rf"reward leave raised SystemExit: 0 at {path}:12"),
        ("cancelled", rf"reward cancelled raised CancelledError at {path}:10"),
        ("panic", rf"reward panic raised BaseException: as from Rust at {path}:14"),
    ]:
        with pytest.raises(common.UserError, match=named) as error:
            run(common.load_rewards([f"{path}:{name}"]), ["not json", "{}"])
        assert "\n" not in str(error.value)
    with pytest.raises(common.UserError, match="reward exact raised"):
        run([common.Reward("exact", lambda completions: 1 / 0)], ["a"])
    with pytest.raises(KeyboardInterrupt):  # somebody wants to stop at once
        run(common.load_rewards([f"{path}:stop"]), ["a"])


# ---------------------------------------------------------------- time limit


def slow(completions, **kwargs):
    try:
        time.sleep(30)
    except Exception:
        pass
    return [0.0] * len(completions)


def test_time_limit_ends_a_slow_function_and_restores_the_handler():
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(common.UserError, match="reward f0 took longer than --reward-timeout 0.1 seconds"):
        run([slow], ["a"], timeout=0.1)
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert run([lambda completions: [1.0]], ["a"], timeout=60).total.tolist() == [1.0]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_time_limit_gives_a_timer_back_that_was_there_before():
    """As of a notebook or a test runner that has a limit of its own."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        for limit in (5, 0):
            signal.setitimer(signal.ITIMER_REAL, 100, 7)
            slow = lambda completions: time.sleep(0.1) or signal.getitimer(signal.ITIMER_REAL)  # noqa: E731
            assert run([slow], ["a", "b"], timeout=limit).total[1] == (limit or 7)
            left, interval = signal.getitimer(signal.ITIMER_REAL)
            assert 90 < left <= 100 - 0.1 * (limit > 0) and interval == 7 and signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_timer_that_runs_out_in_the_call_goes_off_after_it():
    went_off = []
    before = signal.signal(signal.SIGALRM, lambda *_: went_off.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert run([lambda completions: time.sleep(0.05) or [float(len(went_off))]], ["a"], timeout=5).total.tolist() == [0.0]
        time.sleep(0.01)
        assert went_off
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_time_limit_is_left_out_in_other_threads():
    totals = []
    thread = threading.Thread(target=lambda: totals.append(run([lambda completions: [1.0]], ["a"], timeout=5).total))
    thread.start()
    thread.join()
    assert totals[0].tolist() == [1.0]


def test_time_limit_reaches_async_functions():
    async def sleepy(completions, **kwargs):
        await asyncio.sleep(30)

    with pytest.raises(common.UserError, match="--reward-timeout"):
        run([sleepy], ["a"], timeout=0.1)


def test_what_a_reward_file_changes_for_the_process_is_put_back(tmp_path):
    (tmp_path / "a.py").write_text(
        "import os, tempfile, torch\ndef change():\n    torch.set_grad_enabled(False)\n    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_default_device('meta')\n"
        "os.chdir('/')\nchange()\n"
        "def moves(completions):\n    with tempfile.TemporaryDirectory() as folder:\n        os.chdir(folder)\n"
        "        change()\n        return [1.0] * len(completions)\n"
    )

    def is_as_before():
        return os.getcwd() == before and torch.is_grad_enabled() and torch.ones(1).dtype == torch.float32 and torch.ones(1).device.type == "cpu"

    before, open_files = os.getcwd(), len(os.listdir("/dev/fd"))
    rewards = common.load_rewards([f"{tmp_path / 'a.py'}:moves"])
    assert is_as_before()
    assert run(rewards, ["a"]).total.tolist() == [1.0]
    assert is_as_before()
    assert len(os.listdir("/dev/fd")) == open_files


@pytest.mark.parametrize(("value", "weight"), [(3e38, 10.0), (-1e30, 1.0)])
def test_a_sum_of_scores_whose_square_overflows_is_an_error(value, weight):
    with pytest.raises(common.UserError, match="--reward-weights"):
        run([common.Reward("f", lambda completions: [value, 0.0], weight)], ["a", "b"])


def test_time_limit_comes_again_where_clean_up_does_not_end():
    def waits(completions):
        try:
            time.sleep(30)
        finally:
            time.sleep(30)

    start = time.monotonic()
    with pytest.raises(common.UserError, match="--reward-timeout"):
        run([waits], ["a"], timeout=0.1)
    assert time.monotonic() - start < 10
