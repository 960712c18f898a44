"""bottleneck_ext.Linear, the product the Processor is made of, on every instruction set against float64.

Tolerance: a sum of products in float32 is off by roundings of its partial sums. As they average out, the error stays
below `ROUNDINGS` half units in the last place of `sum |x w| + |bias| + |out|`, whatever in_dim is. With bfloat16
weights both operands are rounded to bfloat16 first; products of two of those are exact in float32, so the same bound
holds from there on.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
import torch

import bottleneck_ext
from bottleneck_ext import InvalidArgumentError, Linear, UnsupportedError, Workspace

AVAILABLE = [b["name"] for b in bottleneck_ext.backends() if b["available"] and b["backend"] == "cpu"]
WEIGHT_DTYPES = ("float32", "bfloat16")
DIMS = (1, 7, 33, 127, 384, 560)
LAYERS = 3
MANY = 300  # more rows than share one pass over the weights
ROUNDINGS = 16


def guarded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of values between 67 NaN on either side, and the memory of it all. 67: rows start on no vector."""
    memory = np.full(values.size + 134, np.nan, np.float32)
    view = memory[67:-67].reshape(values.shape)
    view[...] = values
    return view, memory


class Product:
    """Random operands of one product, a mean in them so that sums do not cancel."""

    def __init__(self, out_dim: int, in_dim: int, bias: bool, rows: int = MANY, layers: int = LAYERS) -> None:
        rng = np.random.default_rng([out_dim, in_dim, bias])

        def values(*shape: int) -> np.ndarray:
            return (rng.normal(0.25, 1, shape) / 4).astype(np.float32)

        self.weight = values(layers, out_dim, in_dim)
        self.bias = values(layers, out_dim) if bias else None
        self.x = values(layers, rows, in_dim)
        self.before = values(layers, rows, out_dim)  # what out holds

    def linear(self, backend: str, weight_dtype: str) -> Linear:
        return Linear(self.weight, self.bias, weight_dtype=weight_dtype, backend=backend)

    def apply(
        self, linear: Linear, *, rows: int = MANY, accumulate: bool = False, workspace: Workspace | None = None
    ) -> np.ndarray:
        """out of the first rows; nothing around it may be read or written."""
        x, _ = guarded(self.x[:, :rows])
        out, memory = guarded(self.before[:, :rows])
        linear.apply(x, out, accumulate=accumulate, workspace=workspace or Workspace(1, linear.backend))
        assert np.isnan(memory[:67]).all()
        assert np.isnan(memory[-67:]).all()
        return out

    def expected(self, weight_dtype: str, accumulate: bool) -> tuple[np.ndarray, np.ndarray]:
        """The result in float64, and what a value may be off by."""

        def operand(values: np.ndarray) -> np.ndarray:
            return torch.from_numpy(values).to(getattr(torch, weight_dtype)).double().numpy()

        x, weight = operand(self.x), operand(self.weight).transpose(0, 2, 1)
        result, size = x @ weight, np.abs(x) @ np.abs(weight)
        for term in (self.bias[:, None] if self.bias is not None else None, self.before if accumulate else None):
            if term is not None:
                result, size = result + term, size + np.abs(term)
        return result, ROUNDINGS * 2.0**-24 * size


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.astype(np.float32).tobytes() == b.astype(np.float32).tobytes()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("in_dim", DIMS)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_against_float64(backend: str, weight_dtype: str, in_dim: int, accumulate: bool) -> None:
    for i, out_dim in enumerate(DIMS):
        product = Product(out_dim, in_dim, bias=(i + accumulate) % 2 == 0)
        got = product.apply(product.linear(backend, weight_dtype), accumulate=accumulate)
        want, allowed = product.expected(weight_dtype, accumulate)
        assert (np.abs(got - want) <= allowed).all(), (out_dim, np.nanmax(np.abs(got - want) / allowed))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("out_dim", "in_dim"), [(127, 33), (33, 560), (560, 127), (1, 7)])
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_row_does_not_depend_on_how_many_there_are(
    backend: str, weight_dtype: str, out_dim: int, in_dim: int, accumulate: bool
) -> None:
    """Bit for bit: each sum runs over in_dim in one order, wherever its row lies in a tile."""
    product = Product(out_dim, in_dim, bias=accumulate)
    linear = product.linear(backend, weight_dtype)
    full = product.apply(linear, accumulate=accumulate)
    for rows in range(1, 71):
        assert same_bits(product.apply(linear, rows=rows, accumulate=accumulate), full[:, :rows]), rows


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_results_do_not_depend_on_threads_or_layers(backend: str, weight_dtype: str) -> None:
    product = Product(127, 384, bias=True, rows=70, layers=7)
    linear = product.linear(backend, weight_dtype)
    one = product.apply(linear, rows=70)
    workspace = Workspace(2, backend)
    for _ in range(3):
        assert same_bits(product.apply(linear, rows=70, workspace=workspace), one)
    for layer in range(7):
        alone = Linear(product.weight[layer:][:1], product.bias[layer:][:1], weight_dtype=weight_dtype, backend=backend)
        out = np.empty((1, 70, 127), np.float32)
        alone.apply(product.x[layer:][:1], out, workspace=workspace)
        assert same_bits(out[0], one[layer])


def test_no_rows_is_a_no_op() -> None:
    product = Product(7, 33, bias=True)
    assert product.apply(product.linear("cpu", "float32"), rows=0).shape == (LAYERS, 0, 7)


def test_weights_of_any_strides() -> None:
    product = Product(33, 127, bias=True)
    expected = product.apply(product.linear("cpu", "float32"))
    weight = np.full((LAYERS, 254, 33), np.nan, np.float32)[:, ::2].transpose(0, 2, 1)
    bias = np.full((33, LAYERS), np.nan, np.float32).T
    weight[...], bias[...] = product.weight, product.bias
    assert same_bits(product.apply(Linear(torch.from_numpy(weight), bias)), expected)


def test_attributes() -> None:
    product = Product(33, 127, bias=True)
    for backend in AVAILABLE:
        linear = product.linear(backend, "float32")
        assert linear.backend == backend
        assert linear.nbytes >= product.weight.nbytes + product.bias.nbytes
        assert product.linear(backend, "bfloat16").nbytes < 0.7 * linear.nbytes


# ---- what is refused -----------------------------------------------------------------------------------


def test_weights_that_are_wrong() -> None:
    weight, bias = np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.float32)

    def refused(match: str, weight: object = weight, bias: object = bias, **options: str) -> None:
        with pytest.raises(InvalidArgumentError, match=match):
            Linear(weight, bias, **options)

    refused("the weight is float16; it must be float32", weight=weight.astype(np.float16))
    refused("the weight has 2 dimensions; it must have 3", weight=weight[0])
    refused("the weight has num_layers 0; it must be 1 to 4096", weight=weight[:0], bias=None)
    refused("the weight has out_dim 0; it must be 1 to 1048576", weight=weight[:, :0], bias=None)
    refused("the weight has in_dim 0; it must be 1 to 1048576", weight=weight[:, :, :0])
    wide = np.broadcast_to(np.float32(1), (1, 1, 2**20 + 1))
    refused("the weight has in_dim 1048577", weight=wide, bias=None)
    refused("the bias is int32; it must be float32", bias=bias.astype(np.int32))
    refused("dimension 1 of the bias is 2; it must be 3", bias=bias[:, :2])
    refused("dimension 0 of the bias is 1; it must be 2", bias=bias[:1])
    for value in (np.nan, np.inf, -np.inf):
        bad = weight.copy()
        bad[1, 2, 3] = value
        refused(rf"the weight of layer 1 holds {value} at \[2, 3\]; weights must be finite", weight=bad)
        bad = bias.copy()
        bad[0, 1] = value
        refused(rf"the bias of layer 0 holds {value} at \[0, 1\]", bias=bad)
    refused("weight_dtype is 'float16'; it must be 'float32' or 'bfloat16'", weight_dtype="float16")
    with pytest.raises(UnsupportedError, match="backend 'cpu:mmx' is not available"):
        Linear(weight, bias, backend="cpu:mmx")
    with pytest.raises(TypeError, match="no __dlpack__"):
        Linear([[[1.0]]])


def test_operands_that_are_wrong() -> None:
    linear, workspace = Linear(np.ones((2, 3, 4), np.float32)), Workspace()
    x, out = np.ones((2, 5, 4), np.float32), np.ones((2, 5, 3), np.float32)

    def refused(match: str, x: object = x, out: object = out, workspace: Workspace = workspace) -> None:
        with pytest.raises(InvalidArgumentError, match=match):
            linear.apply(x, out, workspace=workspace)

    refused("x: its dtype .* is none of", x=x.astype(np.float64))
    refused("x is float16; it must be float32", x=x.astype(np.float16))
    refused("x has 2 dimensions; it must have 3", x=x[0])
    refused("dimension 0 of x is 1; it must be 2", x=x[:1])
    refused("dimension 2 of x is 3; it must be 4", x=x[..., :3])
    refused("dimension 1 of out is 4; it must be 5", out=out[:, :4])
    refused("dimension 2 of out is 2; it must be 3", out=out[..., :2])
    refused(r"x has strides \[1, 2, 10\]; it must be row-major", x=np.asfortranarray(x))
    refused("x has strides .* must be row-major", x=np.ones((2, 5, 8), np.float32)[..., :4])
    refused("x has strides .* must be row-major", x=np.ones((2, 6, 4), np.float32)[:, :5])
    refused("x has strides .* must be row-major", x=np.broadcast_to(x[:1], x.shape))
    refused("out has strides .* must be row-major", out=np.ones((2, 5, 6), np.float32)[..., ::2])
    refused("out has zero or overlapping strides", out=torch.ones(2, 1, 3).expand(2, 5, 3))
    frozen = out.copy()
    frozen.flags.writeable = False
    refused("out is read-only; pass a writable tensor", out=frozen)
    memory = np.ones(70, np.float32)
    shared = memory[:40].reshape(2, 5, 4)
    refused("x and out share memory", x=shared, out=memory[39:69].reshape(2, 5, 3))
    linear.apply(shared, memory[40:].reshape(2, 5, 3), workspace=workspace)  # neighbours
    if len(AVAILABLE) > 1:
        refused("the workspace is of another backend", workspace=Workspace(1, AVAILABLE[-1]))
    with pytest.raises(TypeError, match="needs the keyword argument workspace"):
        linear.apply(x, out)
    assert (out == 1).all()


def test_the_gil_is_released() -> None:
    product = Product(560, 560, bias=False, layers=24)
    linear = product.linear("cpu:scalar", "float32")
    ticks, done = 0, threading.Event()

    def work() -> None:
        product.apply(linear)
        done.set()

    thread = threading.Thread(target=work)
    sys.setswitchinterval(5)  # the interpreter itself will not switch: only a released GIL lets us count
    try:
        thread.start()
        while not done.is_set() and ticks < 10_000:
            time.sleep(0.001)
            ticks += 1
    finally:
        sys.setswitchinterval(0.005)
        thread.join()
    assert ticks > 20
