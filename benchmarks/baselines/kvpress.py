"""Scores of cache positions by kvpress (github.com/NVIDIA/kvpress): selection alone, nothing is rewritten.

Its `SnapKVPress.score` rates prior positions by the attention of the last queries, as a Processor's selection does. It
recomputes those queries from hidden states; here the captured queries are handed to it as hidden states of an attention
module whose projection is the identity, with a rotation by zero, so that both do the same work on the same queries and
keys. Its smoothing over neighbouring positions is off (`kernel_size=1`), and nothing is evicted. Then the mean of its
scores over the KV heads is our attention mass, rounded where kvpress rounds: it keeps weights in the cache's dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bottlenecked.boundary import BoundaryEvent
from bottlenecked.config import CacheProcessorConfig

from .window import Window

INSTALL = "pip install --no-deps kvpress==0.5.5 && pip install 'cachetools<6' 'fire<0.7' datasets"


def load() -> Any:
    """The module kvpress, without what its import does to the attention functions of transformers.

    Raises ImportError where kvpress or something it needs is missing.
    """
    # kvpress wraps every attention function of transformers when it is imported; scoring needs none of that.
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        raise ImportError(f"kvpress cannot be imported ({error}): {INSTALL}") from error
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                del ALL_ATTENTION_FUNCTIONS[name]  # what it set hides what is registered, now and later
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function


class CapturedAttention(nn.Module):
    """What SnapKVPress reads of an attention module, for hidden states that already are queries."""

    def __init__(self, config: CacheProcessorConfig) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_attention_heads=config.num_query_heads, num_key_value_heads=config.num_kv_heads
        )
        self.head_dim = config.head_dim
        self.q_proj = nn.Identity()


class KVPress:
    """kvpress' SnapKV scores. Raises ImportError, naming the remedy, where kvpress is missing."""

    def __init__(self, config: CacheProcessorConfig) -> None:
        self.press_type = load().SnapKVPress
        self.config = config
        self.attention = CapturedAttention(config)

    @torch.inference_mode()
    def score(self, keys: Sequence[Tensor], queries: Sequence[Tensor], events: Sequence[BoundaryEvent]) -> list[Tensor]:
        """Scores of the prior positions, larger for those that the window attended to more.

        Returns per layer [num_events, num_kv_heads, prior] in the cache's dtype.
        """
        window = Window.of(events, self.config)
        length = window.end - window.begin
        press = self.press_type(window_size=length, kernel_size=1)
        scores = []
        for of_layer, ring in zip(keys, queries, strict=True):
            hidden = window.queries(ring).transpose(1, 2).flatten(2)  # [num_events, window, num_query_heads * head_dim]
            # It insists on more hidden states than the window has, and reads the last `window` of them.
            hidden = torch.cat([hidden[:, :1], hidden], dim=1)
            cos = hidden.new_ones(1, length, self.config.head_dim)
            k = window.rows(of_layer)[:, :, : window.end]
            # Values are not read, and attention weights it computes by itself where there are none.
            rated = press.score(self.attention, hidden, k, None, None, {"position_embeddings": (cos, 1 - cos)})
            scores.append(rated[..., : window.begin])
        return scores
