"""module.py: the definition's values, the right gradients, the checkpoint's names."""

import ast
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import bottlenecked.module  # noqa: E402
from bottlenecked.checkpoint import initial_weights, load_weights, save_checkpoint  # noqa: E402
from bottlenecked.config import CacheProcessorConfig  # noqa: E402
from bottlenecked.module import CacheProcessorModule  # noqa: E402
from bottlenecked.reference import processor_block  # noqa: E402

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 2, "num_query_heads": 4}
SMALL = {"processor_dim": 6, "processor_heads": 2, "processor_mlp_dim": 5}


def config(**changes):
    return CacheProcessorConfig(**{**SHAPE, **SMALL, **changes})


def random_weights(c, seed=0):
    generator = np.random.default_rng(seed)
    return {n: generator.normal(0, 0.5, s).astype(np.float32) for n, s in c.tensor_shapes().items()}


def random_rows(c, rows, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(c.num_layers, rows, c.kv_width)))


def reference(c, weights, x, row_lengths):
    edits = []
    for layer in range(c.num_layers):
        of_layer = {n: weights[f"layers.{layer}.{n}"] for n in c.layer_shapes()}
        parts = np.split(x[layer].numpy(), np.cumsum(row_lengths)[:-1])
        edits.append(np.concatenate([processor_block(c, of_layer, part) for part in parts]))
    return np.stack(edits)


@pytest.mark.parametrize("row_lengths", [[7], [1], [3, 3], [1, 4, 2], [5, 1], [1, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_module_equals_reference(row_lengths, dtype):
    c = config(processor_dim=32, processor_heads=4, processor_mlp_dim=24, head_dim=8, norm_eps=0.1)
    weights = random_weights(c)
    x = random_rows(c, sum(row_lengths))
    module = CacheProcessorModule(c, weights).to(dtype)
    got = module(x, row_lengths)
    assert got.dtype == dtype
    expected = reference(c, weights, x, row_lengths)
    # A few hundred operations deep: some hundred roundings of the largest value.
    tolerance = 200 * torch.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=tolerance)
    for layer in range(c.num_layers):
        of_layer = module.forward_layer(layer, x[layer], row_lengths)
        np.testing.assert_allclose(of_layer.detach().numpy(), expected[layer], rtol=0, atol=tolerance)


def test_one_sequence_is_the_default():
    module = CacheProcessorModule(config(), random_weights(config()))
    x = random_rows(config(), 5)
    assert torch.equal(module(x), module(x, [5]))
    assert not torch.allclose(module(x), module(x, [2, 3]))


@pytest.mark.parametrize("row_lengths", [[5], [2, 3]])
def test_gradients_are_those_of_finite_differences(row_lengths):
    c = config(norm_eps=0.1)
    module = CacheProcessorModule(c, random_weights(c)).double()
    x = random_rows(c, 5).requires_grad_()
    weighting = random_rows(c, 5, seed=2)

    def loss():
        return (module(x, row_lengths) * weighting).sum()

    tensors = {"x": x, **dict(module.named_parameters())}
    assert len(tensors) == 1 + len(c.layer_shapes())
    gradients = torch.autograd.grad(loss(), list(tensors.values()))
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        # Along a random direction every element counts; a few directions find a wrong one.
        for _ in range(3):
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                tensor += step * direction
                above = loss()
                tensor -= 2 * step * direction
                below = loss()
                tensor += step * direction
            slope = (above - below) / (2 * step)
            expected = (gradient * direction).sum()
            assert abs(expected) > 1e-3 or name == "k_proj_bias", name
            # The remainder is of the order of step squared.
            assert abs(slope - expected) < 1e-6 * (1 + abs(expected)), name


def test_the_edits_of_a_new_module_are_exactly_zero_and_it_can_learn():
    module = CacheProcessorModule(config())
    x = random_rows(config(), 4)
    edits = module(x)
    assert not edits.any()
    edits.sum().backward()
    assert module.out_proj_weight.grad.any()


def test_state_dict_has_the_names_of_the_checkpoint():
    c = config()
    weights = random_weights(c)
    module = CacheProcessorModule(c, weights)
    state = module.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == c.tensor_shapes()
    for name, tensor in state.items():
        assert not tensor.requires_grad
        np.testing.assert_array_equal(tensor.numpy(), weights[name])
    assert module.state_dict(keep_vars=True)["layers.1.gate"].requires_grad
    assert module.num_parameters() == c.num_parameters()

    other = CacheProcessorModule(c, random_weights(c, seed=5))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    x = random_rows(c, 3)
    assert torch.equal(other(x), module(x))


def test_state_dict_inside_another_module():
    c = config()
    parents = [
        torch.nn.ModuleDict({"processor": CacheProcessorModule(c, random_weights(c, s)), "head": torch.nn.Linear(2, 2)})
        for s in (0, 1)
    ]
    state = parents[0].state_dict()
    assert set(state) == {f"processor.{n}" for n in c.tensor_shapes()} | {"head.weight", "head.bias"}
    parents[1].load_state_dict(state)
    x = random_rows(c, 3)
    assert torch.equal(parents[0]["processor"](x), parents[1]["processor"](x))


def test_a_state_dict_that_does_not_fit_is_refused():
    c = config()
    module = CacheProcessorModule(c)
    state = module.state_dict()
    for change, message in (
        ({"layers.2.gate": torch.zeros(())}, "Unexpected key.*layers.2.gate"),
        ({"layers.1.gate": None}, "Missing key.*layers.1.gate"),
        ({"layers.1.gate": torch.zeros(2)}, r"layers.1.gate has shape \[2\], but it must be \[\]"),
    ):
        changed = {n: t for n, t in {**state, **change}.items() if t is not None}
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(changed)
    incomplete = {"layers.1.gate": torch.tensor(3.0)}
    missing, unexpected = module.load_state_dict(incomplete, strict=False)
    assert len(missing) == len(state) - 1
    assert unexpected == []
    assert module.state_dict()["layers.1.gate"] == 3


def test_pretrained_round_trip(tmp_path):
    c = config(extra={"note": 1})
    weights = random_weights(c)
    save_checkpoint(tmp_path / "a", c, weights)
    module = CacheProcessorModule.from_pretrained(tmp_path / "a")
    assert module.config == c
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    module.bfloat16().float().save_pretrained(tmp_path / "b")
    rounded = {n: torch.from_numpy(w).bfloat16().float().numpy() for n, w in weights.items()}
    assert CacheProcessorConfig.load(tmp_path / "b") == c
    for name, tensor in load_weights(tmp_path / "b", c).items():
        np.testing.assert_array_equal(tensor, rounded[name])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    module = CacheProcessorModule(config())
    with torch.no_grad():
        module.up_proj_weight[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'layers\.1\.up_proj\.weight' holds a NaN"):
        module.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_module_keeps_its_own_copy_of_the_weights():
    weights = initial_weights(config())
    module = CacheProcessorModule(config(), weights)
    weights["layers.0.gate"][...] = 9
    assert module.gate[0] == -2


@pytest.mark.parametrize(
    ("shape", "row_lengths", "message"),
    [
        ((2, 4), None, r"x has shape \[2, 4\], but it must be \[2 layers, rows, 8\]"),
        ((3, 4, 8), None, "x has shape"),
        ((2, 4, 7), None, "x has shape"),
        ((2, 0, 8), None, "x has shape"),
        ((2, 4, 8), [], r"row_lengths \[\]"),
        ((2, 4, 8), [4, 0], r"row_lengths \[4, 0\]"),
        ((2, 4, 8), [1, 2], r"row_lengths \[1, 2\] must be 1 or more each and sum to 4"),
    ],
)
def test_bad_shapes(shape, row_lengths, message):
    with pytest.raises(ValueError, match=message):
        CacheProcessorModule(config())(torch.zeros(shape), row_lengths)


def test_bad_arguments():
    weights = initial_weights(config())
    del weights["layers.1.gate"]
    with pytest.raises(ValueError, match=r"'layers\.1\.gate' is missing"):
        CacheProcessorModule(config(), weights)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"layer is {layer}"):
            CacheProcessorModule(config()).forward_layer(layer, torch.zeros(1, 8))


def test_training_code_never_imports_the_extension():
    package = Path(bottlenecked.module.__file__).parent
    names = ["module"]
    for name in names:
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names += [node.module] if node.module not in names else []
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] != "bottleneck_ext"
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "bottleneck_ext" for alias in node.names)
    assert names == ["module", "checkpoint", "config"]
