"""What the transformers integration cannot do is refused in one sentence before anything is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    QuantizedCache,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicLayer, StaticSlidingWindowLayer

from bottlenecked import BottleneckError, InvalidArgumentError, UnsupportedError
from bottlenecked.backbones import describe, model_weights_hash
from bottlenecked.integrations.transformers import attach

from . import tiny

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def assert_one_sentence(error: BaseException) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 400


def refuses(error: type[BottleneckError], match: str, action: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match) as caught:
        action()
    assert_one_sentence(caught.value)


# --- attach -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 2}, "2 layers, but LlamaForCausalLM has 3"),
        ({"num_kv_heads": 4}, "4 KV heads, but LlamaForCausalLM has 2"),
        ({"head_dim": 32}, "32 elements per head .* has 16"),
        ({"num_query_heads": 8}, "8 query heads, but LlamaForCausalLM has 4"),
        ({"backbone": {"architecture": "Qwen3ForCausalLM"}}, "architecture Qwen3ForCausalLM, but"),
        ({"backbone": {"config_hash": "sha256:0"}}, "config_hash sha256:0, but"),
        ({"backbone": {"weights_hash": "sha256:0"}}, "other weights .*check_weights=False"),
        ({"boundary": {"token_ids": (3, 64)}}, "token id 64 is outside the model's vocabulary of 64"),
        ({"boundary": {"rule": "newline", "token_ids": ()}}, "pass attach the tokenizer"),
        (
            {"key_space": "unrotated", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "rope_parameters of the Processor are .*500.* 10000",
        ),
        (
            {
                "key_space": "unrotated",
                "rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 10000.0},
            },
            "rope_parameters of the Processor are .*linear",
        ),
    ],
)
def test_processor_of_another_model(changes: dict[str, Any], match: str) -> None:
    model = tiny.model()
    before = dict(vars(model))
    refuses(InvalidArgumentError, match, lambda: attach(model, tiny.processor(**changes)))
    assert vars(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_processor_of_this_model() -> None:
    """Everything `init` records about a backbone, in every dtype it may be loaded in."""
    model = tiny.model(torch.bfloat16)
    backbone = describe({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})["backbone"]
    backbone["weights_hash"] = model_weights_hash(model)
    assert backbone["weights_hash"] is not None
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        with attach(model.to(dtype), tiny.processor(backbone=backbone)):
            pass
    other = tiny.model(torch.bfloat16, seed=1)
    refuses(InvalidArgumentError, "other weights", lambda: attach(other, tiny.processor(backbone=backbone)))
    with attach(other, tiny.processor(backbone=backbone), check_weights=False):
        pass


def with_attribute(name: str, value: object) -> torch.nn.Module:
    model = tiny.model()
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            setattr(module, name, value)
    return model


def in_config(**values: object) -> torch.nn.Module:
    model = tiny.model()
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


class WrappedByPeft(torch.nn.Module):
    peft_config: Any = None


WrappedByPeft.__module__ = "peft.peft_model"

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "not a model": (lambda: object(), "not a transformers model"),
    "a module": (lambda: torch.nn.Linear(2, 2), "not a transformers model"),
    "compiled": (lambda: torch.compile(tiny.model()), "not a transformers model.*before compiling"),
    "PEFT": (WrappedByPeft, "PEFT wrapper.*before wrapping it, or merge"),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "no head": (lambda: tiny.model().model, "not a plain causal language model"),
    "meta": (lambda: tiny.model().to("meta"), r"on the device meta.*model.to\('cpu'\)"),
    "float64": (lambda: tiny.model(torch.float64), "dtype torch.float64: use float32, float16 or bfloat16"),
    "flash": (lambda: in_config(_attn_implementation_internal="flash_attention_2"), "'flash_attention_2'"),
    "flex": (lambda: tiny.model(attention="flex_attention"), "'flex_attention'.*set_attn_implementation"),
    "sliding window": (
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
        "DynamicSlidingWindowLayer",
    ),
    "capped logits": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_implementation="eager")),
        "attn_logit_softcapping",
    ),
    "sinks": (lambda: with_attribute("sinks", torch.zeros(4)), "attention sinks"),
    "two scales": (lambda: _two_scales(), "scale all its attention layers alike"),
    "latent attention": (lambda: in_config(kv_lora_rank=8), "latent attention"),
    "no layers": (lambda: with_attribute("layer_idx", 0), "one attention module per layer"),
    "old names": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=3, n_head=4)),
        "GPT2LMHeadModel",
    ),
}


def _two_scales() -> torch.nn.Module:
    model = tiny.model()
    model.model.layers[1].self_attn.scaling = 0.5
    return model


@pytest.mark.parametrize("name", MODELS)
def test_unsupported_model(name: str) -> None:
    make, match = MODELS[name]
    model = make()
    before = dict(vars(model)) if hasattr(model, "__dict__") else {}
    refuses(UnsupportedError, match, lambda: attach(model, tiny.processor()))
    assert not before or vars(model) == before


def test_other_pairing_of_rotated_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: torch.stack([-x[1::2], x[::2]], -1).flatten())
    processor = tiny.processor(key_space="unrotated", rope_parameters=rope)
    refuses(UnsupportedError, "rotate halves", lambda: attach(tiny.model(), processor))


def test_layers_without_rope() -> None:
    model = SmolLM3ForCausalLM(SmolLM3Config(**(tiny.SHAPE | {"num_hidden_layers": 4}))).eval()
    rope = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
    unrotated = tiny.processor(num_layers=4, key_space="unrotated", rope_parameters=rope)
    match = r"no_rope_layers \[1, 1, 1, 0\].*key_space 'rotated'"
    refuses(UnsupportedError, match, lambda: attach(model, unrotated))
    with attach(model, tiny.processor(num_layers=4)):
        pass
    model = SmolLM3ForCausalLM(SmolLM3Config(**(tiny.SHAPE | {"num_hidden_layers": 4}), no_rope_layers=[1] * 4)).eval()
    with attach(model, unrotated):
        pass


def test_attached_already() -> None:
    model = tiny.model()
    sharing = LlamaForCausalLM(model.config)
    with attach(model, tiny.processor()):
        refuses(InvalidArgumentError, "already has a Processor", lambda: attach(model, tiny.processor()))
        if sharing.config is model.config:
            refuses(InvalidArgumentError, "shares its config", lambda: attach(sharing, tiny.processor()))
    with attach(model, tiny.processor()):
        pass


@pytest.mark.parametrize("value", [0, -1, True])
def test_threads(value: int) -> None:
    refuses(
        InvalidArgumentError,
        f"num_threads is {value}",
        lambda: attach(tiny.model(), tiny.processor(), num_threads=value),
    )


# --- generate -----------------------------------------------------------------------------------------------


def offloaded(model: LlamaForCausalLM) -> Cache:
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


def filled(model: LlamaForCausalLM) -> Cache:
    cache = DynamicCache(config=model.config)
    model(tiny.prompts((5,))[0], past_key_values=cache)
    return cache


class OtherLayer(DynamicLayer):
    pass


# Arguments of generate (functions of the model where it is needed), the error and its message.
REQUESTS: dict[str, tuple[Any, type[BottleneckError], str]] = {
    "beams": ({"num_beams": 2}, UnsupportedError, "num_beams=2 .beam search."),
    "assistant": (lambda m: {"assistant_model": tiny.model()}, UnsupportedError, "assisted decoding"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, UnsupportedError, "assisted decoding"),
    "early exit": ({"assistant_early_exit": 1}, UnsupportedError, "assisted decoding"),
    "no cache": ({"use_cache": False}, UnsupportedError, "use_cache=False"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, UnsupportedError, "penalty_alpha"),
    "guidance": ({"guidance_scale": 1.5}, UnsupportedError, "guidance_scale=1.5"),
    "dola": ({"dola_layers": "high"}, UnsupportedError, "dola_layers"),
    "custom": ({"custom_generate": lambda *a, **k: None}, UnsupportedError, "custom_generate"),
    "embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 64)},
        UnsupportedError,
        "inputs_embeds hides",
    ),
    "quantised": ({"cache_implementation": "quantized"}, UnsupportedError, "'quantized'"),
    "offloaded": ({"cache_implementation": "offloaded"}, UnsupportedError, "'offloaded'"),
    "paged": ({"cache_implementation": "paged"}, UnsupportedError, "'paged'"),
    "offloaded cache": (lambda m: {"past_key_values": offloaded(m)}, UnsupportedError, "offloaded"),
    "sliding cache": (
        lambda m: {"past_key_values": Cache(layers=[StaticSlidingWindowLayer(99, sliding_window=8)] * 3)},
        UnsupportedError,
        "StaticSlidingWindowLayer",
    ),
    "lazy cache": (
        lambda m: {"past_key_values": Cache(layer_class_to_replicate=OtherLayer)},
        UnsupportedError,
        "OtherLayer",
    ),
    "short cache": (
        lambda m: {tiny.CACHE: Cache(layers=[DynamicLayer()])},
        UnsupportedError,
        "1 layers for the 3",
    ),
    "filled cache": (
        lambda m: {tiny.CACHE: filled(m)},
        InvalidArgumentError,
        "already holds 5 positions",
    ),
    "nothing": ({"input_ids": None}, InvalidArgumentError, "prompt is empty"),
    "no tokens": (
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
        InvalidArgumentError,
        "prompt is empty",
    ),
    "row without tokens": (
        {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]),
        },
        InvalidArgumentError,
        "prompt of row 1 is empty",
    ),
    "chunks of a row without tokens": (
        {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "attention_mask": torch.tensor([[0, 0, 0], [0, 1, 1]]),
            "prefill_chunk_size": 2,
        },
        InvalidArgumentError,
        "prompt of row 0 is empty",
    ),
    "padding on the right": (
        {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        },
        UnsupportedError,
        "0 after a 1: pad on the left",
    ),
    "gap": (
        {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])},
        UnsupportedError,
        "0 after a 1",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_refused_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    arguments, error, match = REQUESTS[name]
    if callable(arguments):
        arguments = arguments(model)
    with attach(model, tiny.processor()) as attachment:
        # The first forward would fail with something else.
        monkeypatch.setattr(model.model, "forward", None)
        settings = {"input_ids": tiny.prompts((5,))[0], "max_new_tokens": 4, "do_sample": False} | arguments
        refuses(error, match, lambda: model.generate(**settings))
        monkeypatch.undo()
        ids = tiny.prompts((5,))[0]
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert attachment.stats.boundaries > 0


def test_refused_in_the_models_own_settings() -> None:
    """What `generate` is not told it takes from the configuration it is given, then from the model's."""
    model = tiny.model()
    ids = tiny.prompts((5,))[0]
    with attach(model, tiny.processor()):
        model.generation_config.num_beams = 3
        refuses(UnsupportedError, "num_beams=3", lambda: model.generate(ids, max_new_tokens=2))
        model.generate(ids, max_new_tokens=2, num_beams=1)
        given = type(model.generation_config)(num_beams=2, max_new_tokens=2)
        model.generation_config.num_beams = None
        refuses(UnsupportedError, "num_beams=2", lambda: model.generate(ids, given))


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching(name: str) -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        refuses(UnsupportedError, "generate_batch", lambda: getattr(model, name)([[1, 2]]))
    assert name not in vars(model)


def test_quantised_cache_object() -> None:
    """Made without its optional backend: only its layers' type is looked at."""
    from transformers.cache_utils import QuantizedLayer

    class Layer(QuantizedLayer):
        def __init__(self) -> None:
            DynamicLayer.__init__(self)

        def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
            raise AssertionError

        def _dequantize(self, tensor: Any) -> Any:
            raise AssertionError

    cache = QuantizedCache.__new__(QuantizedCache)
    Cache.__init__(cache, layers=[Layer() for _ in range(3)])
    model = tiny.model()
    with attach(model, tiny.processor()):
        refuses(
            UnsupportedError,
            "QuantizedCache has layers of the kind Layer",
            lambda: model.generate(tiny.prompts((5,))[0], past_key_values=cache, max_new_tokens=2),
        )


# --- a kept cache -------------------------------------------------------------------------------------------


def kept(model: LlamaForCausalLM, lengths: tuple[int, ...] = (5,), **settings: Any) -> tuple[Cache, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    ids, mask = tiny.prompts(lengths)
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask} | settings
    return cache, model.generate(ids, past_key_values=cache, **settings)


def test_kept_cache_that_was_cropped() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model)
        cache.crop(-2)
        refuses(
            InvalidArgumentError,
            "holds 6 positions, but generate left 8",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2),
        )


def test_kept_cache_that_grew_elsewhere() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model)
        model(tokens[:, -1:], past_key_values=cache)
        tokens = torch.cat([tokens, tokens[:, -1:]], dim=1)
        refuses(
            InvalidArgumentError,
            "holds 9 positions, but generate left 8",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2),
        )


def test_kept_cache_with_another_batch() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model)
        cache.batch_repeat_interleave(2)
        refuses(
            InvalidArgumentError,
            "holds 1 rows, but the batch has 2",
            lambda: model.generate(tokens.repeat(2, 1), past_key_values=cache, max_new_tokens=2),
        )


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("dynamic", how) for how in ("reorder_cache", "batch_select_indices", "crop")),
        *(("static", how) for how in ("reorder_cache", "crop")),
    ],
)
def test_kept_cache_with_other_contents(kind: str, how: str) -> None:
    """As many rows and positions as before: whose queries and steps are kept would no longer be theirs."""
    model = tiny.model()
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    settings: dict[str, Any] = {tiny.CACHE: cache, "do_sample": False}
    with attach(model, tiny.processor()) as attachment:
        tokens = model.generate(tiny.prompts((5, 5))[0], max_new_tokens=4, **settings)
        if how == "crop":
            cache.crop(-2)
            with torch.no_grad():
                model((tokens[:, -3:-1] + 1) % tiny.EOS, **{tiny.CACHE: cache})
        else:
            getattr(cache, how)(torch.tensor([1, 0]))
            tokens = tokens.flip(0)
        rewrites = attachment.stats.rewrites
        refuses(
            InvalidArgumentError,
            "does not hold the keys that generate left at position 7",
            lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, **settings),
        )
        assert attachment.stats.rewrites == rewrites


def test_kept_cache_with_another_mask() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model, (5, 3))
        refuses(
            InvalidArgumentError,
            r"by \[0, 0\], but they were written with \[0, 2\]",
            lambda: model.generate(
                tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, max_new_tokens=2
            ),
        )


def test_kept_cache_in_chunks() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model)
        refuses(
            UnsupportedError,
            "prefill_chunk_size",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2, prefill_chunk_size=4),
        )


def test_kept_cache_with_a_finished_row() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        script = tiny.Script([60, 1, 1, 1], [1, 2, 4, 5])
        cache, tokens = kept(model, (5, 5), eos_token_id=60, logits_processor=[script])
        refuses(
            InvalidArgumentError,
            "row 0 of the kept cache ended before the others",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2, eos_token_id=60),
        )


def test_kept_cache_of_an_earlier_attachment() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        cache, tokens = kept(model)
    with attach(model, tiny.processor()):
        refuses(
            InvalidArgumentError,
            "already holds 8 positions",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2),
        )


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("static", [False, True])
def test_kept_cache_in_which_a_forward_was_cancelled(static: bool, after: int) -> None:
    """In the second of three layers, of the prompt or of the third token: the first layer alone has cached that."""
    model = tiny.model()
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    left = [after]

    def interrupt(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    ids, _ = tiny.prompts((5,))
    with attach(model, tiny.processor()):
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
        hook.remove()
        tokens = torch.cat([ids, ids[:, : after + 1]], dim=1)
        refuses(
            InvalidArgumentError,
            f"holds {5 + after} positions in its first layer and {(4 + after) * (after > 0)} in its last one",
            lambda: model.generate(tokens, past_key_values=cache, max_new_tokens=2),
        )


def test_static_cache_reset_is_a_new_one() -> None:
    model = tiny.model()
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids, _ = tiny.prompts((5,))
    with attach(model, tiny.processor()) as attachment:
        once = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False), once)
    assert attachment.stats.boundaries > 2


# --- found only during the first forwards -------------------------------------------------------------------


def test_positions_that_do_not_count_from_the_first_token() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        refuses(
            UnsupportedError,
            "position_ids numbers position 5 of row 0 as 15",
            lambda: model.generate(tiny.prompts((5,))[0], position_ids=torch.arange(10, 15)[None], max_new_tokens=4),
        )


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_attention_with_something_more(name: str) -> None:
    model = tiny.model()
    with attach(model, tiny.processor()):
        attention = model.model.layers[1].self_attn
        forward = attention.forward
        attention.forward = lambda *a, **k: forward(*a, **k, **{name: 1.0})
        refuses(UnsupportedError, name, lambda: model.generate(tiny.prompts((5,))[0], max_new_tokens=4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_that_scales_its_queries_itself(attention: str) -> None:
    torch.manual_seed(0)
    config = OPTConfig(**(tiny.SHAPE | {"num_key_value_heads": 4, "word_embed_proj_dim": 64}))
    model = OPTForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    with attach(model, tiny.processor(num_kv_heads=4)) as attachment:
        refuses(
            UnsupportedError,
            "OPTAttention has scaling 0.25, but calls its attention function with 1.0",
            lambda: model.generate(tiny.prompts((40,))[0], max_new_tokens=4),
        )
    assert attachment.stats.boundaries == 0
    model.generate(tiny.prompts((40,))[0], max_new_tokens=4)


def test_queries_that_never_arrive() -> None:
    """A layer that drops forward's keyword arguments must not be rewritten from queries it never wrote."""
    model = tiny.model()
    with attach(model, tiny.processor()):
        attention = model.model.layers[1].self_attn
        forward = attention.forward
        attention.forward = lambda *a, **k: forward(*a, **{n: v for n, v in k.items() if not n.startswith("query_")})
        refuses(
            UnsupportedError,
            "did not pass the queries of layer 1",
            lambda: model.generate(tiny.prompts((5,))[0], max_new_tokens=4),
        )


def test_autocast() -> None:
    model = tiny.model()
    with attach(model, tiny.processor()), torch.autocast("cpu", torch.bfloat16):
        refuses(UnsupportedError, "autocast", lambda: model.generate(tiny.prompts((5,))[0], max_new_tokens=4))


def test_prepare_without_ids_or_cache() -> None:
    """Loops of one's own meet the same refusals."""
    model = tiny.model()
    ids = tiny.prompts((5,))[0]
    with attach(model, tiny.processor()):
        prepare = model.prepare_inputs_for_generation
        refuses(UnsupportedError, "use_cache=False", lambda: prepare(ids, use_cache=False))
        refuses(
            UnsupportedError,
            "inputs_embeds",
            lambda: prepare(
                ids,
                inputs_embeds=torch.zeros(1, 5, 64),
                past_key_values=DynamicCache(config=model.config),
                is_first_iteration=True,
            ),
        )


def test_a_tokenizer_without_newlines() -> None:
    tokenizer = type("Tokenizer", (), {"__len__": lambda self: 8, "decode": lambda self, ids: "x"})()
    processor = tiny.processor(boundary={"rule": "newline", "token_ids": ()})
    refuses(InvalidArgumentError, "contains a newline", lambda: attach(tiny.model(), processor, tokenizer))
