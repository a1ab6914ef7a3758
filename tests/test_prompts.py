"""Datasets, tokenised prompts, the held-out split and the order of prompts."""

import hashlib
import json
import socket
import sys
import types
from collections import Counter

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import helpers

CHAT = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or m.role != 'assistant' %};{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(prefix="", suffix="", template=None):
    """A character tokenizer that puts special tokens around a text: "[B]" (bos), "[E]" (end)."""
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz<>;0123456789 "))
    vocabulary = {token: i for i, token in enumerate(["[B]", "[E]", "[U]", *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=[("[B]", 0), ("[E]", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[B]", eos_token="[E]", unk_token="[U]"
    )
    tokenizer.chat_template = template
    return tokenizer


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


# ---------------------------------------------------------------- JSON lines


def test_jsonl_keeps_columns_skips_blank_lines_and_fills_absent_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": 1, "level": "x"}, "", "  ", {"prompt": CHAT, "z": 0})
    assert common.load_rows(path, "train") == [
        {"prompt": "p", "answer": 1, "level": "x", "z": None},
        {"prompt": CHAT, "answer": None, "level": None, "z": 0},
    ]


def test_jsonl_accepts_byte_order_mark_crlf_and_any_ending(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "p"}\r\n{"prompt": "q"}')
    assert [row["prompt"] for row in common.load_rows(str(path), "test")] == ["p", "q"]


def test_columns_are_copied_over_prompt_and_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "gold": "g", "prompt": 5, "answer": "other"})
    [row] = common.load_rows(path, "train", "question", "gold")
    assert row == {"question": "q", "gold": "g", "prompt": "q", "answer": "g"}


@pytest.mark.parametrize(
    "line, named",
    [
        ("{", "not one JSON object a line: JSONDecodeError"),
        (json.dumps([{"prompt": "p"}], indent=2), "not one JSON object a line: JSONDecodeError"),
        ('{"prompt": "p"} x', "not one JSON object"),
        ("[" * 100_000, "not one JSON object"),
        ('{"prompt": 1' + "0" * 5000 + "}", "not one JSON object"),
        ("[1]", "not an object"),
        ("null", "not an object"),
        ("0", "not an object"),
        ({"text": "p"}, "no column 'prompt' (it has text)"),
        ("{}", "no column 'prompt' (it has none)"),
        ({"prompt": 3}, "must be a text"),
        ({"prompt": None}, "must be a text"),
        ({"prompt": ["p"]}, "must be a text"),
        ({"prompt": [{"role": "user"}]}, "must be a text"),
        ({"prompt": [{"role": "user", "content": None}]}, "must be a text"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [{"role": "user", "content": ""}]}, "empty"),
        ({"prompt": "half \ud800"}, "surrogate"),
        ({"prompt": [*CHAT, {"role": "user", "content": "half \ud800"}]}, "surrogate"),
    ],
)
def test_broken_line_is_named_by_file_and_number(tmp_path, line, named):
    path = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, "", line)
    with pytest.raises(common.UserError) as error:
        common.load_rows(path, "train")
    assert f"{path}:3: " in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(path)


def test_file_errors(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "p"}\n{"prompt": "caf\xe9"}\n')
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    for path, named in [
        (latin, f"{latin}:2: not one JSON object a line: UnicodeDecodeError: 'utf-8' codec"),
        (folder, "directory"),
        (tmp_path / "none.jsonl", "No such file"),
        (write(tmp_path / "empty.jsonl", "", ""), "holds no prompts"),
    ]:
        with pytest.raises(common.UserError, match=".*") as error:
            common.load_rows(str(path), "train")
        assert named in str(error.value) and str(path) in str(error.value)


def test_answer_column_must_exist_only_when_it_was_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p"})
    assert common.load_rows(path, "train") == [{"prompt": "p"}]
    with pytest.raises(common.UserError, match="'gold' of --answer-column"):
        common.load_rows(path, "train", answer_column="gold")


def test_answer_column_may_be_missing_in_some_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "gold": 1}, {"prompt": "q"})
    assert [row["answer"] for row in common.load_rows(path, "train", answer_column="gold")] == [1, None]


# ---------------------------------------------------------------- the built-in task


def test_sums_of_the_built_in_task_are_right_and_each_is_in_one_set_with_its_mirror_image():
    sets, kinds = {split: common.addition_rows(split) for split in ("test", "warm start", "train")}, {}
    for split, rows in sets.items():
        for row in rows:
            a, b = (int(number[::-1]) for number in row["prompt"].rstrip("=").split("+"))
            assert int(row["answer"][::-1]) == a + b and len(row["prompt"]) == 6 and len(row["answer"]) == 3
            assert (row["level"] == "hard") == (a % 10 + b % 10 >= 10 or a // 10 + b // 10 >= 10)
            kinds[a, b] = split
        assert len({row["level"] for row in rows[:20]}) == 2  # shuffled
    assert len(kinds) == sum(map(len, sets.values())) == 10_000 and all(split == kinds[b, a] for (a, b), split in kinds.items())
    levels = {split: Counter(row["level"] for row in rows) for split, rows in sets.items()}
    assert levels["test"] == {"easy": 251, "hard": 250} and levels["warm start"] == {"easy": 1400, "hard": 600}


# ---------------------------------------------------------------- gsm8k and hub datasets


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A cache folder, and a small file in the part of the authors' test split."""
    content = json.dumps({"question": "6 * 7?", "answer": "It is\n#### 42"}).encode()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setitem(common.GSM8K_SHA256, "test", hashlib.sha256(content).hexdigest())
    return tmp_path / "gsm8k" / "test.jsonl", content


def test_gsm8k_is_fetched_once(gsm8k, monkeypatch):
    path, content = gsm8k
    calls = []

    def download(url, target, hash_prefix):
        calls.append((url, target, hash_prefix))
        assert socket.getdefaulttimeout() == 20  # else a firewall that drops packets looks like a hang
        path.write_bytes(content)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):
        [row] = common.load_rows("gsm8k", "test")
        assert row["prompt"] == "6 * 7?" and row["answer"].endswith("#### 42")
    assert calls == [(f"{common.GSM8K_URL}/test.jsonl", str(path), common.GSM8K_SHA256["test"])]
    assert socket.getdefaulttimeout() is None
    assert common.load_rows("gsm8k", "test", prompt_column="question")[0]["prompt"] == "6 * 7?"
    assert common.load_rows("gsm8k", "test", prompt_column="answer")[0]["prompt"] == "It is\n#### 42"


def test_gsm8k_file_that_is_not_the_authors_is_named_and_kept(gsm8k):
    path, content = gsm8k
    path.parent.mkdir()
    path.write_bytes(content + b" ")
    with pytest.raises(common.UserError, match="test.jsonl is not GSM8K"):
        common.load_rows("gsm8k", "test")
    assert path.read_bytes() == content + b" "


def test_gsm8k_without_network_says_where_to_put_the_files(gsm8k, monkeypatch):
    path, _ = gsm8k
    for error in (OSError("no route to host"), RuntimeError("invalid hash value")):

        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr("torch.hub.download_url_to_file", download)
        with pytest.raises(common.UserError) as caught:
            common.load_rows("gsm8k", "test")
        assert str(path.parent) in str(caught.value) and common.GSM8K_URL in str(caught.value)
        assert "train.jsonl and test.jsonl" in str(caught.value) and str(error) in str(caught.value)


def test_hub_dataset_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(common.UserError, match="someone/prompts is neither .* nor a file .*pip install datasets"):
        common.load_rows("someone/prompts", "train")


def test_hub_dataset_goes_through_the_library(monkeypatch):
    def load_dataset(name, config, split):
        if split != "train":
            raise ValueError('Unknown split "test".\nShould be one of train.')
        return [{"prompt": f"{name} {config}", "answer": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert common.load_rows("a/b:main", "train") == [{"prompt": "a/b main", "answer": 1}]
    assert common.load_rows("a/b", "train")[0]["prompt"] == "a/b None"
    with pytest.raises(common.UserError, match='--eval-dataset a/b, split test: ValueError: Unknown split "test". Should'):
        common.load_rows("a/b", "test")
    with pytest.raises(common.UserError, match="a/b row 0: no column 'question'"):
        common.load_rows("a/b", "train", "question")


# ---------------------------------------------------------------- tokenising


def decoded(rows, tokenizer, system_prompt=None, limit=100):
    prompts, dropped = common.tokenize_prompts(rows, tokenizer, system_prompt, limit)
    assert dropped == 0
    return ["".join(tokenizer.convert_ids_to_tokens(prompt.ids)) for prompt in prompts]


@pytest.mark.parametrize(
    "prefix, suffix, expected",
    [("", "", "ab"), ("[B]", "", "[B]ab"), ("", "[E]", "ab"), ("[B]", "[E]", "[B]ab"), ("[E]", "[E]", "[E]ab")],
)
def test_text_has_the_tokenizers_bos_but_never_its_eos(prefix, suffix, expected):
    assert decoded([{"prompt": "ab"}], make_tokenizer(prefix, suffix)) == [expected]


def test_begin_token_spelled_by_the_text_is_not_doubled():
    rows = [{"prompt": "[B]ab"}, {"prompt": "[B][B]ab"}, {"prompt": "ab"}]
    assert decoded(rows, make_tokenizer("[B]", "[E]")) == ["[B]ab", "[B][B]ab", "[B]ab"]
    assert decoded(rows, make_tokenizer()) == ["[B]ab", "[B][B]ab", "ab"]


@pytest.mark.parametrize("suffix", ["", "[E]"])
def test_end_token_spelled_by_the_text_stays(suffix):
    assert decoded([{"prompt": "ab[E]"}], make_tokenizer("[B]", suffix)) == ["[B]ab[E]"]


def test_chat_goes_through_the_template_once():
    tokenizer = make_tokenizer("[B]", "[E]", TEMPLATE)  # the template alone decides on special tokens
    assert decoded([{"prompt": CHAT}], tokenizer) == ["<user>hi;<assistant>"]
    assert decoded([{"prompt": CHAT}], tokenizer, "be") == ["<system>be;<user>hi;<assistant>"]
    assert decoded([{"prompt": "hi"}], tokenizer, "be") == ["<system>be;<user>hi;<assistant>"]
    assert decoded([{"prompt": "hi"}], tokenizer, "") == ["<user>hi;<assistant>"]
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert decoded([{"prompt": own}], tokenizer, "be") == ["<system>own;<user>hi;<assistant>"]
    begun = [*CHAT, {"role": "assistant", "content": "well"}]
    assert decoded([{"prompt": begun}], tokenizer) == ["<user>hi;<assistant>well"]


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
DROPPING = TEMPLATE.replace("%}<{{ m.role", "if m.role != 'system' %}<{{ m.role", 1)


@pytest.mark.parametrize("template", [REFUSING, DROPPING], ids=["refusing", "dropping"])
def test_system_message_that_the_template_does_not_take_goes_before_the_users_text(template):
    tokenizer = make_tokenizer(template=template)
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert decoded([{"prompt": CHAT}, {"prompt": "hi"}], tokenizer, "be") == ["<user>be[U][U]hi;<assistant>"] * 2
    assert decoded([{"prompt": own}], tokenizer) == ["<user>own[U][U]hi;<assistant>"]
    assert own[1] == CHAT[0] == {"role": "user", "content": "hi"}  # as they were
    for nowhere in (own[:1], [own[0], {"role": "assistant", "content": "a"}]):
        assert common.system_in_user_turn(nowhere) == nowhere
    assert decoded([{"prompt": "hi"}], tokenizer, "") == ["<user>hi;<assistant>"]


def test_what_becomes_of_the_chat_template_is_said(capsys):
    def said(template, system_prompt, prompt="hi", held_out="hi"):
        run = helpers.make_run(system_prompt=system_prompt, model="m", dataset="d")
        rows = [{"prompt": prompt}] * 11 + [{"prompt": held_out}]
        config = transformers.LlamaConfig(vocab_size=50)
        common.tokenize_train_and_eval(run.args, run, make_tokenizer(template=template), config, rows[:11], rows[11:])
        run.advise({"reward/mean": 0.5, "reward/std": 1.0, "completions/truncated_ratio": 1.0, "completions/mean_length": 9.0})
        return capsys.readouterr().out

    unused, no_place = 'the chat template; with --system-prompt "" they do', "no place for a system message"
    told = said(TEMPLATE, None)
    assert unused in told and 'raise --max-new-tokens, or use the chat template: --system-prompt ""' in told
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert no_place in said(REFUSING, "be")
    assert no_place in said(DROPPING, None, own) and no_place in said(DROPPING, None, CHAT, own)
    for quiet in (said(None, None), said(TEMPLATE, "be"), said(DROPPING, ""), said(REFUSING, None, CHAT, CHAT)):
        assert unused not in quiet and no_place not in quiet and "--system-prompt" not in quiet


@pytest.mark.parametrize(
    "flags, said",
    [({}, "exact"), ({"reward": ["gsm8k", "format"]}, "gsm8k"), ({"reward": ["format"]}, ""), ({"reward_model": "m"}, "")],
)
def test_rows_without_an_answer_are_counted_where_a_reward_needs_one(capsys, flags, said):
    run, config = helpers.make_run(model="m", dataset="d", **flags), transformers.LlamaConfig(vocab_size=50)
    rows = [{"prompt": "hi", "answer": None if i < 3 else 0} for i in range(12)]
    for train, warned in ((rows, bool(said)), (rows[3:], False)):
        common.tokenize_train_and_eval(run.args, run, make_tokenizer(), config, train, rows[:2])
        out = capsys.readouterr().out
        assert ("rows have no answer" in out) == warned
        assert not warned or f"warning: 3 of 12 rows have no answer and are not scored by {said}\n" in out


def test_a_role_that_the_template_leaves_out_is_refused_by_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": CHAT}, {"prompt": [{"role": "human", "content": "what"}]})
    rows, knowing = common.load_rows(path, "train"), "{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role"
    tokenizer = make_tokenizer(template=TEMPLATE.replace("<{{ m.role", knowing, 1).replace("{% endfor", "{% endif %}{% endfor", 1))
    with pytest.raises(common.UserError, match="a.jsonl:2: the chat template leaves out messages of the role 'human'"):
        common.tokenize_prompts(rows, tokenizer, None, 100)
    assert common.tokenize_prompts(rows, make_tokenizer(template=TEMPLATE), None, 100)[1] == 0


def test_columns_may_change_places(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"})
    assert common.load_rows(path, "train", "answer", "prompt") == [{"prompt": "a", "answer": "p"}]


def test_prompt_carries_what_reward_functions_receive():
    tokenizer = make_tokenizer(template=TEMPLATE)
    rows = [{"prompt": "hi", "answer": "x", "level": 2}]
    [text], _ = common.tokenize_prompts(rows, tokenizer, None, 100)
    assert text.prompt == "hi" and text.columns == {"answer": "x", "level": 2}
    [chat], _ = common.tokenize_prompts(rows, tokenizer, "be", 100)
    assert chat.prompt == [{"role": "system", "content": "be"}, *CHAT]
    assert rows == [{"prompt": "hi", "answer": "x", "level": 2}]


def test_long_prompts_are_dropped_not_cut():
    tokenizer = make_tokenizer("[B]")
    rows = [{"prompt": "a" * n} for n in (3, 4, 5, 6)]
    prompts, dropped = common.tokenize_prompts(rows, tokenizer, None, 5)
    assert [len(prompt.ids) for prompt in prompts] == [4, 5] and dropped == 2
    with pytest.raises(common.UserError, match="--max-prompt-tokens 3; the shortest has 4 tokens"):
        common.tokenize_prompts(rows, tokenizer, None, 3)


def test_prompts_that_are_dropped_on_either_side_are_counted(capsys):
    run, config = helpers.make_run(model="m", dataset="d", max_prompt_tokens=3), transformers.LlamaConfig(vocab_size=50)
    short, long = [{"prompt": "abc"}], [{"prompt": "abcd"}]
    for train, held_out, count in ((short * 3, short + long, 1), (short + long * 2, short + long, 3)):
        common.tokenize_train_and_eval(run.args, run, make_tokenizer(), config, train, held_out)
        assert f"warning: {count} prompts longer than --max-prompt-tokens 3 were dropped\n" in capsys.readouterr().out


def test_tokenising_errors():
    refusing = make_tokenizer(template="{{ raise_exception('System role\nnot supported') }}")
    nothing = make_tokenizer()
    nothing.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("a", "")
    for row, tokenizer, system_prompt, named in [
        (CHAT, make_tokenizer(), None, "no chat template"),
        ("hi", make_tokenizer(), "be", "--system-prompt"),
        ("hi", refusing, "be", "System role not supported"),
        ("aaa", nothing, None, "'aaa' gives no tokens"),
    ]:
        with pytest.raises(common.UserError) as error:
            common.tokenize_prompts([{"prompt": row}], tokenizer, system_prompt, 100)
        assert named in str(error.value) and "\n" not in str(error.value)


def test_a_chat_that_the_model_cannot_take_is_named_by_its_place_but_not_for_the_system_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "hi"}, {"prompt": CHAT}, {"prompt": "no"})
    rows = common.load_rows(path, "train")
    refuses = make_tokenizer(template="{% if messages[0].content == 'hi' %}{{ raise_exception('') }}{% endif %}" + TEMPLATE)
    silent = make_tokenizer()
    silent.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("no", "")
    for some, tokenizer, system_prompt, said in [
        (rows, make_tokenizer(), None, f"{path}:2: this model's tokenizer has no chat template, which chats and --system"),
        (rows, make_tokenizer(), "be", "this model's tokenizer has no chat template, which chats and --system-prompt need"),
        (rows, refuses, None, f"{path}:2: the chat template refuses"),
        (rows, refuses, "", "the chat template refuses"),
        (rows[1:2], make_tokenizer(template="{% if true %}{% endif %}"), None, f"{path}:2: "),
        (rows[2:], silent, None, f"{path}:3: the prompt 'no' gives no tokens"),
    ]:
        with pytest.raises(common.UserError) as error:
            common.tokenize_prompts(some, tokenizer, system_prompt, 100)
        assert str(error.value).startswith(said)


def test_the_longest_prompt_and_its_completion_may_fill_the_models_positions():
    prompts = [common.Prompt([2] * n, "p", {}) for n in (3, 8, 5)]
    config = transformers.LlamaConfig(vocab_size=3, max_position_embeddings=20)
    common.check_model_takes(prompts, types.SimpleNamespace(max_new_tokens=12), config, "m")
    with pytest.raises(common.UserError, match="^--max-new-tokens 13: with a prompt of 8 more than the 20 positions of m$"):
        common.check_model_takes(prompts, types.SimpleNamespace(max_new_tokens=13), config, "m")
    config.vocab_size = 2
    with pytest.raises(common.UserError, match="^m: the tokenizer gives token 2, and the model has only 2: "):
        common.check_model_takes(prompts, types.SimpleNamespace(max_new_tokens=12), config, "m")


# ---------------------------------------------------------------- split and order


@pytest.mark.parametrize("size, count, held", [(100, 5, 5), (100, 50, 10), (19, 50, 1), (10, 3, 1), (40, 0, 0)])
def test_held_out_split_is_disjoint_whole_and_seeded(size, count, held):
    rows = [{"prompt": str(i)} for i in range(size)]
    train, evaluation = common.held_out_split(rows, count, seed=1)
    assert len(evaluation) == held and sorted(train + evaluation, key=rows.index) == rows
    assert common.held_out_split(rows, count, seed=1) == (train, evaluation)
    if held > 1:
        assert common.held_out_split(rows, count, seed=2) != (train, evaluation)
        assert evaluation != rows[:held] and evaluation != rows[-held:]


def test_held_out_split_of_a_few_rows_is_the_rows():
    rows = [{"prompt": str(i)} for i in range(9)]
    assert common.held_out_split(rows, 500, 1) == (rows, rows)
    assert common.held_out_split(rows * 2, 12, 1) == (rows * 2, (rows * 2)[:12])


@pytest.mark.parametrize(("rows", "distinct", "said"), [(9, 9, True), (30, 9, True), (10, 10, False), (30, 10, False)])
def test_that_no_prompts_are_held_out_is_said(rows, distinct, said, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"a{i % distinct}", "answer": 1} for i in range(rows)))
    run, config = helpers.make_run(model="m", dataset=path), transformers.LlamaConfig(vocab_size=50)
    split = common.load_train_and_eval_rows(run.args, *common.load_all_rewards(run.args, run))
    common.tokenize_train_and_eval(run.args, run, make_tokenizer(), config, *split)
    out = capsys.readouterr().out
    assert ("evaluation prompts are" in out) == said
    assert not said or f"warning: {rows} of {rows} evaluation prompts are training prompts, too\n" in out


def test_evaluation_prompts_that_are_trained_on_are_said_and_are_from_all_over_their_file(tmp_path, capsys):
    """Which may be sorted, by difficulty say."""
    train = write(tmp_path / "a.jsonl", *({"prompt": f"a{i}", "answer": 1} for i in range(12)))
    test = write(tmp_path / "b.jsonl", *({"prompt": f"a{i}", "answer": 1} for i in reversed(range(8, 38))))
    run = helpers.make_run(model="m", dataset=train, eval_dataset=test, eval_prompts=7)
    _, eval_rows = split = common.load_train_and_eval_rows(run.args, *common.load_all_rewards(run.args, run))
    assert [row["prompt"] for row in eval_rows] == ["a37", "a33", "a29", "a25", "a20", "a16", "a12"]
    common.tokenize_train_and_eval(run.args, run, make_tokenizer(), transformers.LlamaConfig(vocab_size=50), *split)
    assert "evaluation prompts are" not in capsys.readouterr().out
    run.args.eval_prompts = 30
    split = common.load_train_and_eval_rows(run.args, *common.load_all_rewards(run.args, run))
    common.tokenize_train_and_eval(run.args, run, make_tokenizer(), transformers.LlamaConfig(vocab_size=50), *split)
    assert "warning: 4 of 30 evaluation prompts are training prompts, too\n" in capsys.readouterr().out


def test_chats_that_end_with_an_answer_are_said(tmp_path, capsys):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "a.jsonl", *({"prompt": chat[: 1 + i % 2], "answer": 1} for i in range(12)))
    run = helpers.make_run(model="m", dataset=path)
    split = common.load_train_and_eval_rows(run.args, *common.load_all_rewards(run.args, run))
    common.tokenize_train_and_eval(run.args, run, make_tokenizer(template=TEMPLATE), transformers.LlamaConfig(vocab_size=50), *split)
    assert " chats end with a message of the assistant, which completions go on with: cut it off" in capsys.readouterr().out


def test_many_texts_are_tokenized_in_their_order():
    texts = [("abc" * 700)[i : i + 1 + i % 3] for i in range(2001)]
    tokenizer = make_tokenizer()
    assert common.text_ids(texts, tokenizer) == [common.text_ids([text], tokenizer)[0] for text in texts]


def test_rows_to_evaluate_on_are_checked_against_the_reward_that_evaluates(tmp_path):
    """Those of --eval-dataset, where the rewards to train on ask less."""
    train = write(tmp_path / "train.jsonl", *({"prompt": f"a{i}", "answer": "none"} for i in range(12)))
    good, bad = {"prompt": "b", "answer": "#### 1"}, {"prompt": "c", "answer": "Paris"}
    path = write(tmp_path / "eval.jsonl", good, good)
    args = helpers.make_run(model="m", dataset=train, eval_dataset=path, reward=["format"], eval_reward="gsm8k").args
    rewards = common.load_all_rewards(args, None)
    assert common.load_train_and_eval_rows(args, *rewards)[1] == [good, good]
    for line, named in ((bad, f"^{path}:2: reward gsm8k: no number in the answer 'Paris'"), ({"prompt": "b"}, "answer")):
        write(tmp_path / "eval.jsonl", *([good, line] if line is bad else [line]))
        with pytest.raises(common.UserError, match=named):
            common.load_train_and_eval_rows(args, *rewards)


def test_a_prompt_that_rows_repeat_is_held_out_with_all_of_them():
    rows = [{"prompt": [{"role": "user", "content": str(i % 40)}], "answer": i} for i in range(400)]
    train, evaluation = common.held_out_split(rows, 500, 1)
    assert [row["answer"] for row in evaluation] == sorted({row["answer"] % 40 for row in evaluation})
    assert len(evaluation) == 4 and [row for row in rows if row["prompt"] not in [e["prompt"] for e in evaluation]] == train


def test_a_chat_among_gsm8k_rows_is_not_asked_as_a_text():
    run, config = helpers.make_run(system_prompt=None, model="m", dataset="gsm8k"), transformers.LlamaConfig(vocab_size=50)
    texts = [{"prompt": f"a{i}"} for i in range(11)]
    train, _ = common.tokenize_train_and_eval(run.args, run, make_tokenizer(), config, texts, texts[:2])
    assert train[0].prompt == "Question: a0\nAnswer:"
    with pytest.raises(common.UserError, match="no chat template"):
        common.tokenize_train_and_eval(run.args, run, make_tokenizer(), config, texts, [{"prompt": CHAT}])


@pytest.mark.parametrize("given, used", [(None, common.GSM8K_INSTRUCTION), ("be", "be"), ("", None)])
def test_gsm8k_is_asked_with_its_instruction_where_no_system_prompt_is_given(given, used):
    run, config = helpers.make_run(system_prompt=given, model="m", dataset="gsm8k"), transformers.LlamaConfig(vocab_size=50)
    rows = [{"prompt": f"a{i}"} for i in range(11)]
    train, _ = common.tokenize_train_and_eval(run.args, run, make_tokenizer(template=TEMPLATE), config, rows, rows[:2])
    system = [] if used is None else [{"role": "system", "content": used}]
    assert train[0].prompt == [*system, {"role": "user", "content": "a0"}]


def stream_of(size, seed=0):
    return common.PromptStream([common.Prompt([i], str(i), {}) for i in range(size)], seed)


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=8), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=50)
def test_stream_repeats_nothing_in_an_epoch_and_resumes_from_position(size, takes, seed, data):
    stream = stream_of(size, seed)
    batches = [[prompt.ids[0] for prompt in stream.next(n)] for n in takes]
    assert [len(batch) for batch in batches] == takes and stream.position == sum(takes)
    taken = [i for batch in batches for i in batch]
    for start in range(0, len(taken), size):
        epoch = taken[start : start + size]
        assert len(set(epoch)) == len(epoch)
    cut = data.draw(st.integers(0, len(taken)))
    resumed = stream_of(size, seed)
    resumed.position = cut
    assert [prompt.ids[0] for prompt in resumed.next(len(taken) - cut)] == taken[cut:]


def test_the_digest_of_a_stream_is_of_tokens_and_columns_of_any_kind():
    a, b, c = (common.Prompt(ids, "p", {"answer": answer}) for ids, answer in (([1, 2], 1), ([1, 3], 1), ([1, 2], 2)))
    assert len({common.PromptStream(prompts, 0).digest for prompts in ([a], [b], [c], [a, b], [b, a])}) == 5
    odd = common.Prompt([1], "p", {"when": Counter, (1, 2): "a key that JSON has not"})
    assert common.PromptStream([odd], 0).digest == common.PromptStream([odd], 1).digest


@pytest.mark.parametrize("sizes", [(4, 10), (10, 4)])
def test_a_script_may_set_other_prompts_which_a_resumed_run_draws_as_well(sizes):
    pools = [stream_of(size).prompts for size in sizes]
    stream, resumed = stream_of(sizes[0]), stream_of(sizes[0])
    stream.next(3)
    stream.prompts = resumed.prompts = pools[1]
    resumed.position = 3
    batch = [prompt.ids[0] for prompt in stream.next(30)]
    assert set(batch) == set(range(sizes[1])) and [prompt.ids[0] for prompt in resumed.next(30)] == batch
    assert stream.digest == resumed.digest == stream_of(sizes[0]).digest


def test_stream_order_changes_with_epoch_and_seed():
    first = [prompt.ids[0] for prompt in stream_of(50).next(100)]
    assert first[:50] != first[50:] and first[:50] != list(range(50))
    assert [prompt.ids[0] for prompt in stream_of(50, seed=1).next(50)] != first[:50]


def test_no_epoch_of_one_seed_has_the_order_of_another_epoch_of_another_seed():
    """As with a seed that is the sum of both: runs with seeds one apart would see the same orders an epoch apart."""
    orders = set()
    for seed in (0, 1, 11):
        taken = [prompt.ids[0] for prompt in stream_of(50, seed).next(12 * 50)]
        orders |= {tuple(taken[start : start + 50]) for start in range(0, 600, 50)}
    assert len(orders) == 3 * 12
