"""What a server (`kv_connector_extra_config`) and a request may set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bottleneck_ext import InvalidArgumentError

from ...processor import check_max_relative_edit

_WEIGHT_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`kv_connector_extra_config` of vLLM's --kv-transfer-config.

    processor: directory of the Processor.
    rewrite: whether requests that do not say are rewritten.
    top_k: positions recalled per layer for requests that do not say, at most the Processor's; None: as many as that.
    weight_dtype: of the Processor's products: "auto", "float32" or "bfloat16".
    max_saved_tokens: preempted requests keep keys, values and queries of up to so many tokens, all together, in host
        memory; None: as many as the KV cache holds. What does not fit is computed again without its rewrites.
    prompt_cache_tokens: keys and values of so many prompt tokens are kept in host memory, so that prompts which begin
        alike are not computed again (see prompts.py; vLLM's own prefix caching must be off). 0: none.
    check_weights: False accepts a Processor made for the same architecture with other weights.
    max_relative_edit: a step whose edit is larger than this, relative to its rows in any layer, or not finite, is left
        as it is and counted; None: no limit.
    """

    processor: str
    rewrite: bool = True
    top_k: int | None = None
    weight_dtype: str = "auto"
    max_saved_tokens: int | None = None
    prompt_cache_tokens: int = 0
    check_weights: bool = True
    max_relative_edit: float | None = None

    @classmethod
    def from_extra_config(cls, values: Mapping[str, Any]) -> ServerOptions:
        """Raises InvalidArgumentError naming a key that is unknown, missing or has a wrong value."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidArgumentError(
                    f"kv_connector_extra_config has the key {name!r}; those of bottlenecked are {', '.join(known)}"
                )
        if not isinstance(values.get("processor"), str):
            raise InvalidArgumentError(
                'kv_connector_extra_config lacks "processor", the directory of a Processor: `bottlenecked init` makes '
                "one"
            )
        options = cls(**values)
        for name in ("rewrite", "check_weights"):
            if not isinstance(getattr(options, name), bool):
                _refuse(name, getattr(options, name), "true or false")
        for name in ("top_k", "max_saved_tokens"):
            value = getattr(options, name)
            if value is not None and not _is_count(value):
                _refuse(name, value, "null or an integer of 0 or more")
        if not _is_count(options.prompt_cache_tokens):
            _refuse("prompt_cache_tokens", options.prompt_cache_tokens, "an integer of 0 or more")
        if options.weight_dtype not in _WEIGHT_DTYPES:
            _refuse("weight_dtype", options.weight_dtype, " or ".join(map(repr, _WEIGHT_DTYPES)))
        try:
            check_max_relative_edit(options.max_relative_edit)
        except InvalidArgumentError:
            _refuse("max_relative_edit", options.max_relative_edit, "null or a positive finite number")
        return options


@dataclass(frozen=True)
class RequestOptions:
    """rewrite: whether the request's cache is rewritten; top_k: positions recalled per layer, None: the Processor's."""

    rewrite: bool
    top_k: int | None

    @classmethod
    def of(
        cls, extra_args: Mapping[str, Any] | None, server: ServerOptions, max_top_k: int
    ) -> tuple[RequestOptions, str]:
        """The options of a request, and what is wrong with those it gave, in one sentence or empty.

        extra_args: `SamplingParams.extra_args`, where vLLM's server puts `vllm_xargs` (its names
            `bottlenecked_rewrite` and `bottlenecked_top_k`) and, under its own name, `kv_transfer_params` (the same
            names). A scheduler must not raise, so what cannot be used is told and left out.
        """
        rewrite, top_k, wrong = server.rewrite, server.top_k, ""
        given = dict(extra_args or {})
        nested = given.get("kv_transfer_params")
        given |= nested if isinstance(nested, Mapping) else {}
        if "bottlenecked_rewrite" in given:
            value = given["bottlenecked_rewrite"]
            if value in (True, False):  # vllm_xargs has no booleans: 0 and 1 do
                rewrite = bool(value)
            else:
                wrong = f"bottlenecked_rewrite is {value!r}, but it must be true, false, 1 or 0"
        if "bottlenecked_top_k" in given:
            value = given["bottlenecked_top_k"]
            if _is_count(value) and value <= max_top_k:
                top_k = value
            else:
                wrong = f"bottlenecked_top_k is {value!r}, but it must be an integer from 0 to {max_top_k}"
        return cls(rewrite, top_k), wrong


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse(name: str, value: object, allowed: str) -> None:
    raise InvalidArgumentError(f"kv_connector_extra_config: {name} is {value!r}, but it must be {allowed}")
