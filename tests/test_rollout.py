"""The efficient roll-out against the literal procedure, finite differences, and what runs at inference."""

from __future__ import annotations

import collections
import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402

from bottlenecked import CacheProcessor  # noqa: E402
from bottlenecked.boundary import BoundaryDetector  # noqa: E402
from bottlenecked.config import BoundaryConfig  # noqa: E402
from bottlenecked.integrations.transformers import attach  # noqa: E402
from bottlenecked.module import CacheProcessorModule  # noqa: E402
from bottlenecked.training import frozen, packed  # noqa: E402
from bottlenecked.training.data import Example  # noqa: E402
from bottlenecked.training.decoder import Decoder, Layer  # noqa: E402
from bottlenecked.training.packed import PackedBackbone, Stretch  # noqa: E402
from bottlenecked.training.rollout import Variant, count_targets, rollout, supervised  # noqa: E402
from tests import literal_training, tiny  # noqa: E402


def example(prompt: int, steps: list[int], seed: int = 0, forced: float = 0.2, timing: str = "post") -> Example:
    """Random tokens: a prompt and steps of these lengths, each but the last ending with a newline."""
    rng = np.random.default_rng([seed, prompt, *steps])
    words = [i for i in range(tiny.VOCABULARY - 4) if i not in tiny.NEWLINES]
    tokens = list(rng.choice(words, prompt))
    for n, length in enumerate(steps):
        tokens += list(rng.choice(words, length - 1))
        tokens.append(tiny.EOS if n == len(steps) - 1 else rng.choice(tiny.NEWLINES))
    config = BoundaryConfig(rule="token_ids", token_ids=tiny.NEWLINES, timing=timing)
    detector = BoundaryDetector(config)
    detector.start(0)
    detector.prompt(0, prompt)
    ends = [e.step_end for t in tokens[prompt:] if (e := detector.decode(0, int(t))) is not None]
    begins = [0, *ends]
    segments = tuple(zip(begins, [*ends, len(tokens)], strict=True))
    mask = [False] * prompt + [bool(rng.random() > forced) for _ in tokens[prompt:]]
    return Example(tuple(int(t) for t in tokens), segments, tuple(mask), f"made:{seed}")


# Prompts longer and shorter than the window of 8, steps longer than it, a last step of the end of text alone.
RAGGED = [
    example(5, [3, 4], 1),
    example(19, [12, 2, 5, 1], 2),
    example(9, [30], 3),
    example(1, [1, 1, 1, 9, 10], 4),
]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A float64 Llama. transformers' norm is float32 whatever the model's dtype: here it is not."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model = tiny.model(torch.float64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def module(random_scale: float = 0.3, **changes: Any) -> CacheProcessorModule:
    """A Processor that has left its initial state in every tensor."""
    config = tiny.config(**changes)
    rng = np.random.default_rng(3)
    made = CacheProcessorModule(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(parameter.shape))
            parameter.add_(noise * (random_scale if "norm" not in name else 0.1))
    return made


def literal_gradients(
    model: Any, made: CacheProcessorModule, batch: list[Example], **options: Any
) -> tuple[dict[str, torch.Tensor], float]:
    weights = {n: t.detach().double().clone().requires_grad_() for n, t in made.state_dict().items()}
    total = 0.0
    for of in batch:
        for loss in literal_training.losses(
            model, made.config, weights, of.tokens, of.segments, of.loss_mask, **options
        )[0]:
            total += loss.item()
            if loss.requires_grad:
                (loss / count_targets(batch)).backward()
    return {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}, total


def gradients(made: CacheProcessorModule) -> dict[str, torch.Tensor]:
    """By checkpoint name."""
    stacked = CacheProcessorModule(made.config).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            stacked.get_parameter(name).copy_(grad)
    return stacked.state_dict()


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, wanted in expected.items():
        # A bias of the keys shifts all scores alike: its gradient is zero but for rounding.
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert float((got[name] - wanted).norm()) <= tolerance * float(scale), name
        assert scale > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 0},
        {"top_k": 1000},
        {"recent_window": 256},
        {"recent_window": 1},
        {"rewrite_prompt": False},
        {"key_space": "unrotated", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
    ids=str,
)
def test_gradients_equal_the_literal_procedure(double: Any, changes: dict[str, Any]) -> None:
    made = module(**changes).double()
    losses = rollout(PackedBackbone(double), made, RAGGED, denominator=count_targets(RAGGED))
    expected, total = literal_gradients(double, made, RAGGED)
    assert float(losses.sums.sum()) == pytest.approx(total, rel=1e-12)
    assert int(losses.counts.sum()) == count_targets(RAGGED)
    # The target of the project; what is left is rounding, some 1e-13.
    assert_close(gradients(made), expected, 1e-9)
    assert all(parameter.grad is None for parameter in double.parameters())


@contextlib.contextmanager
def fused_norms() -> Iterator[None]:
    """On this CPU, the two operations that norms are on a GPU, by their definition."""

    def forward(x: Any, shape: Any, weight: Any, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return x * inverse * (1 if weight is None else weight), inverse

    def backward(
        gradient: Any, x: Any, shape: Any, inverse: Any, weight: Any, wanted: list[bool]
    ) -> tuple[torch.Tensor, None]:
        assert wanted[0]
        of_unit, unit = gradient * (1 if weight is None else weight), x * inverse
        return inverse * (of_unit - unit * (of_unit * unit).mean(-1, keepdim=True)), None

    frozen._has_fused_norm.cache_clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", forward, "CPU")
        library.impl("_fused_rms_norm_backward", backward, "CPU")
        try:
            yield
        finally:
            frozen._has_fused_norm.cache_clear()


class _Products(TorchDispatchMode):
    """Operations by name that multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func._overloadpacket.__name__:
            self.seen.add(func._overloadpacket)
        return func(*args, **(kwargs or {}))


def test_every_product_is_counted(double: Any) -> None:
    """By torch's FlopCounterMode, with which experiments give every variant as much compute."""
    with _Products() as products:
        rollout(PackedBackbone(double), module().double(), RAGGED, denominator=1.0)
    assert products.seen >= {torch.ops.aten.mm, torch.ops.aten.addmm}
    assert products.seen <= set(flop_registry)


@pytest.mark.parametrize("way", ["autograd", "own code", "fused norms", "heads together"])
def test_gradients_are_the_same_whatever_the_way_through_the_backbone(
    double: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of weights that are trained, a model's own code, and what frozen layers do on other devices."""
    backbone, made = PackedBackbone(double), module().double()
    with contextlib.ExitStack() as stack:
        if way == "autograd":
            monkeypatch.setattr(Decoder, "frozen_layers", lambda self: None)
        elif way == "own code":
            double.model.layers[0].register_forward_hook(lambda *_: None)
        elif way == "fused norms":
            stack.enter_context(fused_norms())
        else:
            attention = torch.nn.functional.scaled_dot_product_attention

            def together(*arguments: Any, **options: Any) -> torch.Tensor:
                return attention(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", together)
        layers = backbone.layers()
        assert (None if layers is None else type(layers[0])) == {"autograd": Layer, "own code": None}.get(
            way, frozen.FrozenLayer
        )
        if way in ("fused norms", "heads together"):
            assert frozen._has_fused_norm(double.device, torch.float64) == (way == "fused norms")
        rollout(backbone, made, RAGGED, denominator=count_targets(RAGGED))
    assert_close(gradients(made), literal_gradients(double, made, RAGGED)[0], 1e-9)
    assert all(parameter.grad is None for parameter in double.parameters())


def test_what_is_found_out_in_inference_mode_serves_training_too(double: Any) -> None:
    frozen._has_fused_norm.cache_clear()
    frozen._scalar.cache_clear()
    backbone, made, stretch = PackedBackbone(double), module().double(), Stretch([[3, 1, 4]], [0], [[2]])
    with torch.inference_mode():
        found = backbone.forward(stretch).logits.numpy()
    np.testing.assert_array_equal(found, backbone.forward(stretch).logits.numpy())
    rollout(backbone, made, RAGGED, denominator=count_targets(RAGGED))
    assert_close(gradients(made), literal_gradients(double, made, RAGGED)[0], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_frozen_layers_are_those_of_autograd(dtype: torch.dtype) -> None:
    """With biases, and in the dtypes of training; the last layer is of weights that autograd could train."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**tiny.SHAPE | {"initializer_range": 0.1})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    found = []
    for trained in (False, True):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained and "layers.2" in name)
        backbone, made = PackedBackbone(model), module(top_k=1000)  # no choice that roundings could turn
        layers = backbone.layers()
        assert layers is not None
        assert isinstance(layers[0], Layer if trained else frozen.FrozenLayer)
        losses = rollout(backbone, made, RAGGED, denominator=count_targets(RAGGED))
        found.append((float(losses.sums.sum()), gradients(made)))
    (loss, got), (other_loss, expected) = found
    if dtype is torch.float32:
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert_close(got, expected, 1e-4)
    else:  # of single numbers, such as a gate's, roundings leave little
        assert loss == pytest.approx(other_loss, rel=1e-2)
        one, other = (torch.cat([of[name].flatten() for name in expected]) for of in (got, expected))
        assert float((one - other).norm()) <= 0.1 * float(other.norm())


class _Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_operations_are_few() -> None:
    """A GPU waits for the host, which issues them one by one: their number is what a step of training takes there."""
    batch = [example(19, [12, 2, 5, 1], 2), example(6, [3, 14, 9, 4], 5)]

    def count(layers: int) -> int:
        backbone = PackedBackbone(tiny.model(num_hidden_layers=layers).requires_grad_(False))
        made = module(num_layers=layers)
        rollout(backbone, made, batch, denominator=1.0)  # what is made once
        with _Counter() as counter:
            rollout(backbone, made, batch, denominator=1.0)
        return sum(counter.counts.values())

    with fused_norms():
        few, many = count(2), count(6)
    # What a layer takes in the forwards of a prompt and of four steps, and in the backward passes of these.
    assert many - few <= 4 * 215
    assert few <= 1580


@pytest.mark.parametrize("way", ["frozen", "autograd", "own code"])
def test_nothing_of_a_step_outlives_it(double: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A circle through autograd's nodes is one that no garbage collector finds: a run would grow by a cache a step."""
    backbone, made = PackedBackbone(double), module().double()
    if way == "autograd":
        monkeypatch.setattr(Decoder, "frozen_layers", lambda self: None)
    elif way == "own code":
        double.model.layers[0].register_forward_hook(lambda *_: None)
    alive: list[Any] = []

    def watch(kind: type) -> None:
        begin = kind.__init__  # type: ignore[misc]

        def __init__(self: Any, *arguments: Any, **options: Any) -> None:
            alive.append(weakref.ref(self))
            begin(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", __init__)

    for kind in (packed.Pass, packed.Cache):
        watch(kind)
    rollout(backbone, made, RAGGED, denominator=1.0)
    assert len(alive) > 4
    gc.collect()
    assert not [of() for of in alive if of() is not None]


def test_gradients_with_timing_pre(double: Any) -> None:
    batch = [example(7, [5, 9, 4], 1, timing="pre"), example(12, [6, 3], 2, timing="pre")]
    assert batch[0].segments[1] == (7, 11)  # the newline at 11 begins the next step
    made = module(boundary={"timing": "pre"}).double()
    rollout(PackedBackbone(double), made, batch, denominator=count_targets(batch))
    assert_close(gradients(made), literal_gradients(double, made, batch)[0], 1e-9)


def test_a_batch_is_the_sum_of_its_sequences(double: Any) -> None:
    made, backbone = module().double(), PackedBackbone(double)
    together = rollout(backbone, made, RAGGED, denominator=7.0)
    batched = gradients(made)
    made.zero_grad()
    for i, one in enumerate(RAGGED):
        alone = rollout(backbone, made, [one], denominator=7.0)
        torch.testing.assert_close(alone.sums[0], together.sums[i], rtol=1e-12, atol=0)
    assert_close(gradients(made), batched, 1e-11)


def test_finite_differences(double: Any) -> None:
    """One call: its loss is the whole loss but for constants, and the derivative along a direction is exact."""
    made, backbone = module(top_k=5, recent_window=4).double(), PackedBackbone(double)
    batch = [example(14, [9], 1), example(22, [6], 2)]

    def total() -> float:
        return float(rollout(backbone, made, batch).sums.sum())

    rollout(backbone, made, batch, denominator=1.0)
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for name, parameter in made.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None
        expected = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += step * direction
            above = total()
            parameter -= 2 * step * direction
            below = total()
            parameter += step * direction
        # The remainder is of the order of step squared; sums of some ten nats keep 14 digits.
        assert (above - below) / (2 * step) == pytest.approx(expected, abs=1e-6 * (1 + abs(expected))), name
        assert abs(expected) > 1e-6 or name == "k_proj_bias"


def test_identity_is_plain_cross_entropy(double: Any) -> None:
    made, backbone = CacheProcessorModule(tiny.config()).double(), PackedBackbone(double)
    plain = supervised(backbone, RAGGED)
    same = rollout(backbone, made, RAGGED)
    torch.testing.assert_close(same.sums, plain.sums, rtol=1e-12, atol=0)
    assert torch.equal(same.counts, plain.counts)
    first = sum(e.loss_mask[begin] for e in RAGGED for begin, _ in e.segments[1:])
    assert int(plain.counts[:, 0].sum()) == first


def test_supervised_gradients_are_those_of_transformers() -> None:
    model = tiny.model(torch.float32)
    supervised(PackedBackbone(model), RAGGED, denominator=count_targets(RAGGED))
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for one in RAGGED:
        logits = model(input_ids=torch.tensor([one.tokens])).logits[0, :-1]
        wanted = torch.tensor(one.loss_mask[1:])
        targets = torch.tensor(one.tokens[1:])[wanted]
        loss = torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="sum")
        (loss / count_targets(RAGGED)).backward()
    for name, parameter in model.named_parameters():
        # Sums over some hundred tokens and features, in another order.
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=2e-5 * float(parameter.grad.abs().max()))


class _Script(tiny.Script):
    """Leaves the model's own logits alone."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids, scores.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"key_space": "unrotated", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}],
    ids=["rotated", "unrotated"],
)
@pytest.mark.parametrize("timing", ["post", "pre"])
def test_logits_are_those_of_inference(dtype: torch.dtype, changes: dict[str, Any], timing: str) -> None:
    """Teacher-forced logits of the training graph against the transformers integration on the same tokens."""
    batch = [example(19, [12, 2, 5, 4], 2, 0.0, timing), example(6, [3, 14], 5, 0.0, timing)]
    made = module(**changes, boundary={"timing": timing})
    model = tiny.model(dtype, initializer_range=0.1)
    model.model.rotary_emb.inv_freq = tiny.model().model.rotary_emb.inv_freq  # as from_pretrained leaves it
    collected: list[tuple[int, int, torch.Tensor]] = []
    rollout(PackedBackbone(model), made, batch, logits=collected)
    got = {(i, target): row.float() for i, target, row in collected}
    weights = {name: tensor.numpy() for name, tensor in made.state_dict().items()}
    processor = CacheProcessor(made.config, weights, weight_dtype="float32")
    edits = 0
    for i, one in enumerate(batch):
        prompt = one.segments[0][1]
        answer = list(one.tokens[prompt:])
        with attach(model, processor, tiny.tokenizer()) as attachment:
            made_text = model.generate(
                torch.tensor([one.tokens[:prompt]]),
                max_new_tokens=len(answer),
                do_sample=False,
                logits_processor=[_Script(answer)],
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert made_text.sequences[0].tolist() == list(one.tokens)
        edits += attachment.stats.boundaries
        assert attachment.stats.boundaries == len(one.segments) - 1
        expected = torch.stack([row[0].float() for row in made_text.logits])
        found = torch.stack([got[i, prompt + j] for j in range(len(answer))])
        # Three layers and a rewrite deep: some hundred roundings of the largest logit.
        tolerance = (256 if dtype is torch.float32 else 16) * torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= tolerance
        with torch.no_grad():
            stock = model(input_ids=torch.tensor([one.tokens])).logits[0, prompt - 1 : -1].float()
        assert float((stock - expected).abs().max()) > 4 * tolerance  # the Processor matters
    assert edits


def test_only_recalled_rows_are_written(double: Any) -> None:
    made = module().double()

    def keep_recalled(layer: int, delta: torch.Tensor, recalled: int) -> torch.Tensor:
        return torch.cat([delta[:recalled], torch.zeros_like(delta[recalled:])])

    rollout(PackedBackbone(double), made, RAGGED, denominator=count_targets(RAGGED), variant=Variant(write="recalled"))
    assert_close(gradients(made), literal_gradients(double, made, RAGGED, edit=keep_recalled)[0], 1e-9)


def test_random_positions(double: Any) -> None:
    made, backbone = module(top_k=3, recent_window=4).double(), PackedBackbone(double)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(float(rollout(backbone, made, RAGGED, variant=Variant(selection="random")).sums.sum()))
    assert results[0] == results[1] != results[2]
    by_mass = float(rollout(backbone, made, RAGGED).sums.sum())
    assert by_mass not in results
    # Where everything is recalled there is nothing to choose.
    made = module(top_k=1000).double()
    every = rollout(backbone, made, RAGGED, variant=Variant(selection="random")).sums
    torch.testing.assert_close(every, rollout(backbone, made, RAGGED).sums, rtol=1e-12, atol=0)


def test_positions_matter_only_as_differences(double: Any) -> None:
    made, backbone = module().double(), PackedBackbone(double)
    with_positions = rollout(backbone, made, RAGGED, variant=Variant(positions=True)).sums
    assert not torch.allclose(with_positions, rollout(backbone, made, RAGGED).sums)
    x = torch.randn(3, 4, made.config.kv_width, dtype=torch.float64)
    where = torch.tensor([[2, 5, 6, 9]]).expand(3, -1)
    torch.testing.assert_close(made(x, None, where), made(x, None, where + 7), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(made(x, None, where), made(x))
    torch.testing.assert_close(made(x, None, 0 * where), made(x))


@pytest.mark.parametrize("kind", ["qwen3", "llama_mha"])
def test_other_backbones(kind: str) -> None:
    """A model with normed queries and a head size of its own, and one without grouped queries."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if kind == "qwen3":
        shape = {**tiny.SHAPE, "head_dim": 24}
        model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
        changes: dict[str, Any] = {"head_dim": 24}
    else:
        model, changes = tiny.model(num_key_value_heads=4), {"num_kv_heads": 4}
    backbone = PackedBackbone(model)
    made = module(**changes)
    identity = CacheProcessorModule(made.config)
    plain = torch.zeros(len(RAGGED))
    for i, one in enumerate(RAGGED):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.tokens])).logits[0, :-1]
        wanted = torch.tensor(one.loss_mask[1:])
        targets = torch.tensor(one.tokens[1:])[wanted]
        plain[i] = torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="sum")
    torch.testing.assert_close(rollout(backbone, identity, RAGGED).sums.sum(1).float(), plain, rtol=1e-4, atol=0)
    assert not torch.allclose(rollout(backbone, made, RAGGED).sums.sum(1).float(), plain, rtol=1e-2)


def test_layers_are_written_down_once_more_only_where_they_compute_the_same() -> None:
    """What decoder.py does not know must be seen by trying, whatever the class is called."""
    stretch = Stretch([[3, 1, 4, 1, 5], [9, 2, 6]], [0, 0], [range(5), range(3)])
    for dtype in (torch.float32, torch.bfloat16):
        assert PackedBackbone(tiny.model(dtype)).layers() is not None

    model = tiny.model()
    expected = torch.cat([model(input_ids=torch.tensor([tokens])).logits[0] for tokens in stretch.tokens])
    torch.testing.assert_close(PackedBackbone(model).forward(stretch).logits, expected, rtol=1e-4, atol=1e-4)

    def doubled(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return 2 * output

    # A hook on a part of one layer, another norm, another activation: all classes stay what they were.
    for change in ("hook", "norm", "activation"):
        model = tiny.model()
        layer = model.model.layers[1]
        if change == "hook":
            layer.mlp.register_forward_hook(doubled)
        elif change == "norm":
            layer.input_layernorm.forward = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])
        else:
            layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x))
        backbone = PackedBackbone(model)
        assert backbone.layers() is None, change
        own = torch.cat([model(input_ids=torch.tensor([tokens])).logits[0] for tokens in stretch.tokens])
        torch.testing.assert_close(backbone.forward(stretch).logits, own, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    rollout(PackedBackbone(model), module(), RAGGED)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(IndexError):
        PackedBackbone(model).forward(Stretch([[10**6]], [0], [[0]]))
    assert model.config._attn_implementation == "sdpa"


def test_unsupported_backbones_are_named() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11}
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel"):
        PackedBackbone(GPT2LMHeadModel(GPT2Config(**small)))
    shape = {**tiny.SHAPE, "head_dim": 16}
    with pytest.raises(NotImplementedError, match="Gemma2ForCausalLM"):
        PackedBackbone(Gemma2ForCausalLM(Gemma2Config(**shape)))
