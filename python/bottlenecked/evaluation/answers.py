"""Is an answer right? lm-eval extracts the number, math-verify compares it: no regular expression of ours.

The filters are those of lm-eval's task gsm8k, read from its file, under its names: "flexible-extract", the last number
of a text, and "strict-match", the number behind "####".
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLEXIBLE, STRICT = "flexible-extract", "strict-match"
NOTHING = "[invalid]"  # what lm-eval's filters return where there is no number

_INSTALL = "this needs lm-eval and math-verify: install bottlenecked with its extra [eval]"


def extract(texts: Sequence[str], which: str = FLEXIBLE) -> list[str]:
    """The number in each text as it is written there, or NOTHING. which: FLEXIBLE or STRICT.

    Raises ImportError where lm-eval is missing.
    """
    if not texts:
        return []
    ensemble = _filters()[which]
    from lm_eval.api.instance import Instance

    instances = [Instance("generate_until", {}, ("", {}), i, resps=[text]) for i, text in enumerate(texts)]
    ensemble.apply(instances)
    return [instance.filtered_resps[which] for instance in instances]


def equal(reference: str, answer: str) -> bool:
    """Whether two numbers are one, however they are written: "1,234.00" is "$1234". ImportError without math-verify."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from None
    return bool(verify(parse(reference), parse(answer)))


@functools.cache
def _filters() -> dict[str, Any]:
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise ImportError(_INSTALL)
    import yaml
    from lm_eval.filters import build_filter_ensemble

    task = yaml.safe_load((Path(found.origin).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    return {
        each["name"]: build_filter_ensemble(
            each["name"],
            [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in each["filter"]],
        )
        for each in task["filter_list"]
    }


__all__ = ["FLEXIBLE", "NOTHING", "STRICT", "equal", "extract"]
