"""An oracle for whole generations: the Bottlenecked Transformer (arXiv 2505.16950) as a plain, slow loop.

Written from the paper's description alone and sharing no code with `bottlenecked`: nothing here imports it.
One sequence, greedy decoding, float32, a transformers `DynamicCache`, and the attention weights are those the
model itself computed (eager attention), kept for every token of the current step.

    prefill -> first token from its logits -> rewrite (the prompt is step 0) -> feed -> next token -> ...
           ... -> feed a line-ending token -> next token from its logits -> rewrite -> feed -> ...

A rewrite therefore runs after the KV of the line-ending token is written and before the next token is fed.
When nothing more is fed (end of text, length limit), there is nothing left to resume and no rewrite.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    newline_ids: Collection[int],
    input_ids: Tensor,
    max_new_tokens: int,
    eos: int | Collection[int] | None,
) -> tuple[list[int], list[dict[str, Any]]]:
    """Decode greedily, rewriting the KV cache after every step.

    model: float32, loaded with attn_implementation="eager".
    config: the checkpoint's config.json as a dict; boundary.timing must be "post".
    weights: the checkpoint's tensors by name, float32.
    newline_ids: the token ids that end a step; a step shorter than boundary.min_step_length goes on.
    input_ids: [1, n], int64, n >= 1. eos: the token id or ids that end the text.

    Returns the new token ids (an ending `eos` included) and one dict per rewrite: `begin`, `end` (the
    rewritten window [begin, end) in token positions), `recalled` (per layer, ascending positions) and
    `delta_norm` (per layer, the Euclidean norm of the gated edit over all selected rows).
    """
    boundary = config.get("boundary", {})
    assert boundary.get("timing", "post") == "post", "this loop knows only the timing 'post'"
    assert model.config._attn_implementation == "eager", "load the model with attn_implementation='eager'"
    assert model.dtype == torch.float32, "load the model in float32"
    assert input_ids.shape[0] == 1, "one sequence"
    assert input_ids.shape[1] >= 1, "a prompt"
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    newlines = set(newline_ids)
    min_step_length = boundary.get("min_step_length", 1)

    cache = DynamicCache(config=model.config)
    tokens: list[int] = []
    boundaries: list[dict[str, Any]] = []

    # attention[l][j]: the weights [H, T] of the step's j-th token in layer l over the positions in the cache.
    attention, logits = forward(model, cache, input_ids)
    length = input_ids.shape[1]
    step_begin = 0
    step_ended = bool(config["rewrite_prompt"])
    if not step_ended:
        step_begin, attention = length, [[] for _ in attention]

    while True:
        token = int(logits.argmax())
        tokens.append(token)
        if token in ends or len(tokens) == max_new_tokens:
            return tokens, boundaries
        if step_ended:
            boundaries.append(rewrite(model, config, weights, cache, attention, step_begin, length))
            step_begin, attention = length, [[] for _ in attention]
        new_attention, logits = forward(model, cache, torch.tensor([[token]]))
        for of_layer, new_of_layer in zip(attention, new_attention, strict=True):
            of_layer.extend(new_of_layer)
        length += 1
        step_ended = token in newlines and length - step_begin >= min_step_length


def forward(model: PreTrainedModel, cache: DynamicCache, input_ids: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """Feed input_ids [1, S]; return per layer S attention weights [H, T], and the last logits [V]."""
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, output_attentions=True)
    attention = [[a[0, :, j, :].clone() for j in range(input_ids.shape[1])] for a in output.attentions]
    return attention, output.logits[0, -1]


def rewrite(
    model: PreTrainedModel,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    cache: DynamicCache,
    attention: list[list[Tensor]],
    step_begin: int,
    step_end: int,
) -> dict[str, Any]:
    """Rewrite the cache in place for the step [step_begin, step_end); return its entry of the list."""
    begin = max(step_begin, step_end - config["recent_window"])
    window = list(range(begin, step_end))
    entry: dict[str, Any] = {"begin": begin, "end": step_end, "recalled": [], "delta_norm": []}
    for layer in range(config["num_layers"]):
        # alpha_i = 1 / (|J| H) * sum over heads h, window positions j of A[h, j, i], for i before the window
        alpha = torch.zeros(begin, dtype=torch.float64)
        for j in window:
            alpha += attention[layer][j - step_begin][:, :begin].double().sum(dim=0)
        alpha /= len(window) * config["num_query_heads"]
        k = min(config["top_k"], begin)
        # A stable sort: of two equal masses the smaller position comes first.
        recalled = sorted(torch.sort(alpha, descending=True, stable=True).indices[:k].tolist())
        rows = torch.tensor(recalled + window)

        keys, values = cache.layers[layer].keys, cache.layers[layer].values  # [1, H_kv, T, d]
        old_k = keys[0, :, rows, :].transpose(0, 1)  # [rows, H_kv, d]
        old_v = values[0, :, rows, :].transpose(0, 1)
        seen_k = old_k
        if config["key_space"] == "unrotated":
            cos, sin = rotary_tables(model, rows)
            seen_k = rotate(old_k, cos, -sin)
        x = torch.cat([seen_k.flatten(1), old_v.flatten(1)], dim=1)  # [rows, C]
        edit = torch.sigmoid(weights[f"layers.{layer}.gate"]) * delta(config, weights, layer, x)
        edit_k, edit_v = (half.reshape(old_k.shape) for half in edit.chunk(2, dim=1))
        if config["key_space"] == "unrotated":
            edit_k = rotate(edit_k, cos, sin)
        keys[0, :, rows, :] = (old_k + edit_k).transpose(0, 1)
        values[0, :, rows, :] = (old_v + edit_v).transpose(0, 1)

        entry["recalled"].append(recalled)
        entry["delta_norm"].append(float(edit.double().norm()))
    return entry


def delta(config: dict[str, Any], weights: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """The Processor of one layer: x [rows, C] -> the edit before its gate [rows, C]."""

    def linear(name: str, y: Tensor) -> Tensor:
        z = y @ weights[f"layers.{layer}.{name}.weight"].T
        bias = weights.get(f"layers.{layer}.{name}.bias")
        return z if bias is None else z + bias

    def norm(name: str, y: Tensor) -> Tensor:
        rms = y / torch.sqrt((y * y).mean(dim=-1, keepdim=True) + config["norm_eps"])
        return rms * weights[f"layers.{layer}.{name}.weight"]

    u = linear("in_proj", norm("input_norm", x))
    y = norm("attn_norm", u)
    q, k, v = linear("q_proj", y), linear("k_proj", y), linear("v_proj", y)
    head_dim = config["processor_dim"] // config["processor_heads"]
    heads = []
    for h in range(config["processor_heads"]):
        part = slice(h * head_dim, (h + 1) * head_dim)
        scores = q[:, part] @ k[:, part].T / head_dim**0.5
        heads.append(torch.softmax(scores, dim=-1) @ v[:, part])
    u = u + linear("o_proj", torch.cat(heads, dim=-1))
    z = norm("mlp_norm", u)
    gate = linear("gate_proj", z)
    u = u + linear("down_proj", gate * torch.sigmoid(gate) * linear("up_proj", z))
    return linear("out_proj", u)


def rotary_tables(model: PreTrainedModel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's own cosines and sines at positions [n]: two tensors [n, 1, d]."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])
    return cos[0, :, None, :], sin[0, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [n, heads, d], pairing element i with i + d/2; a negated sine undoes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
