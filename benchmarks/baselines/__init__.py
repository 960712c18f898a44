"""Other implementations to measure against: PyTorch as its users would write it, and a library.

    naive.py    the paper's description with the tools at hand: eager attention, a module per layer
    plain.py    our algorithm, from captured queries, in plain PyTorch; optionally compiled
    stacked.py  the same with all layers in a few large products: the strongest PyTorch we can write
    kvpress.py  the scoring of cache positions by the library kvpress: selection alone

Of `bottlenecked` they use the configuration and the boundary events, and none of its arithmetic.

Shapes are those of transformers: keys[l], values[l] are [batch, num_kv_heads, T, head_dim] and are rewritten in place;
queries[l] is a ring [batch, R, num_query_heads, head_dim], after RoPE: the query of position p is in row p % R.
Sequences are rows of the batch. `recalled` is int64 [num_layers, num_events, k], ascending, where k is top_k or, where
that is less, the number of prior positions; ties are broken as `torch.topk` likes.

The events of one call are batched, so they must have equal lengths and no padding: see `window.Window`.
"""
