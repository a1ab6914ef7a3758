"""What a user brings works as it is: model families, tokenizers, chat templates, reward files and models, dense rewards."""

import json
import math
import types
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers

import common
import grpo
import helpers
import ppo
import test_cuda

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", "<other-end>", *"abcdefghijklmnopqrstuvwx"]
CHAT = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<assistant>' }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def save_tokenizer(folder, **special):
    """A tokenizer of single characters with the given special tokens."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    if special.pop("adds_bos", False):
        raw.post_processor = tokenizers.processors.TemplateProcessing(single="<user> $A", special_tokens=[("<user>", 2)])
    template = special.pop("chat_template", None)
    extra = ["<user>", "<assistant>", "<other-end>"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=extra, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_model(folder, family="llama", ends=1, **special):
    model = helpers.make_model(family)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    save_tokenizer(folder, **({"eos_token": "<end>"} | special))
    return str(folder)


def edit_config(folder, **values):
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def texts(tmp_path):
    return save_rows(tmp_path / "texts.jsonl", [{"prompt": "abc"[: 1 + i % 3] + "de" * (i % 4), "answer": "b"} for i in range(24)])


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(
        "def many_b(completions, **kwargs):\n    return [float(c.count('b')) for c in completions]\n"
        "def chat_b(prompts, completions, answer, **kwargs):\n    return [float(c[0]['content'].count(a)) for c, a in zip(completions, answer)]\n"
        "def each_b(completions, completion_ids, **kwargs):\n    return [[float(i == 6) for i in ids] for ids in completion_ids]\n"
        "def sometimes(completions, **kwargs):\n    return [None if i % 3 == 0 else float(i) for i in range(len(completions))]\n"
    )
    return str(path)


def train(script, tmp_path, *flags, steps=2):
    """Run a script's main for a few steps; returns its folder."""
    folder = tmp_path / "run"
    small = ["--steps", steps, "--prompts-per-step", 4, "--max-new-tokens", 6, "--eval-every", 0, "--learning-rate", 1e-2, "--device", "cpu"]
    argv = [*small, "--output-dir", folder, *flags]
    assert script.main(common.parse_args(script.Args, [str(x) for x in argv])) == 0
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2", "gemma", "mixtral"])
def test_both_scripts_train_every_family_and_save_what_transformers_loads(family, tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model", family)
    before = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    for script in (grpo, ppo):
        (tmp_path / script.__name__).mkdir()
        folder = train(script, tmp_path / script.__name__, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")
        after = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
        assert after.config._attn_implementation != "flat_row"
        assert any(not torch.equal(before[name], weight) for name, weight in after.state_dict().items())
        assert transformers.AutoTokenizer.from_pretrained(folder / "final")("abc").input_ids == [5, 6, 7]


@pytest.mark.parametrize("special", [{}, {"pad_token": "<end>"}, {"pad_token": "<pad>"}, {"adds_bos": True, "bos_token": "<user>"}], ids=str)
def test_tokenizers_without_pad_with_pad_equal_to_end_and_with_bos(special, tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model", **special)
    train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")


def test_all_end_tokens_of_the_generation_config_end_a_completion(tmp_path, texts, reward_file, capsys):
    model = save_model(tmp_path / "model", ends=[1, 4])
    train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")
    assert "end tokens: 1 '<end>', 4 '<other-end>'" in capsys.readouterr().out


def test_end_tokens_may_be_a_list_in_the_config_and_what_is_no_number_counts_for_nothing(tmp_path, texts, reward_file, capsys):
    model = save_model(tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink()
    edit_config(model, eos_token_id=[1, 4])
    flags = ["--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b"]
    train(grpo, tmp_path, *flags)
    assert "end tokens: 1 '<end>', 4 '<other-end>'" in capsys.readouterr().out
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": "1"}')
    train(grpo, tmp_path / "again", *flags)
    assert "end tokens: 1 '<end>', 4 '<other-end>'" in capsys.readouterr().out


def test_end_tokens_that_the_vocabulary_lacks_count_for_nothing(tmp_path, texts, reward_file, capsys):
    model, flags = save_model(tmp_path / "model"), ["--dataset", texts, "--reward", f"{reward_file}:many_b"]
    save_tokenizer(tmp_path / "model")  # names no end token
    (tmp_path / "model/generation_config.json").unlink()
    edit_config(model, eos_token_id=[29, 4])
    train(grpo, tmp_path, "--model", model, *flags)
    assert "end tokens: 4 '<other-end>'; " in capsys.readouterr().out
    edit_config(model, eos_token_id=29)
    with pytest.raises(common.UserError, match="name no end token .eos_token. among its 29 tokens"):
        train(grpo, tmp_path / "again", "--model", model, *flags)


def test_end_tokens_are_numbers_of_the_text_parts_vocabulary_wherever_they_stand():
    text = types.SimpleNamespace(vocab_size=29, eos_token_id=[3, 29, -1])
    config = types.SimpleNamespace(eos_token_id=None, get_text_config=lambda: text)
    model = types.SimpleNamespace(config=config, generation_config=types.SimpleNamespace(eos_token_id=[4, True, 2.0, None]))
    assert common.end_tokens("m", types.SimpleNamespace(eos_token_id=28), model) == {3, 4, 28}


@pytest.mark.parametrize("script", [grpo, ppo])
def test_a_model_with_a_vision_tower_trains_on_text(script, tmp_path, texts, reward_file, capsys):
    """Its end tokens and hidden size stand in the config of its text part."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    text = helpers.FAMILIES["gemma3_window"]().to_dict()
    model = helpers.config_model(transformers.Gemma3Config(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="<other-end>")
    train(script, tmp_path, "--model", tmp_path / "model", "--dataset", texts, "--reward", f"{reward_file}:many_b")
    assert "end tokens: 1 '<end>', 4 '<other-end>'" in capsys.readouterr().out


def test_the_pad_learns_where_a_prompt_holds_it(tmp_path):
    """A token like any other in a flat row, though an embedding in PyTorch gives it no gradient."""
    save_model(tmp_path, "qwen2")
    model = common.load_model(transformers.AutoModelForCausalLM, str(tmp_path), "--model", grpo.Args(model=str(tmp_path)))
    common.completion_logprobs(model, common.rollout_of([[0, 5]], [[6]], torch.device("cpu")), 1.0).sum().backward()
    assert model.get_input_embeddings().weight.grad[0].any()


def test_model_without_any_end_token_is_refused(tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model", ends=None, eos_token=None, pad_token="<pad>")
    edit_config(model, eos_token_id=None)
    with pytest.raises(common.UserError, match="end token"):
        train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")


def test_chat_prompts_go_through_the_template_and_reach_rewards_as_messages(tmp_path, reward_file):
    model = save_model(tmp_path / "model", chat_template=CHAT)
    chats = save_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": c}], "answer": "b"} for c in "abcdefghijkl"])
    train(grpo, tmp_path, "--model", model, "--dataset", chats, "--reward", f"{reward_file}:chat_b")


def test_chat_prompts_without_a_template_are_refused(tmp_path, reward_file):
    model = save_model(tmp_path / "model")
    chats = save_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}] * 12)
    with pytest.raises(common.UserError, match="chat template"):
        train(grpo, tmp_path, "--model", model, "--dataset", chats, "--reward", f"{reward_file}:many_b")


def test_too_many_tokens_for_the_models_positions_are_refused(tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model", "gpt2")
    with pytest.raises(common.UserError, match="--max-new-tokens 60: .* 64 positions"):
        train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b", "--max-new-tokens", 60)


@pytest.mark.parametrize("script", [grpo, ppo])
def test_dense_rewards_and_samples_without_a_score_train(script, tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model")
    flags = ["--model", model, "--dataset", texts, "--reward", f"{reward_file}:each_b", "--reward", f"{reward_file}:sometimes"]
    folder = train(script, tmp_path, *flags, "--reward-weights", 1, 0.1)
    scalars = helpers.scalars(folder)
    assert {"reward/each_b", "reward/sometimes"} <= set(scalars) and math.isfinite(scalars["losses/policy_loss"][-1])


@pytest.mark.parametrize("script", [grpo, ppo])
def test_dense_rewards_reach_the_advantages_token_by_token(script, tmp_path, texts, reward_file, monkeypatch):
    seen = []
    select = common.Rollout.select
    monkeypatch.setattr(common.Rollout, "select", lambda self, rows: seen.append(self) or select(self, rows))
    model = save_model(tmp_path / "model")
    flags = ["--model", model, "--dataset", texts, "--reward", f"{reward_file}:each_b", "--kl-coef", 0]
    train(script, tmp_path, *flags, *(["--baseline", "none"] if script is ppo else []), steps=1)
    rollout = next(r for r in seen if r.advantages is not None)
    steps = (rollout.completion_ids == 6) & rollout.completion_mask
    to_come = steps.float().flip(1).cumsum(1).flip(1)
    if script is ppo:  # as they are: the return of a token is the sum of the rewards still to come
        assert torch.equal(rollout.returns, to_come * rollout.completion_mask)
    else:  # all steps are worth the same here, so that none is better than the group
        assert rollout.advantages.shape == steps.shape and (rollout.advantages == 0).all()
    assert steps.any()


def test_reward_model_with_a_tokenizer_of_its_own_scores_prompt_and_completion(tmp_path, texts):
    model = save_model(tmp_path / "model")
    config = transformers.LlamaConfig(**helpers.SIZES, num_labels=1)
    judge = transformers.AutoModelForSequenceClassification.from_config(config)
    judge.save_pretrained(tmp_path / "judge")
    save_tokenizer(tmp_path / "judge", eos_token="<end>", bos_token="<user>", adds_bos=True)
    folder = train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward-model", tmp_path / "judge")
    assert math.isfinite(helpers.scalars(folder)["reward/reward_model"][-1])
    args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path / "judge"), "--device", "cpu"])
    reward = common.load_reward_model(args, common.Run(args))
    got = reward(prompts=["ab", "abc", "b"], completions=["c", "d", "aaaa"])
    assert reward(prompts=["<user>ab"], completions=["c"]) == pytest.approx(got[:1])  # a text that spells the begin token
    for text, score in zip(["abc", "abcd", "baaaa"], got):
        ids = torch.tensor([[2, *(WORDS.index(c) for c in text)]])
        assert score == pytest.approx(judge.eval()(ids).logits.item(), abs=1e-5)


def test_reward_model_without_a_pad_token_scores_several_completions_at_once(tmp_path):
    save_tokenizer(tmp_path, eos_token="<end>")
    for config in (
        transformers.LlamaConfig(**helpers.SIZES | {"pad_token_id": None}, num_labels=1),
        transformers.GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, num_labels=1, bos_token_id=1, eos_token_id=1),
    ):
        judge = transformers.AutoModelForSequenceClassification.from_config(config)
        judge.save_pretrained(tmp_path)
        args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path), "--device", "cpu"])
        got = common.load_reward_model(args, common.Run(args))(prompts=["ab", "b"], completions=["c", "dc"])
        for text, score in zip(["abc", "bdc"], got):
            assert score == pytest.approx(judge.eval()(torch.tensor([[WORDS.index(c) for c in text]])).logits.item(), abs=1e-5)


def test_reward_model_scores_all_of_many_completions_of_one_length(tmp_path):
    """It takes a few dozen at a time."""
    judge = transformers.AutoModelForSequenceClassification.from_config(transformers.LlamaConfig(**helpers.SIZES, num_labels=1))
    judge.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path), "--device", "cpu"])
    texts = ["".join(WORDS[5 + (i * k) % 24] for k in (1, 5, 7)) for i in range(70)] + ["ab", "cd"]
    got = common.load_reward_model(args, common.Run(args))(prompts=[text[:1] for text in texts], completions=[text[1:] for text in texts])
    assert len(set(got)) > 20
    for text, score in zip(texts, got, strict=True):
        assert score == pytest.approx(judge.eval()(torch.tensor([[WORDS.index(c) for c in text]])).logits.item(), abs=1e-5)


def test_a_prompt_with_its_completion_may_fill_the_positions_of_a_reward_model(tmp_path):
    judge = transformers.BertConfig(**helpers.SIZES | {"num_hidden_layers": 1, "max_position_embeddings": 7}, num_labels=1)
    transformers.AutoModelForSequenceClassification.from_config(judge).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path), "--device", "cpu", "--max-new-tokens", "6"])
    reward = common.load_reward_model(args, common.Run(args))
    assert len(reward(prompts=["abc"], completions=["defg"])) == 1
    with pytest.raises(common.UserError, match="has 7 positions, but a prompt with its completion 8 tokens"):
        reward(prompts=["abc"], completions=["defgh"])


def test_reward_model_with_several_labels_is_refused(tmp_path):
    config = transformers.LlamaConfig(**helpers.SIZES, num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path), "--device", "cpu"])
    with pytest.raises(common.UserError, match=f"^--reward-model {tmp_path}: has 2 labels; a reward is a single number$"):
        common.load_reward_model(args, common.Run(args))


TURNS = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% if not loop.last %}e{% endif %}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)


@pytest.mark.parametrize("template, with_system", [(STRICT, "ub\n\nae"), (TURNS, "sbeuae")])
def test_a_reward_model_reads_system_messages_and_begun_replies(tmp_path, template, with_system):
    config = transformers.LlamaConfig(**helpers.SIZES, num_labels=1)
    judge = transformers.AutoModelForSequenceClassification.from_config(config)
    judge.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>", chat_template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    args = common.parse_args(grpo.Args, ["--reward-model", str(tmp_path), "--device", "cpu"])
    system, user, begun = ({"role": role, "content": text} for role, text in [("system", "b"), ("user", "a"), ("assistant", "c")])
    prompts, completion = [[user], [user, begun], [system, user]], [{"role": "assistant", "content": "d"}]
    got = common.load_reward_model(args, common.Run(args))(prompts=prompts, completions=[completion] * 3)
    for text, score in zip(["uaead", "uaeacd", f"{with_system}ad"], got):
        ids = torch.tensor([tokenizer(text).input_ids])
        assert score == pytest.approx(judge.eval()(ids).logits.item(), abs=1e-5), text


def test_a_model_of_no_language_is_refused_before_anything_loads(tmp_path):
    """Canine's config has no vocabulary."""
    transformers.CanineConfig().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="<end>")
    args = grpo.Args(model=str(tmp_path / "model"))
    with pytest.raises(common.UserError, match="^--model .*: its CanineConfig is not that of a causal language model: "):
        common.load_tokenizer_and_config(args)


@pytest.mark.parametrize(
    "changed, prompt, named",
    [
        ({"max_position_embeddings": 6}, "abc", "--max-new-tokens 6: --reward-model .*judge has 6 positions"),
        ({"max_position_embeddings": 7}, "abcdefgh", "--reward-model .*judge: has 7 positions, but a prompt .* 8 tokens"),
        ({"vocab_size": 7}, "abc", "--reward-model .*judge: its tokenizer has token 7, but it knows 7"),
        ({}, [{"role": "user", "content": "ab"}], "--reward-model .*judge: has no chat template, but the prompts are chats"),
    ],
)
def test_a_reward_model_that_cannot_take_the_prompts_is_refused_before_the_policy_loads(tmp_path, monkeypatch, changed, prompt, named):
    monkeypatch.setattr(common, "load_policy", None)
    judge = transformers.BertConfig(**helpers.SIZES | {"num_hidden_layers": 1} | changed, num_labels=1)
    transformers.AutoModelForSequenceClassification.from_config(judge).save_pretrained(tmp_path / "judge")
    save_tokenizer(tmp_path / "judge", eos_token="<end>")
    rows = save_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "b"}] * 12)
    with pytest.raises(common.UserError, match=f"^{named}"):
        train(grpo, tmp_path, "--dataset", rows, "--reward-model", tmp_path / "judge")
    if changed == {}:
        rows = save_rows(tmp_path / "texts.jsonl", [{"prompt": "ab", "answer": "b"}] * 12)
        with pytest.raises(common.UserError, match=f"^{named}"):
            flags = ["--system-prompt", "be", "--eval-reward", "exact"]  # so that the prompts to train on alone are for it
            train(grpo, tmp_path, "--dataset", rows, "--reward-model", tmp_path / "judge", *flags)


@pytest.mark.parametrize("family, noise", {"llama": "attention_dropout", "opt": "dropout", "mixtral": "router_jitter_noise"}.items())
def test_dropout_and_jitter_of_the_config_are_off_and_saved_as_they_were(family, noise, tmp_path, texts, reward_file):
    opt = transformers.OPTConfig(**helpers.SIZES, ffn_dim=24, word_embed_proj_dim=16)
    helpers.config_model(opt if family == "opt" else helpers.FAMILIES[family]()).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", eos_token="<end>")
    edit_config(tmp_path / "model", **{noise: 0.5})
    folder = train(grpo, tmp_path, "--model", tmp_path / "model", "--dataset", texts, "--reward", f"{reward_file}:many_b")
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "model", folder / "final"))
    assert after[noise] == 0.5 and after == before


def test_dropout_of_a_text_part_is_off_too():
    config = transformers.Gemma3Config(text_config={"attention_dropout": 0.5})
    assert common.without_noise(config).text_config.attention_dropout == 0.0 and config.text_config.attention_dropout == 0.5


def test_weights_that_are_damaged_or_missing_are_refused(tmp_path, texts, reward_file):
    good, other = save_model(tmp_path / "model"), save_model(tmp_path / "other")
    flags = ["--dataset", texts, "--reward", f"{reward_file}:many_b"]
    edit_config(other, num_hidden_layers=3)
    with pytest.raises(common.UserError, match=r"--model .* weights .* are missing: model\.layers\.2\."):
        train(grpo, tmp_path, "--model", other, *flags)
    with pytest.raises(common.UserError, match=r"--critic-model .* weights .* are missing: layers\.2\."):
        train(ppo, tmp_path, "--model", good, "--critic-model", other, *flags)
    edit_config(other, num_hidden_layers=2, num_labels=1)
    with pytest.raises(common.UserError, match=r"--reward-model .* missing: score\.weight"):
        train(grpo, tmp_path, "--model", good, "--reward-model", other, *flags)
    weights = Path(other, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:500])
    for flag in ("--model", "--reward-model"):
        with pytest.raises(common.UserError, match=f"{flag} .*cannot be loaded: .*header"):
            train(grpo, tmp_path, "--model", good, flag, other, *flags)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["de"])  # token 29 of a model that has 29
    tokenizer.save_pretrained(model)
    with pytest.raises(common.UserError, match="--model .* the tokenizer gives token 29, and the model has only 29"):
        train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")


def test_families_that_the_flat_row_cannot_run_are_named(tmp_path, texts, reward_file):
    mpt = transformers.MptConfig(vocab_size=helpers.VOCABULARY, d_model=16, n_heads=4, n_layers=2, eos_token_id=1)
    falcon = transformers.FalconConfig(**helpers.SIZES)
    for config, said in ((mpt, "MptForCausalLM is of a kind"), (falcon, "cannot be loaded: its family keeps to attention of its own")):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model", eos_token="<end>")
        with pytest.raises(common.UserError, match=f"--model .*{said}.* this project does not run"):
            train(grpo, tmp_path, "--model", tmp_path / "model", "--dataset", texts, "--reward", f"{reward_file}:many_b")


def test_what_short_sequences_do_not_show_is_refused(tmp_path, texts, reward_file):
    """A window that stands in the family's masks only; a cap that hardly bends the logits of small weights."""
    phimoe = transformers.PhimoeConfig(**helpers.SIZES, **helpers.GQA, **helpers.EXPERTS, num_local_experts=4, sliding_window=12)
    capped = transformers.Gemma3TextConfig(**helpers.SIZES, **helpers.GQA, head_dim=6, final_logit_softcapping=900.0)
    flags = ["--model", tmp_path / "model", "--dataset", texts, "--reward", f"{reward_file}:many_b"]
    for config, said in ((phimoe, "has a window of 12 tokens"), (capped, "caps its logits")):
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model", eos_token="<end>")
        with pytest.raises(common.UserError, match=f"--model .*{said}.* this project does not run"):
            train(grpo, tmp_path, *flags)
    phimoe.sliding_window = 40  # more than any sequence has
    transformers.AutoModelForCausalLM.from_config(phimoe).save_pretrained(tmp_path / "model")
    train(grpo, tmp_path, *flags, "--max-prompt-tokens", 30)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_sequence_are_not_looked_for(kind, tmp_path):
    """A CUDA graph cannot: what is loaded reads no number from a tensor, and gives what transformers gives."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "original_max_position_embeddings": 32}
    family = transformers.Phi3Config if kind == "longrope" else transformers.LlamaConfig
    config = family(**helpers.SIZES | helpers.GQA, rope_parameters=rope)
    helpers.config_model(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = common.load_model(transformers.AutoModelForCausalLM, str(tmp_path), "--model", grpo.Args(model=str(tmp_path)))
    prompt, completion = helpers.random_ids(9, 8)
    batch = common.rollout_of([prompt], [completion], "cpu")
    with torch.no_grad():
        want = theirs(torch.tensor([prompt + completion])).logits[0, 8:-1].log_softmax(-1).gather(1, batch.completion_ids.T)[:, 0]
        with test_cuda.Recording():
            got = ours.base_model.rotary_emb(torch.zeros(1, 9, 16), torch.arange(9)[None])
        got = common.completion_logprobs(ours, batch, 1.0)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_critics_that_the_flat_row_cannot_run_are_named(tmp_path, texts, reward_file):
    flags = ["--model", save_model(tmp_path / "model"), "--dataset", texts, "--reward", f"{reward_file}:many_b"]
    sizes = {name: size for name, size in helpers.SIZES.items() if "heads" not in name}
    mamba = transformers.MambaConfig(**sizes, state_size=4)
    bloom = transformers.BloomConfig(vocab_size=helpers.VOCABULARY, hidden_size=16, n_layer=2, n_head=4)
    gemma2 = transformers.Gemma2Config(**helpers.SIZES, **helpers.GQA, head_dim=6)
    short = transformers.GPT2Config(vocab_size=helpers.VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=6)
    for config, said in (
        (mamba, "--critic-model .*MambaModel.* this project does not run"),
        (bloom, "--critic-model .*BloomModel.* this project does not run"),
        (gemma2, "--critic-model .*Gemma2Model: the attention of Gemma2Attention is .* this project does not run"),
        (short, "--max-new-tokens .* more than the 6 positions of --critic-model"),
    ):
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "critic")
        with pytest.raises(common.UserError, match=said):
            train(ppo, tmp_path, *flags, "--critic-model", tmp_path / "critic")


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub_and_said_to_be_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match=rf"^--model stories: cannot be loaded: .* \(there is no such folder in {tmp_path} either\)$"):
        common.load_config("stories", "--model", grpo.Args(model="stories"))


def test_a_critic_whose_tokenizer_has_other_numbers_is_refused_before_a_model_loads(tmp_path, texts, monkeypatch):
    model, critic = save_model(tmp_path / "model"), save_model(tmp_path / "critic", "qwen2")
    vocabulary = json.loads((Path(critic) / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (Path(critic) / "tokenizer.json").write_text(json.dumps(vocabulary))
    monkeypatch.setattr(common, "load_policy", None)
    with pytest.raises(common.UserError, match="^--critic-model .*: its tokenizer has other numbers for the policy's tokens"):
        train(ppo, tmp_path, "--model", model, "--dataset", texts, "--critic-model", critic)


def test_folders_whose_files_do_not_fit_together_are_named(tmp_path, texts, reward_file):
    model, flags = save_model(tmp_path / "model", "qwen2"), ["--dataset", texts, "--reward", f"{reward_file}:many_b"]
    edit_config(model, intermediate_size=25)
    with pytest.raises(common.UserError, match=r"--model .*: its model\.layers\.0\..* is \(.*24.*\) in the file, but \(.*25.*\) by its config"):
        train(grpo, tmp_path, "--model", model, *flags)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(model, name).unlink()
    with pytest.raises(common.UserError, match="--model .*: its tokenizer knows no tokens; is its tokenizer.json there"):
        train(grpo, tmp_path, "--model", model, *flags)


def test_a_model_with_code_of_its_own_names_the_flag_that_runs_it(tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model")
    edit_config(model, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    Path(model, "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(common.UserError, match="--model .* cannot be loaded: .* code of its own; --trust-remote-code"):
        train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # a port that refuses
    session, asked = huggingface_hub.utils.get_session, []
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: asked.append(True) or session())
    args = common.parse_args(grpo.Args, ["--model", "someone/model"])
    for _ in range(2):
        with pytest.raises(common.UserError, match="--model someone/model: cannot be loaded: .*connect"):
            common.load_tokenizer(args.model, "--model", args)
    assert "Retrying" not in capfd.readouterr().err and len(asked) == 1


def test_all_that_transformers_says_of_an_error_is_said_on_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("take one of:\n(1) a file\n\n(2) " + "x" * 999)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    args = common.parse_args(grpo.Args, ["--model", str(tmp_path)])
    with pytest.raises(common.UserError, match=r"be loaded: ValueError: take one of: \(1\) a file \(2\) x+$") as error:
        common.load_tokenizer(args.model, "--model", args)
    assert len(str(error.value)) < 400 + len(args.model)


def test_critic_starts_from_another_model(tmp_path, texts, reward_file):
    model, critic = save_model(tmp_path / "model"), save_model(tmp_path / "critic", "qwen2")
    train(ppo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b", "--critic-model", critic)


@pytest.mark.parametrize("asked", [False, True])
def test_gradient_checkpointing_acts_on_policy_and_critic(asked, tmp_path, monkeypatch):
    """On a critic of its own and on one that starts from the policy, on the built-in model and on others."""
    monkeypatch.setattr(common, "warm_start", None)
    folders = [save_model(tmp_path / "model"), save_model(tmp_path / "critic", "qwen2")]
    for model, critic in (("tiny", None), (folders[0], None), folders):
        args = ppo.Args(model=model, critic_model=critic, gradient_checkpointing=asked, device="cpu", resume="a run, so without warm start")
        run, (tokenizer, _) = helpers.make_run(), common.load_tokenizer_and_config(args)
        policy, _ = common.load_policy(args, run, tokenizer)
        for learner in (policy, common.load_critic(args, run, policy)):
            layers = [module for module in learner.modules() if isinstance(module, common.GradientCheckpointingLayer)]
            assert len(layers) == 2 and all(layer.gradient_checkpointing == asked and layer.training for layer in layers)


def test_pass_at_k_is_reported_for_powers_of_two(tmp_path, texts, reward_file):
    model = save_model(tmp_path / "model")
    folder = train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b", "--eval-samples", 6)
    scalars = helpers.scalars(folder)
    curve = [scalars[f"eval/pass@{k}"][-1] for k in (1, 2, 4, 6)]
    assert curve == sorted(curve) and 0 < curve[0] < curve[-1] <= 1


@pytest.mark.parametrize("script, score", [(grpo, 0.3), (ppo, 0.1)])  # no float32: their mean is another number
def test_a_reward_that_cannot_teach_is_said(tmp_path, texts, capsys, script, score):
    model = save_model(tmp_path / "model")
    (tmp_path / "constant.py").write_text(f"def constant(completions, **_):\n    return [{score}] * len(completions)\n")
    train(script, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{tmp_path}/constant.py:constant")
    said = "warning: all scores are equal, so nothing is learned; unless all answers are already right, look at --reward"
    assert said in capsys.readouterr().out


def test_defaults_that_the_model_decides_are_said(tmp_path, texts, reward_file, capsys):
    model = save_model(tmp_path / "model")
    train(grpo, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{reward_file}:many_b", "--learning-rate", "1e-6")
    said = " ".join(capsys.readouterr().out.split())
    assert "defaults of models other than the tiny one:" in said and "--learning-rate 1e-06" in said and "--model" not in said


@pytest.mark.parametrize("script", [grpo, ppo])
def test_a_reward_that_never_applies_is_said(tmp_path, texts, capsys, script):
    model, path = save_model(tmp_path / "model"), tmp_path / "none.py"
    path.write_text("def none(completions, **kwargs):\n    return [None] * len(completions)\n")
    folder = train(script, tmp_path, "--model", model, "--dataset", texts, "--reward", f"{path}:none")
    out = capsys.readouterr().out
    assert "first rollout: no scores" in out and "warning: no reward function applied" in out and "are equal" not in out
    assert math.isnan(helpers.scalars(folder)["reward/mean"][0])
