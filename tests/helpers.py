"""What several test files share: small models of many families and brute-force log-probs in float64."""

import contextlib
import copy
import functools
import math
from unittest import mock

import torch
import transformers

import common
import grpo

VOCABULARY = 29
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0)
GQA = dict(num_key_value_heads=2)
EXPERTS = dict(num_experts_per_tok=2)

# name -> config: each a few thousand parameters. Families differ in positions, biases, norms, heads and windows.
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **GQA, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **GQA),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **GQA, head_dim=6),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=6),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **GQA, **EXPERTS, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **GQA, **EXPERTS, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "phi": lambda: transformers.PhiConfig(**SIZES, **GQA),  # its head has a bias
    "cohere": lambda: transformers.CohereConfig(**SIZES, **GQA, logit_scale=0.4),
    "granite": lambda: transformers.GraniteConfig(**SIZES, **GQA, logits_scaling=3.0),
    "mistral_window": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=4),
    "qwen2_window": lambda: transformers.Qwen2Config(
        **SIZES, **GQA, use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma3_window": lambda: transformers.Gemma3TextConfig(
        **SIZES, **GQA, head_dim=6, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
}
# With heads wide enough for FlashAttention on a GPU.
WIDE = {
    "qwen3_wide": lambda: transformers.Qwen3Config(**SIZES, **GQA, head_dim=16),
    "mistral_wide_window": lambda: transformers.MistralConfig(**SIZES, **GQA, head_dim=16, sliding_window=4),
}
WINDOWED = ["mistral_window", "qwen2_window", "gemma3_window"]


def config_model(config, seed=0):
    """A model with this project's attention whose every weight is random (norms and biases too) and large enough to matter."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flat_row")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    return common.without_dropout(model)


def make_model(family, seed=0):
    return config_model((FAMILIES | WIDE)[family](), seed)


def eager_double(model):
    """The same model with transformers' own attention, in float64."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the fused one knows no float64
    return model


def brute_distribution(reference, prompt, completion, temperature=1.0):
    """log softmax(logits / temperature) before each completion token, (n, V): one full forward of one sequence."""
    ids = torch.tensor([prompt + completion])
    logits = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def brute_logprobs(reference, prompt, completion, temperature=1.0):
    """Log-probs of the completion's tokens, (n,)."""
    distribution = brute_distribution(reference, prompt, completion, temperature)
    return distribution.gather(1, torch.tensor(completion)[:, None])[:, 0]


def random_ids(*lengths, seed=0, low=2):
    """A list of token ids for each length; end token and pad do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def ragged_rollout(seed=0):
    """Six completions of three prompts, all lengths different: (Rollout, prompts of the rows, completions)."""
    prompts, completions = random_ids(3, 8, 1, seed=seed), random_ids(1, 6, 4, 2, 9, 3, seed=seed + 1)
    index = [0, 0, 1, 2, 2, 2]
    rows = [prompts[i] for i in index]
    return common.rollout_of(rows, completions, torch.device("cpu"), index), rows, completions


def plain_logprobs(states, weight, bias, targets, scale):
    """What `common.HeadLogprobs` promises: log-probs and entropies, (n,)."""
    logits = states @ weight.t()
    log_p = (scale * (logits if bias is None else logits + bias)).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_flash_attention(query, key, value, scaling, window, query_ends, key_ends, longest_query, longest_key):
    """What `common.flash_attention` promises, sequence by sequence."""
    out = []
    spans = [torch.stack([ends[:-1], ends[1:]], dim=1).tolist() for ends in (query_ends, key_ends)]
    for (first, last), (first_key, last_key) in zip(*spans):
        q, (k, v) = query[first:last], (x[first_key:last_key].repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        assert len(q) <= min(len(k), longest_query) and len(k) <= longest_key
        back = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = (back < 0) | (back >= (window or math.inf))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scaling).masked_fill(hidden, -math.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)


def make_run(**flags):
    """A real `Run` on the CPU, without a folder."""
    args = grpo.Args(**{"device": "cpu", **flags})
    return common.Run(args)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(got, want, tolerance=1e-4):
    """Relative to the largest entry of all gradients, which is what the update sees."""
    assert got.keys() == want.keys()
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= tolerance * scale, name


def scalars(folder):
    """name -> values in the order of their steps, of a run's TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@contextlib.contextmanager
def compiling_with(backend):
    """torch.compile anew and with this backend; what would silently go on without being compiled is an error.

    aot_eager traces and differentiates as inductor does, but needs no compiler and no time to build programs.
    """
    torch.compiler.reset()
    common.fused.cache_clear()
    compile_with = functools.partial(torch.compile, backend=backend)
    with mock.patch.object(torch, "compile", compile_with), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    common.fused.cache_clear()
