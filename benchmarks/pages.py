"""A setting's caches once more, as vLLM keeps them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import bottleneck_ext
from benchmarks import checks
from benchmarks.inputs import SEED, Inputs
from bottlenecked.integrations.vllm.layout import key_value_views
from bottlenecked.integrations.vllm.scheduler import pages_per_row
from bottlenecked.processor import BoundCache


class Pages:
    """The caches of `inputs` once more, in vLLM's layout. Blocks of all sequences are dealt at random, as they are
    after some hours of serving; queries are in pages of the same size.

    keys, values: per layer [num_blocks, block, num_kv_heads, head_dim], views of one allocation. block_table: int32
    [batch, blocks of a sequence].

    block: tokens of a block. columns: a block of a head is keys [head_dim, block], then values [block, head_dim], as
    vLLM's CPU attention keeps it; else its order is token, head, key, value, as on GPUs.
    """

    def __init__(self, inputs: Inputs, block: int, *, columns: bool = False) -> None:
        self.inputs, config, setting = inputs, inputs.config, inputs.setting
        self.block = block
        device, dtype = inputs.keys[0].device, inputs.keys[0].dtype
        rng = np.random.default_rng(SEED)
        blocks = -(-(setting.prior + setting.step) // block)
        self.block_table = rng.permutation(setting.batch * blocks).astype(np.int32).reshape(setting.batch, blocks)
        size, dim = (config.num_layers, setting.batch * blocks), config.head_dim
        if columns:
            pool = torch.zeros(*size, config.num_kv_heads, block, 2 * dim, dtype=dtype, device=device)
            views = [key_value_views("pages", SimpleNamespace(isa="vec"), layer, block) for layer in pool]
            self.keys, self.values = [keys for keys, _ in views], [values for _, values in views]
        else:
            pool = torch.zeros(*size, block, config.num_kv_heads, 2 * dim, dtype=dtype, device=device)
            self.keys, self.values = list(pool[..., :dim].unbind()), list(pool[..., dim:].unbind())
        self._blocks = torch.from_numpy(self.block_table).long().to(device)
        self.restore()

        pages = pages_per_row(config.recent_window, block)
        order = rng.permutation(setting.batch * pages).astype(np.int32)
        self.query_table = order.reshape(setting.batch, pages)
        heads = config.num_query_heads
        self.queries = torch.zeros(
            config.num_layers, setting.batch * pages, block, heads, config.head_dim, dtype=dtype, device=device
        )
        end = setting.prior + setting.step
        window = np.arange(end - setting.step, end)
        table = torch.from_numpy(self.query_table).long().to(device)
        at, row = (torch.from_numpy(x).to(device) for x in (window // block % pages, window % block))
        ring = torch.from_numpy(window % config.recent_window).to(device)
        for layer in range(config.num_layers):
            self.queries[layer][table[:, at], row] = inputs.queries[layer][:, ring]

    def restore(self) -> None:
        """The caches as they were before any rewrite."""
        for layer, (keys, values) in enumerate(
            zip(self.inputs.pristine_keys, self.inputs.pristine_values, strict=True)
        ):
            for pool, contiguous in ((self.keys[layer], keys), (self.values[layer], values)):
                tokens = contiguous.transpose(1, 2)
                padding = self._blocks.shape[1] * self.block - tokens.shape[1]
                padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, padding))
                pool[self._blocks.flatten()] = padded.reshape(-1, self.block, *padded.shape[2:])

    def contiguous(self, layers: list[Tensor]) -> list[Tensor]:
        """Per layer as the inputs' are: [batch, num_kv_heads, tokens, head_dim]."""
        end = self.inputs.setting.prior + self.inputs.setting.step
        return [layer[self._blocks].flatten(1, 2)[:, :end].transpose(1, 2) for layer in layers]

    def bind(self, workspace: bottleneck_ext.Workspace) -> BoundCache:
        """Our Processor on these caches."""
        return self.inputs.processor.bind(
            self.keys, self.values, self.queries.unbind(), workspace=workspace, query_table=self.query_table
        )


def check(pages: Pages, bound: BoundCache, plain: BoundCache) -> None:
    """Both layouts recall the same positions and hold the same afterwards, bit for bit."""
    inputs, setting = pages.inputs, pages.inputs.setting
    recalled = bound.rewrite(inputs.events, pages.block_table).recalled
    expected = plain.rewrite(inputs.events).recalled
    if not np.array_equal(recalled, expected):
        checks.refuse(setting, "on vLLM's layout other positions are recalled than on transformers'")
    for name, got, want in (
        ("keys", pages.contiguous(pages.keys), inputs.keys),
        ("values", pages.contiguous(pages.values), inputs.values),
    ):
        if not all(map(torch.equal, got, want)):
            checks.refuse(setting, f"{name} rewritten in vLLM's layout are not those rewritten in transformers'")
    if all(map(torch.equal, inputs.keys, inputs.pristine_keys)):
        checks.refuse(setting, "nothing was rewritten")
    pages.restore()
    inputs.restore()
