"""reference.py against slower, plainer or closed forms of the same definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.checkpoint import initial_weights
from bottlenecked.config import CacheProcessorConfig
from bottlenecked.reference import (
    attention_mass,
    gather,
    processor_block,
    rewrite,
    rotate,
    round_to,
    select_top_k,
)

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "num_query_heads": 6}
SMALL = {"processor_dim": 8, "processor_heads": 2, "processor_mlp_dim": 12, "top_k": 3, "recent_window": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(**changes):
    return CacheProcessorConfig(**{**SHAPE, **SMALL, **changes})


def random_weights(c, seed=0):
    """Every tensor random, so that a forgotten or confused one shows."""
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 0.5, s) for n, s in c.tensor_shapes().items()}


def random_cache(c, blocks, block_size, pages, page_size, seed=1):
    generator = np.random.default_rng(seed)
    kv = (blocks, block_size, c.num_kv_heads, c.head_dim)
    q = (pages, page_size, c.num_query_heads, c.head_dim)
    return [[generator.normal(size=shape) for _ in range(c.num_layers)] for shape in (kv, kv, q)]


def flat(k, v):
    return np.concatenate([k.reshape(len(k), -1), v.reshape(len(v), -1)], axis=1)


# --- attention mass and selection


def test_attention_mass_written_out():
    generator = np.random.default_rng(0)
    window, seen, heads, kv_heads, scale = 3, 8, 6, 2, 0.7
    q, k = generator.normal(size=(window, heads, 4)), generator.normal(size=(seen, kv_heads, 4))
    mass = np.zeros(seen - window)
    for h in range(heads):
        for j in range(window):
            position = seen - window + j
            scores = [scale * float(q[j, h] @ k[i, h // 3]) for i in range(position + 1)]
            total = sum(math.exp(s) for s in scores)
            for i in range(seen - window):
                mass[i] += math.exp(scores[i]) / total / (window * heads)
    np.testing.assert_allclose(attention_mass(q, k, scale), mass, rtol=1e-12)


def test_attention_mass_of_equal_keys():
    # Query j sees prior + j + 1 equal keys.
    mass = attention_mass(np.ones((3, 2, 4), np.float32), np.ones((10, 1, 4), np.float32), 1.0)
    assert mass.dtype == np.float64
    np.testing.assert_allclose(mass, np.full(7, (1 / 8 + 1 / 9 + 1 / 10) / 3), rtol=1e-14)


def test_attention_mass_of_large_scores_does_not_overflow():
    q, k = np.full((1, 1, 2), 300.0), np.array([[[300.0, 300.0]], [[0.0, 0.0]], [[300.0, 300.0]]])
    np.testing.assert_allclose(attention_mass(q, k, 1.0), [0.5, 0.0])


def test_attention_mass_without_a_prior_is_empty():
    assert attention_mass(np.ones((2, 2, 4)), np.ones((2, 1, 4)), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("mass", "k", "expected"),
    [
        ([0.1, 0.3, 0.2], 2, [1, 2]),
        ([0.2, 0.1, 0.2, 0.2], 2, [0, 2]),
        ([0.0, 0.0, 0.0], 2, [0, 1]),
        ([0.1, 0.2], 9, [0, 1]),
        ([0.1, 0.2], 0, []),
        ([], 3, []),
    ],
)
def test_select_top_k(mass, k, expected):
    assert select_top_k(np.array(mass), k).tolist() == expected


# --- the Processor


@pytest.mark.parametrize("rounded", [False, True])
def test_processor_block_is_the_torch_one(rounded):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    c = config(norm_eps=0.5)
    generator = np.random.default_rng(3)
    w = {n: torch.from_numpy(generator.normal(0.5, 0.3, s)) for n, s in c.layer_shapes().items()}
    x = torch.from_numpy(generator.normal(size=(7, c.kv_width)))

    def linear(name, y):
        weight = w[f"{name}.weight"]
        if rounded:
            y, weight = y.bfloat16().double(), weight.bfloat16().double()
        return F.linear(y, weight, w.get(f"{name}.bias"))

    def norm(name, y):
        return F.rms_norm(y, y.shape[-1:], w[f"{name}.weight"], eps=c.norm_eps)

    u = linear("in_proj", norm("input_norm", x))
    y = norm("attn_norm", u)
    q, k, v = (linear(n, y).view(7, 2, 4).transpose(0, 1) for n in ("q_proj", "k_proj", "v_proj"))
    u = u + linear("o_proj", F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(7, 8))
    z = norm("mlp_norm", u)
    u = u + linear("down_proj", F.silu(linear("gate_proj", z)) * linear("up_proj", z))
    expected = torch.sigmoid(w["gate"]) * linear("out_proj", u)
    arrays = {n: t.numpy() for n, t in w.items()}
    got = processor_block(c, arrays, x.numpy(), operands="bfloat16" if rounded else None)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12)
    other = processor_block(c, arrays, x.numpy(), operands=None if rounded else "bfloat16")
    assert np.abs(got - other).max() > 1e-4


def test_processor_block_widens_before_it_computes():
    c = config()
    w = {n: np.ones(s, np.float32) / 3 for n, s in c.layer_shapes().items()}
    x = np.random.default_rng(0).normal(size=(3, c.kv_width)).astype(np.float32)
    wide = processor_block(c, {n: a.astype(np.float64) for n, a in w.items()}, x.astype(np.float64))
    assert np.array_equal(processor_block(c, w, x), wide)


# --- the rewrite


def test_rewrite_of_one_sequence_step_by_step():
    c = config()
    weights = random_weights(c)
    keys, values, queries = random_cache(c, 1, 20, 1, 4)
    event = BoundaryEvent(0, step_begin=10, step_end=15, sequence_begin=2)
    result = rewrite(c, weights, keys, values, queries, [event])
    assert result.recalled[0].shape == (2, 3)
    assert result.delta[0].shape == (2, 7, 16)
    for layer in range(2):
        k, v = keys[layer][0], values[layer][0]
        # The step has 5 tokens, the window 4 of them; the fifth is prior.
        q = queries[layer][0][[11 % 4, 12 % 4, 13 % 4, 14 % 4]]
        top = 2 + select_top_k(attention_mass(q, k[2:15], 4**-0.5), 3)
        assert result.recalled[0][layer].tolist() == top.tolist()
        rows = [*top, 11, 12, 13, 14]
        of_layer = {n: weights[f"layers.{layer}.{n}"] for n in c.layer_shapes()}
        edit = processor_block(c, of_layer, flat(k[rows], v[rows]))
        np.testing.assert_array_equal(result.delta[0][layer], edit)
        new = flat(result.keys[layer][0], result.values[layer][0])
        old = flat(k, v)
        np.testing.assert_array_equal(new[rows], old[rows] + edit)
        others = np.setdiff1d(np.arange(20), rows)
        np.testing.assert_array_equal(new[others], old[others])


def test_softmax_scale_decides_the_selection():
    c = config(num_layers=1, top_k=1, num_kv_heads=1, num_query_heads=1, head_dim=2, recent_window=2)
    # A large scale saturates: the first query gives all to position 0, the second all to its own position 3.
    # At a small scale mass grows linearly: (27 - 9) / 3 for position 0 against 25 / 4 for position 1.
    keys = [np.array([[9.0, 0.0], [3.0, 25.0], [0.0, 0.0], [0.0, 40.0]]).reshape(1, 4, 1, 2)]
    queries = [np.array([[3.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)]
    for scale, recalled in ((1.0, 0), (1e-4, 1)):
        got = rewrite(c, random_weights(c), keys, keys, queries, [BoundaryEvent(0, 2, 4)], softmax_scale=scale)
        assert got.recalled[0].tolist() == [[recalled]]


def test_paged_is_contiguous():
    c = config()
    weights = random_weights(c)
    keys, values, queries = random_cache(c, 2, 12, 2, 4)
    events = [BoundaryEvent(1, 7, 12, 3), BoundaryEvent(0, 4, 6)]
    whole = rewrite(c, weights, keys, values, queries, events)

    # The same rows in blocks of 5 and pages of 3 in odd places, with garbage everywhere else.
    block_table = np.array([[4, 0, 6], [2, 7, 1]])
    query_table = np.array([[5, 1], [0, 3]])
    paged = random_cache(c, 8, 5, 6, 3, seed=5)
    for layer in range(c.num_layers):
        for s in range(2):
            for p in range(12):
                for cache, pages in ((keys, paged[0]), (values, paged[1])):
                    pages[layer][block_table[s, p // 5], p % 5] = cache[layer][s, p]
            for p in {0: range(2, 6), 1: range(8, 12)}[s]:
                paged[2][layer][query_table[s, (p // 3) % 2], p % 3] = queries[layer][s, p % 4]
    before = [[a.copy() for a in cache] for cache in paged]
    result = rewrite(c, weights, *paged, events, block_table, query_table)
    for e, event in enumerate(events):
        assert np.array_equal(result.recalled[e], whole.recalled[e])
        np.testing.assert_array_equal(result.delta[e], whole.delta[e])
        for layer in range(c.num_layers):
            positions = np.arange(event.step_end)
            for new, new_whole in ((result.keys, whole.keys), (result.values, whole.values)):
                got = gather(new[layer], block_table[event.sequence], positions)
                np.testing.assert_array_equal(got, new_whole[layer][event.sequence, : event.step_end])
    # The inputs are as they were.
    for cache, old in zip(paged, before, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(cache, old, strict=True))


@pytest.mark.parametrize(
    ("event", "top_k", "recalled", "rows"),
    [
        (BoundaryEvent(0, 0, 3), 3, 0, 3),  # no prior at all
        (BoundaryEvent(0, 0, 6), 3, 2, 6),  # the beginning of a long first step is its own prior
        (BoundaryEvent(0, 2, 4), 9, 2, 4),  # k larger than the prior
        (BoundaryEvent(0, 5, 6), 3, 3, 4),  # a step of one token
        (BoundaryEvent(0, 5, 8), 0, 0, 3),  # consolidation only
        (BoundaryEvent(0, 5, 8, 5), 3, 0, 3),  # only padding before the step
    ],
)
def test_edges_of_the_selection(event, top_k, recalled, rows):
    c = config(top_k=top_k)
    result = rewrite(c, random_weights(c), *random_cache(c, 1, 8, 1, 4), [event])
    assert result.recalled[0].shape == (2, recalled)
    assert result.recalled[0].dtype == np.int64
    assert result.delta[0].shape == (2, rows, 16)


def test_an_identity_processor_keeps_every_bit():
    c = config()
    keys, values, queries = random_cache(c, 1, 8, 1, 4)
    keys[0][0, 5:7] = -0.0
    result = rewrite(c, initial_weights(c), keys, values, queries, [BoundaryEvent(0, 4, 8)])
    for new, old in ((result.keys, keys), (result.values, values)):
        for layer in range(c.num_layers):
            assert new[layer].tobytes() == old[layer].tobytes()
    assert not np.any(result.delta[0])


def test_unrotated_sees_and_edits_the_keys_before_rope():
    c = config(key_space="unrotated", rope_parameters=ROPE, top_k=9)
    weights = random_weights(c)
    raw, values, queries = random_cache(c, 1, 9, 1, 4)
    event = BoundaryEvent(0, 5, 9, sequence_begin=2)
    # Token 0 is at position 2. Angles are the float32 products that a backbone computes.
    frequencies = np.float32([1.0, 0.01])
    turns = [np.exp(1j * np.float64(np.float32(p - 2) * frequencies)) for p in range(9)]

    def rotated(x):
        # Half-split pairs (i, i + 2) as complex numbers.
        y = (x[..., :2] + 1j * x[..., 2:]) * np.array(turns)[:, None]
        return np.concatenate([y.real, y.imag], axis=-1)

    keys = [rotated(r[0])[None] for r in raw]
    result = rewrite(c, weights, keys, values, queries, [event])
    for layer in range(2):
        of_layer = {n: weights[f"layers.{layer}.{n}"] for n in c.layer_shapes()}
        edit = processor_block(c, of_layer, flat(raw[layer][0, 2:], values[layer][0, 2:]))
        new_raw = raw[layer][0].copy()
        new_raw[2:] += edit[:, :8].reshape(7, 2, 4)
        np.testing.assert_allclose(result.keys[layer][0], rotated(new_raw), rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.values[layer][0, 2:], values[layer][0, 2:] + edit[:, 8:].reshape(7, 2, 4))
        # What is reported is what was added to the cached keys.
        added = (result.keys[layer][0, 2:] - keys[layer][0, 2:]).reshape(7, -1)
        np.testing.assert_allclose(result.delta[0][layer][:, :8], added, rtol=0, atol=1e-12)


def test_rotate_turns_pairs():
    x = np.array([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 4)
    got = rotate(x, np.array([[math.pi / 2, math.pi]]))
    np.testing.assert_allclose(got[0, 0], [0, -2, 1, 0], atol=1e-15)
    np.testing.assert_allclose(rotate(got, -np.array([[math.pi / 2, math.pi]])), x, atol=1e-15)


# --- rounding

FORMATS = {"float32": (24, -149, 128), "float16": (11, -24, 16), "bfloat16": (8, -133, 128)}


@settings(max_examples=300, deadline=None, print_blob=True)
@given(st.floats(-1e300, 1e300), st.sampled_from(sorted(FORMATS)), st.integers(-2, 2))
@example(1 + 2**-8 + 2**-40, "bfloat16", 0)
@example(65519.99999999999, "float16", 0)
@example(65520.0, "float16", 0)
@example(2.0**-25, "float16", 0)
@example(2.0**-134 * 1.0000001, "bfloat16", 0)
def test_round_to_is_the_nearest_number_ties_to_even(x, dtype, nudge):
    precision, lowest, top = FORMATS[dtype]
    # Also next to the middle between two numbers, where a second rounding would show.
    if nudge and x:
        spacing = 2.0 ** max(lowest, math.frexp(x)[1] - precision)
        x = (math.floor(x / spacing) + 0.5) * spacing
        x = math.nextafter(x, math.inf * nudge) if abs(nudge) > 1 else x
    exact = abs(Fraction(x))
    spacing = Fraction(2) ** max(lowest, math.frexp(x)[1] - precision)
    down = exact // spacing * spacing
    rest = exact - down
    up = rest > spacing / 2 or (rest == spacing / 2 and (down / spacing) % 2 == 1)
    expected = down + spacing if up else down
    got = round_to(x, dtype)
    assert got.dtype == np.float32
    if expected >= Fraction(2) ** top:
        assert got == math.copysign(math.inf, x)
    else:
        assert abs(Fraction(float(got))) == expected
        assert math.copysign(1, got) == math.copysign(1, x)


def test_round_to_of_arrays_and_special_values():
    x = np.array([[0.0, -0.0, np.inf], [-np.inf, np.nan, 3.0]])
    for dtype in FORMATS:
        got = round_to(x, dtype)
        np.testing.assert_array_equal(got, x)
        assert np.array_equal(np.signbit(got[0]), [False, True, False])
    values = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.random.default_rng(1).integers(-9, 5, 1000)
    assert np.array_equal(round_to(values, "float32"), values.astype(np.float32))
    with np.errstate(over="ignore"):
        assert np.array_equal(round_to(values, "float16"), values.astype(np.float16).astype(np.float32))
