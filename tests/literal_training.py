"""An oracle for training: the paper's procedure (arXiv 2505.16950), one sequence and one step at a time.

Float64 throughout, attention weights as matrices, every layer by itself, no padding, no batching. It shares no code
with `bottlenecked.training` nor with `bottlenecked.module`; the Llama below is written out from its weights.

    for each step: run it, rewrite the cache at its end, cross-entropy of the next step given the rewritten cache;
    gradients reach the Processor only and are cut at every step's end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, [positions, H_kv, d]


def losses(
    model: Any,
    config: Any,
    weights: dict[str, Tensor],
    tokens: Sequence[int],
    segments: Sequence[tuple[int, int]],
    loss_mask: Sequence[bool],
    *,
    edit: Callable[[int, Tensor, int], Tensor] | None = None,
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The loss of every forward, summed over its tokens, and the logits by the token they predict.

    model: a float64 LlamaForCausalLM. config: of the Processor. weights: its tensors by checkpoint name, float64.
    edit: (layer, the gated edits [rows, C], number of recalled rows) -> the edits to write; default: all of them.

    The losses are separate graphs: each one's gradient is that of one call of the Processor, given the cache before it.
    """
    last = len(tokens) - 1  # never fed
    cache: Cache = [(torch.zeros(0), torch.zeros(0)) for _ in model.model.layers]
    attention: list[Tensor] = []
    found: list[Tensor] = []
    predicted: dict[int, Tensor] = {}
    for n, (begin, end) in enumerate(segments):
        if begin == last:
            break
        if n > 1 or (n == 1 and config.rewrite_prompt):
            cache = rewrite(model, config, weights, cache, attention, *segments[n - 1], edit)
        logits, cache, attention = feed(model, cache, tokens[begin : min(end, last)], begin)
        of_step = torch.zeros((), dtype=torch.float64)
        for i in range(begin, min(end, last)):
            if loss_mask[i + 1]:
                predicted[i + 1] = logits[i - begin].detach()
                of_step = of_step - torch.log_softmax(logits[i - begin], 0)[tokens[i + 1]]
        found.append(of_step)
        cache = [(k.detach(), v.detach()) for k, v in cache]
    return found, predicted


def feed(model: Any, cache: Cache, tokens: Sequence[int], begin: int) -> tuple[Tensor, Cache, list[Tensor]]:
    """A Llama: logits [tokens, vocabulary], the longer cache, attention weights [H, tokens, positions] per layer."""
    shape = model.config
    x = model.model.embed_tokens.weight[torch.tensor(tokens)]
    cos, sin = model.model.rotary_emb(x, torch.arange(begin, begin + len(tokens))[None])
    cos, sin = cos[0][:, None], sin[0][:, None]
    longer: Cache = []
    attention: list[Tensor] = []
    for layer, (old_k, old_v) in zip(model.model.layers, cache, strict=True):
        y, of = norm(x, layer.input_layernorm), layer.self_attn
        q, k, v = ((y @ p.weight.T).view(len(tokens), -1, of.head_dim) for p in (of.q_proj, of.k_proj, of.v_proj))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if len(old_k):
            k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
        longer.append((k, v))
        heads, group = [], shape.num_attention_heads // shape.num_key_value_heads
        outputs = []
        for h in range(shape.num_attention_heads):
            scores = q[:, h] @ k[:, h // group].T / math.sqrt(of.head_dim)
            hidden = torch.arange(len(k))[None] > begin + torch.arange(len(tokens))[:, None]
            heads.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1))
            outputs.append(heads[-1] @ v[:, h // group])
        attention.append(torch.stack(heads).detach())
        x = x + torch.cat(outputs, -1) @ of.o_proj.weight.T
        z, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        gate = z @ mlp.gate_proj.weight.T
        x = x + (gate * torch.sigmoid(gate) * (z @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(x, model.model.norm) @ model.lm_head.weight.T, longer, attention


def rewrite(
    model: Any,
    config: Any,
    weights: dict[str, Tensor],
    cache: Cache,
    attention: list[Tensor],
    begin: int,
    end: int,
    edit: Callable[[int, Tensor, int], Tensor] | None,
) -> Cache:
    """The cache after the step [begin, end), whose attention weights are given."""
    window = list(range(max(begin, end - config.recent_window), end))
    rewritten: Cache = []
    for layer, (keys, values) in enumerate(cache):
        # alpha_i = 1 / (|J| H) * sum over heads h, window positions j of A[h, j, i]
        of_window = attention[layer][:, [j - begin for j in window], : window[0]]
        alpha = of_window.sum((0, 1)) / (len(window) * config.num_query_heads)
        k = min(config.top_k, window[0])
        recalled = sorted(torch.sort(alpha, descending=True, stable=True).indices[:k].tolist())
        rows = torch.tensor(recalled + window)
        seen = keys[rows]
        if config.key_space == "unrotated":
            # float32 angles, as in a backbone
            angles = torch.outer(rows.float(), torch.tensor(config.inv_freq())).double().repeat(1, 2)[:, None]
            cos, sin = angles.cos(), angles.sin()
            seen = turn(seen, cos, -sin)
        x = torch.cat([seen.flatten(1), values[rows].flatten(1)], 1)
        delta = processor(config, weights, layer, x)
        if edit is not None:
            delta = edit(layer, delta, len(recalled))
        delta_k, delta_v = (half.view(seen.shape) for half in delta.chunk(2, 1))
        if config.key_space == "unrotated":
            delta_k = turn(delta_k, cos, sin)
        rewritten.append((keys.index_add(0, rows, delta_k), values.index_add(0, rows, delta_v)))
    return rewritten


def processor(config: Any, weights: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """x [rows, C] -> the gated edits [rows, C]."""

    def get(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}"]

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ get(f"{name}.weight").T + get(f"{name}.bias")

    def rms(name: str, y: Tensor) -> Tensor:
        return y / torch.sqrt((y * y).mean(-1, keepdim=True) + config.norm_eps) * get(f"{name}.weight")

    u = linear("in_proj", rms("input_norm", x))
    y = rms("attn_norm", u)
    q, k, v = linear("q_proj", y), linear("k_proj", y), linear("v_proj", y)
    size = config.processor_dim // config.processor_heads
    heads = []
    for h in range(config.processor_heads):
        part = slice(h * size, (h + 1) * size)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), -1) @ v[:, part])
    u = u + linear("o_proj", torch.cat(heads, -1))
    z = rms("mlp_norm", u)
    gate = z @ get("gate_proj.weight").T
    u = u + (gate * torch.sigmoid(gate) * (z @ get("up_proj.weight").T)) @ get("down_proj.weight").T
    return torch.sigmoid(get("gate")) * linear("out_proj", u)


def norm(x: Tensor, module: Any) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [n, heads, d], pairing element i with i + d/2; a negated sine undoes it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
