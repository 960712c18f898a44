"""The hook on vLLM's attention: every layer's queries, after RoPE, go to the query pages of their blocks.

Two routes to the same, both without touching anything that other engines use:

- `hook`, the default, wraps `forward` of the live attention implementations, whatever backend they are of. vLLM's
  attention operation looks `forward` up at each call and is opaque to torch.compile.
- `--attention-backend CUSTOM`: a named backend, made from the platform's own by `capturing_backend`. vLLM finds it
  through the entry point `vllm.general_plugins` of this package (`register`).

The connector tells the implementations where queries go once the caches exist (`QueryCapture`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bottleneck_ext import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    import bottleneck_ext

_ATTRIBUTE = "bottlenecked_capture"
_PARAMETERS = ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")


class QueryCapture:
    """Where one layer's queries go.

    queries: the query cache of all layers. layer: its index there. block_to_page: int32 [num_blocks], on the caches'
    device, the same tensor for the engine's life, so that CUDA graphs may hold it. workspace: names the backend.
    """

    def __init__(
        self,
        queries: bottleneck_ext.QueryCache,
        layer: int,
        block_to_page: Tensor,
        workspace: bottleneck_ext.Workspace,
    ) -> None:
        self.queries = queries
        self.layer = layer
        self.block_to_page = block_to_page
        self.workspace = workspace

    def __call__(self, query: Tensor, attn_metadata: Any) -> None:
        """query: [num_tokens, num_query_heads, head_dim], perhaps padded behind `attn_metadata.num_actual_tokens`."""
        slots = attn_metadata.slot_mapping
        # Of shape[0], len() and a slice the first takes the least time, and this is done in every layer.
        if slots.shape[0] != attn_metadata.num_actual_tokens:
            slots = slots[: attn_metadata.num_actual_tokens]
        self.queries.capture(self.layer, query, slots, self.block_to_page, workspace=self.workspace)


def hook(impl: Any, capture: QueryCapture) -> None:
    """From here on the attention implementation `impl` hands its queries to `capture`.

    One of a backend that `capturing_backend` made is told, any other one's `forward` is wrapped, on this instance.
    """
    if not isinstance(impl, _CapturingMixin):
        impl.forward = _capturing_forward(impl.forward, lambda: capture)
    setattr(impl, _ATTRIBUTE, capture)


def check_forward(name: str, impl: Any) -> None:
    """UnsupportedError unless `impl.forward` takes what is captured under the names and in the order known."""
    import inspect

    forward = getattr(impl, "forward", None)
    parameters = tuple(inspect.signature(forward).parameters) if callable(forward) else ()
    if parameters[: len(_PARAMETERS)] != _PARAMETERS and not isinstance(impl, _CapturingMixin):
        raise UnsupportedError(
            f"the attention of {name} ({type(impl).__name__}) has no forward{_PARAMETERS}, so its queries cannot be "
            "captured: choose another --attention-backend"
        )


def _capturing_forward(forward: Callable[..., Any], find: Callable[[], QueryCapture | None]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def capturing_forward(
        layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
        capture = find()
        if capture is not None and attn_metadata is not None:  # None: a profiling run
            capture(query, attn_metadata)
        return result

    return capturing_forward


class _CapturingMixin:
    """An attention implementation that captures, once it has been told where to."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        captured = _capturing_forward(super().forward, lambda: getattr(self, _ATTRIBUTE, None))  # type: ignore[misc]
        return captured(*args, **kwargs)


@functools.cache
def capturing_backend(base: type) -> type:
    """An attention backend like `base`, whose implementation captures queries. One class per base."""
    impl = base.get_impl_cls()  # type: ignore[attr-defined]
    capturing_impl = type(f"Capturing{impl.__name__}", (_CapturingMixin, impl), {})
    return type(f"Capturing{base.__name__}", (base,), {"get_impl_cls": staticmethod(lambda: capturing_impl)})


def register() -> None:
    """The entry point `vllm.general_plugins`: makes `--attention-backend CUSTOM` stand for `CapturingBackend`.

    On a CPU vLLM takes its own backend whatever is asked for, so there the name of that one leads to
    `CpuBackend`, which is vLLM's own class unless CUSTOM was asked for.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.CapturingBackend")
    if not AttentionBackendEnum.CPU_ATTN.is_overridden():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.CpuBackend")


def __getattr__(name: str) -> type:
    """Classes that are made when vLLM asks for them: the stock ones are not imported before."""
    if name not in ("CapturingBackend", "CpuBackend"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name == "CpuBackend":
        stock: type = resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
        chosen = get_current_vllm_config().attention_config.backend is AttentionBackendEnum.CUSTOM
        return capturing_backend(stock) if chosen else stock
    # What the platform would choose is asked with a selection it has not made yet, so its first choice stands for it.
    return capturing_backend(AttentionBackendEnum.FLASH_ATTN.get_class())
