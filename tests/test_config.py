"""config.py: the paper's sizes, what is refused, and what survives a round trip."""

import json

import pytest

from bottlenecked.config import BoundaryConfig, CacheProcessorConfig

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "num_query_heads": 6}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**changes):
    return CacheProcessorConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("name", "num_layers", "num_kv_heads", "num_query_heads", "head_dim", "millions"),
    [
        ("Llama-3.2-1B", 16, 8, 32, 64, "88.69"),
        ("Llama-3.2-3B", 28, 8, 24, 128, "184.63"),
        ("Llama-3.1-8B", 32, 8, 32, 128, "211.01"),
        ("Qwen3-0.6B", 28, 8, 16, 128, "184.63"),
    ],
)
def test_the_four_sizes_of_the_paper(name, num_layers, num_kv_heads, num_query_heads, head_dim, millions):
    c = CacheProcessorConfig(
        num_layers=num_layers, num_kv_heads=num_kv_heads, num_query_heads=num_query_heads, head_dim=head_dim
    )
    assert f"{c.num_parameters() / 1e6:.2f}" == millions
    count = 0
    for shape in c.tensor_shapes().values():
        size = 1
        for n in shape:
            size *= n
        count += size
    assert count == c.num_parameters()


def test_tensor_names_and_shapes():
    c = config(processor_dim=32, processor_heads=4, processor_mlp_dim=48)
    assert c.kv_width == 32
    shapes = c.tensor_shapes()
    assert len(shapes) == 3 * 19
    assert list(shapes)[:2] == ["layers.0.input_norm.weight", "layers.0.in_proj.weight"]
    assert list(shapes)[-3:] == ["layers.2.out_proj.weight", "layers.2.out_proj.bias", "layers.2.gate"]
    wide = config(head_dim=16, processor_dim=32, processor_heads=4, processor_mlp_dim=48).tensor_shapes()
    assert wide["layers.1.input_norm.weight"] == (64,)
    assert wide["layers.1.in_proj.weight"] == (32, 64)
    assert wide["layers.1.in_proj.bias"] == (32,)
    assert wide["layers.1.o_proj.weight"] == (32, 32)
    assert wide["layers.1.gate_proj.weight"] == wide["layers.1.up_proj.weight"] == (48, 32)
    assert wide["layers.1.down_proj.weight"] == (32, 48)
    assert wide["layers.1.out_proj.weight"] == (64, 32)
    assert wide["layers.1.out_proj.bias"] == (64,)
    assert wide["layers.1.gate"] == ()


def test_the_edges_are_allowed():
    config(top_k=0, recent_window=1, norm_eps=1)
    config(top_k=65536, recent_window=256, num_query_heads=2, num_kv_heads=2)
    config(head_dim=7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 0),
        ("num_layers", 4097),
        ("num_layers", True),
        ("num_layers", 3.0),
        ("num_layers", "3"),
        ("num_kv_heads", -1),
        ("head_dim", None),
        ("num_query_heads", 5),
        ("processor_dim", 500),
        ("processor_heads", 0),
        ("processor_mlp_dim", 65537),
        ("top_k", -1),
        ("top_k", 65537),
        ("top_k", False),
        ("recent_window", 0),
        ("recent_window", 257),
        ("rewrite_prompt", 1),
        ("rewrite_prompt", None),
        ("key_space", "raw"),
        ("key_space", ["rotated"]),
        ("norm_eps", 0.0),
        ("norm_eps", -1e-6),
        ("norm_eps", 1e-50),
        ("norm_eps", float("nan")),
        ("norm_eps", float("inf")),
        ("norm_eps", True),
        ("norm_eps", "1e-6"),
        ("boundary", "newline"),
        ("backbone", "llama"),
        ("training", None),
        ("rope_parameters", []),
        ("format_version", 2),
        ("format_version", True),
        ("format_version", "1"),
    ],
)
def test_a_bad_value_is_named(key, value):
    # In the constructor and in the file alike.
    with pytest.raises(ValueError, match=rf"^{key} is .*must be") as error:
        config(**{key: value})
    assert repr(value) in str(error.value)
    with pytest.raises(ValueError, match=rf"^{key} is .*must be"):
        CacheProcessorConfig.from_dict({**config().to_dict(), key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rule", "sentence"),
        ("token_ids", (1, -2)),
        ("token_ids", (True,)),
        ("token_ids", (1.0,)),
        ("token_ids", 10),
        ("min_step_length", 0),
        ("min_step_length", 2.0),
        ("timing", "during"),
    ],
)
def test_a_bad_boundary_value_is_named(key, value):
    with pytest.raises(ValueError, match=rf"^boundary\.{key} is .*must be"):
        BoundaryConfig(**{key: value})
    values = config().to_dict()
    values["boundary"][key] = value
    with pytest.raises(ValueError, match=rf"^boundary\.{key} is .*must be"):
        CacheProcessorConfig.from_dict(values)


def test_the_rule_token_ids_needs_ids():
    assert BoundaryConfig(rule="token_ids", token_ids=(5,)).token_ids == (5,)
    with pytest.raises(ValueError, match=r"boundary\.token_ids is \(\)"):
        BoundaryConfig(rule="token_ids")


def test_every_missing_key_is_named():
    for key in config().to_dict():
        values = config().to_dict()
        del values[key]
        if key == "rope_parameters":
            CacheProcessorConfig.from_dict(values)
            continue
        with pytest.raises(ValueError, match=rf"^{key} is missing"):
            CacheProcessorConfig.from_dict(values)
    for key in ("rule", "token_ids"):
        values = config().to_dict()
        del values["boundary"][key]
        with pytest.raises(ValueError, match=rf"^boundary\.{key} is missing"):
            CacheProcessorConfig.from_dict(values)


def test_another_model_type_is_refused():
    with pytest.raises(ValueError, match=r"^model_type is 'llama'"):
        CacheProcessorConfig.from_dict({**config().to_dict(), "model_type": "llama"})


def test_unknown_keys_survive_a_round_trip():
    values = config(boundary=BoundaryConfig(token_ids=(3, 4), timing="pre")).to_dict()
    values["colour"] = {"hue": [1, 2]}
    values["boundary"]["entropy"] = 0.5
    c = CacheProcessorConfig.from_dict(values)
    assert c.extra == {"colour": {"hue": [1, 2]}}
    assert c.boundary == BoundaryConfig(token_ids=(3, 4), timing="pre", extra={"entropy": 0.5})
    assert json.loads(c.to_json()) == values
    assert CacheProcessorConfig.from_dict(c.to_dict()) == c
    # The configuration keeps no reference to what it was made from.
    values["colour"]["hue"].append(3)
    assert c.extra == {"colour": {"hue": [1, 2]}}


def test_extra_cannot_shadow_a_setting():
    for key in ("top_k", "model_type"):
        with pytest.raises(ValueError, match=f"extra holds the key '{key}'"):
            config(extra={key: 1})


def test_load_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config(top_k=5).to_json())
    assert CacheProcessorConfig.load(tmp_path).top_k == 5
    for text in ("{", '{"norm_eps": NaN}', "[" * 100_000, "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            CacheProcessorConfig.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: the configuration is \[\]"):
        CacheProcessorConfig.load(tmp_path)
    path.write_text(config().to_json().replace('"top_k": 32', '"top_k": -3'))
    with pytest.raises(ValueError, match=r"config\.json: top_k is -3"):
        CacheProcessorConfig.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        CacheProcessorConfig.load(tmp_path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        CacheProcessorConfig.load(tmp_path)


def test_what_is_not_json_is_refused_before_it_is_written():
    for value in (float("nan"), {1, 2}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            config(training={"loss": value}).to_json()


@pytest.mark.parametrize(
    "rope",
    [
        ROPE,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA3,
    ],
)
def test_inv_freq_is_that_of_transformers(rope):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    backbone = llama.LlamaConfig(
        num_attention_heads=4, head_dim=64, rope_parameters=rope, max_position_embeddings=131072
    )
    theirs = llama.LlamaRotaryEmbedding(backbone).inv_freq
    ours = config(head_dim=64, key_space="unrotated", rope_parameters=rope).inv_freq()
    assert len(ours) == 32
    # They compute in float32: two or three roundings apart.
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize(
    ("key", "rope"),
    [
        ("rope_parameters", None),
        ("rope_parameters.rope_type", {"rope_theta": 10000.0}),
        ("rope_parameters.rope_type", {**ROPE, "rope_type": "yarn"}),
        ("rope_parameters.rope_theta", {"rope_type": "default"}),
        ("rope_parameters.rope_theta", {**ROPE, "rope_theta": 0.5}),
        ("rope_parameters.partial_rotary_factor", {**ROPE, "partial_rotary_factor": 0.5}),
        ("rope_parameters.no_rope_layers", {**ROPE, "no_rope_layers": [1, 1, 0]}),
        ("rope_parameters.no_rope_layers", {**ROPE, "no_rope_layers": 1}),
        ("rope_parameters.factor", {**ROPE, "rope_type": "linear", "factor": 0}),
        ("rope_parameters.high_freq_factor", {**LLAMA3, "high_freq_factor": None}),
        ("rope_parameters.low_freq_factor", {**LLAMA3, "low_freq_factor": 4.0}),
    ],
)
def test_unrotated_needs_a_rope_it_can_undo(key, rope):
    config(rope_parameters=rope)
    with pytest.raises(ValueError, match=rf"^{key} is "):
        config(key_space="unrotated", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"^head_dim is 7"):
        config(key_space="unrotated", head_dim=7, rope_parameters=ROPE)
