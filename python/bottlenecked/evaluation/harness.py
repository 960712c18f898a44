"""lm-eval-harness: our model type, a task that reads files, and the command that calls theirs.

    bottlenecked lm-eval --model_args pretrained=MODEL,processor=DIR --tasks gsm8k --apply_chat_template

Importing this registers the model type "bottlenecked" in lm-eval's registry, where `lm_eval.simple_evaluate` finds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"this needs lm-eval: install bottlenecked with its extra [eval] ({error})") from None

import datasets
import torch

from .. import backbones
from ..config import CacheProcessorConfig
from ..integrations.transformers import attach
from ..processor import CacheProcessor
from .answers import FLEXIBLE, STRICT, equal, extract
from .engines import end_tokens
from .problems import read_problems

TASKS = Path(__file__).parent / "tasks"


@register_model("bottlenecked")
class BottleneckedLM(HFLM):
    """lm-eval's model for transformers, with a Processor attached while it writes.

    Tasks of loglikelihoods are refused: nothing is written there, so no step ends and nothing would be rewritten.
    """

    def __init__(
        self,
        pretrained: str,
        processor: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        num_threads: int | None = None,
        check_weights: bool = True,
        **settings: Any,
    ) -> None:
        """pretrained: as for lm-eval's own, or smollm2, or a .gguf file. processor: a Processor's directory.

        dtype: of weights and KV cache; "auto": that of the files, and float32 for GGUF. num_threads, check_weights: as
        for `attach`. Others: as for lm-eval's `hf`. Raises ValueError where the Processor is for another model.
        """
        CacheProcessorConfig.load(processor)  # a mistake is told before the model is loaded
        if pretrained == "smollm2" or pretrained.endswith(".gguf"):
            model, tokenizer = backbones.load(pretrained, dtype="float32" if dtype == "auto" else dtype)  # type: ignore[arg-type]
            if torch.cuda.is_available() and device != "cpu":
                model.to(device or "cuda")
            super().__init__(model, tokenizer=tokenizer, **settings)
        else:
            super().__init__(pretrained, dtype=dtype, device=device or "cuda", **settings)
        backend = "cpu" if self.device.type == "cpu" else f"{self.device.type}:{self.device.index or 0}"
        self.processor = CacheProcessor.from_pretrained(processor, backend=backend)
        self._options: dict[str, Any] = {"num_threads": num_threads, "check_weights": check_weights}
        self._attach().detach()

    def _attach(self) -> Any:
        return attach(self.model, self.processor, self.tokenizer, **self._options)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        # As `bottlenecked eval`: fine-tuning teaches the tokenizer's end of text, which not all models state.
        ends = end_tokens(self.model.generation_config.eos_token_id, self.tokenizer)
        with self._attach():
            return super()._model_generate(*args, **{"eos_token_id": ends or None, **kwargs})

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError(
            "loglikelihood tasks let the model write nothing, so no step ends and a Processor does nothing: choose "
            "generate_until tasks, such as gsm8k, or --model hf"
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self.loglikelihood(requests)


def numbers(data: str | None = None, template: str = "{question}", **_: Any) -> dict[str, Any]:
    """The dataset of the task bottlenecked_numbers. data: a file as `read_problems` takes it, with numbers.

    template: a text with {question} in it; to be left out with --apply_chat_template. Others: lm-eval's own metadata.
    """
    if data is None:
        raise ValueError('bottlenecked_numbers needs a file: --metadata \'{"data": "gsm8k_test.jsonl"}\'')
    found = read_problems(data)
    if found.kind != "number":
        raise ValueError(f"{data} has answers that are no numbers: give it to `bottlenecked eval`")
    rows = []
    for problem in found.problems:
        if len(problem.messages) != 1:
            raise ValueError(f"{problem.name} is a longer conversation: give it to `bottlenecked eval`")
        prompt = template.replace("{question}", problem.messages[0]["content"])
        rows.append({"name": problem.name, "prompt": prompt, "reference": problem.answer})
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As `bottlenecked eval` scores: the last number of the text, and the one behind ####."""
    return {
        name: float(equal(doc["reference"], extract(results[:1], which)[0]))
        for name, which in (("accuracy", FLEXIBLE), ("strict_accuracy", STRICT))
    }


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval's command line with our model type and our task known to it; both are the defaults of `run`."""
    from lm_eval.__main__ import cli_evaluate

    arguments = list(arguments)
    if arguments[:1] not in (["ls"], ["validate"], []):
        arguments = arguments[1:] if arguments[0] == "run" else arguments
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = [] if given & {"--model", "-M"} else ["--model", "bottlenecked"]
        defaults += [] if "--include_path" in given else ["--include_path", str(TASKS)]
        arguments = ["run", *defaults, *arguments]
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


__all__ = ["TASKS", "BottleneckedLM", "main", "numbers", "score"]
