"""Synthetic multi-step tasks, as text: small enough to train on a CPU, with what a Processor must move known.

`ChainTask` follows a chain of definitions; the rewrite of the prompt can help. `RegisterTask` is a register machine
whose lines need facts of the prompt again; recalling them (top-k) can help. Both make lines for `data.load_examples`:
"question", "answer", "forced" and "probes", the last for `probe`: what a KV row should hold, as a mapping of texts to
lists of ["question" or "answer", number of the character, what its row should tell]. A text is "subject: property, from
place"; of each subject, some place must hold every property.

`task_tokenizer` reads both, a token per symbol, and `tiny_backbone` makes an untrained Llama for it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAMES = "abcdefghijklmnopqrstuvwxyz"
REGISTERS = "ABCDEFGH"
_LINE = re.compile(r"([A-H][=>]|\?)([a-z])([a-z0-9])")

Record = dict[str, Any]
Probe = tuple[str, int, str]


@dataclass(frozen=True, kw_only=True)
class ChainTask:
    """Follow a chain of definitions, one per line:

        question  a4;gc5;mfa;fgx;x2;?m1        answer  f45
                                                       g20
                                                       c55

    "mfa;" means f = m + a (modulo `modulus`), "gc5;" c = g + 5, "a4;" a is 4, and "?m1": begin at m, which is 1. An
    answer line holds the next variable, the operand's value and the variable's value. The definitions are shuffled.
    A model of two layers can find the next variable but not, in time, the value of an operand that is a name.

    steps: least and most lines of an answer. modulus: 2 to 10. names: letters to choose from, at most 26.
    leaves: operands that have a name. indirect: share of the steps whose operand is one. distractors: most
    definitions of a second chain that nothing asks for.

    Raises ValueError for a value that is not allowed, or where there are too few names.
    """

    steps: tuple[int, int] = (1, 5)
    modulus: int = 7
    names: int = 20
    leaves: int = 3
    indirect: float = 0.3
    distractors: int = 2

    def __post_init__(self) -> None:
        _check_range("steps", self.steps, 1)
        _check("modulus", self.modulus, 2, 10)
        _check("names", self.names, 1, len(NAMES))
        _check("leaves", self.leaves, 1, len(NAMES))
        _check("indirect", self.indirect, 0, 1)
        _check("distractors", self.distractors, 0, len(NAMES))
        needed = self.steps[1] + 1 + self.leaves + self.distractors + 1
        if needed > self.names:
            raise ValueError(f"names is {self.names}, but {needed} are needed for so many steps, leaves, distractors")

    def warm_up(self) -> ChainTask:
        """The same with one or two steps whose operands are all names: the first call has work to do."""
        return replace(self, steps=(1, 2), indirect=1.0)

    def record(self, generator: np.random.Generator) -> Record:
        """One problem."""
        g, p = generator, self.modulus
        steps = int(g.integers(self.steps[0], self.steps[1] + 1))
        distractors = int(g.integers(0, self.distractors + 1))
        names = [NAMES[i] for i in g.permutation(self.names)[: steps + 1 + self.leaves + distractors + 1]]
        chain, names = names[: steps + 1], names[steps + 1 :]
        leaves = {name: int(g.integers(0, p)) for name in names[: self.leaves]}
        other = names[self.leaves :]

        def operand() -> str:
            return str(g.choice(list(leaves))) if g.random() < self.indirect else str(g.integers(0, p))

        lines = [a + b + operand() for a, b in itertools.pairwise(chain)]
        lines += [a + b + operand() for a, b in itertools.pairwise(other)]
        lines += [name + str(value) for name, value in leaves.items()] + [other[0] + str(g.integers(0, p))]
        lines = [lines[i] for i in g.permutation(len(lines))]
        question = ";".join([*lines, f"?{chain[0]}{g.integers(0, p)}"])
        ends = itertools.accumulate(len(line) + 1 for line in lines)
        entries = [(end - 1, *line) for end, line in zip(ends, lines, strict=True) if line[0] in leaves]
        probes = _entry_probes("an operand", entries)
        return {"question": question, "answer": self.solve(question), "probes": probes}

    def solve(self, question: str) -> str:
        """The answer, from the question's text alone. ValueError where that is no question of this task."""
        *lines, asked = question.split(";")
        values = {line[0]: int(line[1]) for line in lines if len(line) == 2}
        following = {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
        if len(asked) != 3 or asked[0] != "?" or asked[1] not in following:
            raise ValueError(f"{question!r} is no question of the chain task: it ends with {asked!r}")
        name, value = asked[1], int(asked[2])
        answer = ""
        while name in following:
            name, operand = following[name]
            number = int(operand) if operand.isdigit() else values[operand]
            value = (value + number) % self.modulus
            answer += f"{name}{number}{value}\n"
        return answer

    def wrong_step(self, question: str, answer: str) -> int | None:
        """The first line, counted from 0, in which an answer is wrong; None where it is right."""
        return _first_difference(self.solve(question), answer)


@dataclass(frozen=True, kw_only=True)
class RegisterTask:
    """A register machine:

        question  cd;ea;ab;bf;dc...;       "ab;" is the fact f(a) = b; f is a random cycle
        answer    A=a1                     set: A is a. The 1 is the class of f(a), so the line must look f(a) up
                  B=d0
                  A>b0                     advance: A becomes f(A), which the model must find; 0 is the class of f(b)
                  ?cd                      query: f(c) = d

    The environment writes ("forced") the operation, the value of a set, the name of a query and the end of text;
    the model everything else. An advance is hard for two layers: which name A holds stands many lines before.

    steps: least and most lines. registers: 1 to 8. facts: length of the cycle. names: letters to choose from.
    classes: a name's class is its number in the alphabet modulo this. advance, query: shares of these lines; the
    rest sets, as does an advance of a register that holds nothing yet. repeat: how often a line is about the
    register of the line before.

    Raises ValueError for a value that is not allowed.
    """

    steps: tuple[int, int] = (3, 8)
    registers: int = 2
    facts: int = 6
    names: int = 10
    classes: int = 2
    advance: float = 0.45
    query: float = 0.2
    repeat: float = 0.0

    def __post_init__(self) -> None:
        _check_range("steps", self.steps, 1)
        _check("registers", self.registers, 1, len(REGISTERS))
        _check("names", self.names, 2, len(NAMES))
        _check("facts", self.facts, 2, self.names)
        _check("classes", self.classes, 1, 10)
        for name in ("advance", "query", "repeat"):
            _check(name, getattr(self, name), 0, 1)
        if self.advance + self.query > 1:
            raise ValueError(f"advance is {self.advance} and query {self.query}, but together they are at most 1")

    def look_ups(self) -> RegisterTask:
        """The same with queries and sets only: with these a backbone learns to look facts up."""
        return replace(self, advance=0.0, query=0.8)

    def warm_up(self) -> RegisterTask:
        """The same with mostly a set and advances of the same register: the first calls have work to do."""
        return replace(self, steps=(3, 3), advance=0.7, query=0.1, repeat=0.8)

    def record(self, generator: np.random.Generator) -> Record:
        """One problem."""
        g = generator
        cycle = [NAMES[i] for i in g.permutation(self.names)[: self.facts]]
        f = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        shuffled = [cycle[i] for i in g.permutation(self.facts)]
        question = "".join(f"{name}{f[name]};" for name in shuffled)
        answer, forced, held = "", [], dict[str, str]()
        register = ""
        for _ in range(int(g.integers(self.steps[0], self.steps[1] + 1))):
            if not register or g.random() >= self.repeat:
                register = REGISTERS[g.integers(self.registers)]
            kind, value = g.random(), cycle[g.integers(self.facts)]
            begin = len(answer)
            if kind < self.advance and register in held:
                value = f[held[register]]
                answer += f"{register}>{value}{self._class(f[value])}\n"
                forced.append([begin, begin + 2])
            elif self.advance <= kind < self.advance + self.query:
                answer += f"?{value}{f[value]}\n"
                forced.append([begin, begin + 2])
                continue
            else:
                answer += f"{register}={value}{self._class(f[value])}\n"
                forced.append([begin, begin + 3])
            held[register] = value
        probes = _entry_probes("a fact", [(3 * i + 2, name, f[name]) for i, name in enumerate(shuffled)])
        forced.append([len(answer), len(answer) + 1])
        return {"question": question, "answer": answer, "forced": forced, "probes": probes}

    def wrong_step(self, question: str, answer: str) -> int | None:
        """The first line, counted from 0, in which an answer is wrong; None where it is right.

        What the environment writes is taken as it is.
        """
        f = {fact[0]: fact[1] for fact in question.split(";") if fact}
        held: dict[str, str] = {}
        lines = answer.split("\n")
        for i, line in enumerate(lines[:-1]):
            parts = _LINE.fullmatch(line)
            if parts is None:
                return i
            operation, value, rest = parts[1], parts[2], parts[3]
            if operation == "?":
                right = rest == f.get(value)
            else:
                asked = value if operation[1] == "=" else f.get(held.get(operation[0], ""))
                right = value == asked and value in f and rest == self._class(f[value])
                held[operation[0]] = value
            if not right:
                return i
        return None if lines[-1] == "" else len(lines) - 1

    def _class(self, name: str) -> str:
        return str(NAMES.index(name) % self.classes)


Task = ChainTask | RegisterTask


def _entry_probes(subject: str, entries: Sequence[tuple[int, str, str]]) -> dict[str, list[Probe]]:
    """Whether rows hold both what an entry of the question is found by and what it is read for.

    entries: of each, the number of its last character (`;`, the one before is its value), its name and its value.
    """
    probes: dict[str, list[Probe]] = {}
    for place, back in (("value", 1), ("end", 0)):
        probes[f"{subject}: name, from its {place}"] = [("question", end - back, name) for end, name, _ in entries]
        probes[f"{subject}: value, from its {place}"] = [("question", end - back, value) for end, _, value in entries]
    return probes


def synthesize(task: Task, count: int, *, seed: int = 0) -> Iterator[Record]:
    """`count` problems as JSON objects; problem i depends on the task, the seed and i alone.

    ValueError for a count below 1 or a negative seed.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"count is {count} and seed {seed}, but they must be at least 1 and 0")
    return (task.record(np.random.default_rng([seed, i])) for i in range(count))


def task_tokenizer() -> PreTrainedTokenizerFast:
    """A token per symbol of either task: newline, `;`, `?`, digits, letters, and "A=" and "A>" per register.

    Prompts begin with the token <s>; </s> ends a text, <pad> fills. Other characters are an error.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", "\n", ";", "?", *"0123456789", *NAMES]
    symbols += [register + operation for register in REGISTERS for operation in "=>"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z][=>]|[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def tiny_backbone(
    *,
    layers: int = 2,
    hidden_size: int = 64,
    mlp_size: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_length: int = 256,
    seed: int = 0,
) -> PreTrainedModel:
    """An untrained Llama over `task_tokenizer`'s vocabulary, float32 on the CPU; save both to one directory.

    head_dim: 32 or more, which vLLM's attention on CPUs needs. Weights are normal with the fan-in's standard
    deviation, half of it where a layer adds to the residual stream; 0.02 for the embeddings.

    Raises ValueError for sizes that do not fit each other.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, value in (("layers", layers), ("hidden_size", hidden_size), ("mlp_size", mlp_size)):
        _check(name, value, 1, 65536)
    _check("head_dim", head_dim, 32, 256)
    _check("kv_heads", kv_heads, 1, 1024)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(f"heads is {heads} and head_dim {head_dim}, but they must be multiples of kv_heads and of 2")
    tokenizer = task_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=mlp_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 0.02 if "embed" in name else parameter.shape[1] ** -0.5 * (0.5 if adds else 1)
                torch.nn.init.normal_(parameter, std=scale)
    return model.eval()


def exact_match(model: Any, examples: Sequence[Example], *, batch_size: int = 128) -> list[bool]:
    """Whether greedy decoding gives an example's whole answer; what is not in its loss mask is forced.

    model: a transformers model with eos_token_id and pad_token_id in its generation_config; a Processor works
        where one is attached.
    """
    done: list[bool] = []
    for begin in range(0, len(examples), batch_size):
        batch = examples[begin : begin + batch_size]
        cuts = [example.segments[0][1] for example in batch]
        prompts = [example.tokens[:cut] for example, cut in zip(batch, cuts, strict=True)]
        answers = [example.tokens[cut:] for example, cut in zip(batch, cuts, strict=True)]
        masks = [example.loss_mask[cut:] for example, cut in zip(batch, cuts, strict=True)]
        given = [[None if m else t for t, m in zip(*row, strict=True)] for row in zip(answers, masks, strict=True)]
        made = decode(model, prompts, max_new_tokens=max(map(len, answers)), given=given)
        done += [is_exact(*row) for row in zip(answers, masks, made, strict=True)]
    return done


def is_exact(answer: Sequence[int], mask: Sequence[bool], made: Sequence[int]) -> bool:
    """Whether the tokens of `answer` that the model has to produce (mask) are those of `made`."""
    padded = [*made, *[-1] * (len(answer) - len(made))]
    return all(a == m or not ours for a, m, ours in zip(answer, padded, mask, strict=False))


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int] | None = None,
    given: Sequence[Sequence[int | None]] | None = None,
) -> list[list[int]]:
    """Greedy decoding of a batch: the new tokens of each row, up to its end-of-text token or `max_new_tokens`.

    model: a transformers model; a Processor works where one is attached. Of its generation_config only the special
        tokens are used: no penalty or least length that it states.
    end_tokens: what ends a text; None: those of the model's generation_config.
    given: per row, for its first new tokens, one that comes whatever the model says, or None: the model's own.
    """
    import torch
    from transformers import LogitsProcessorList

    settings = model.generation_config
    ends = settings.eos_token_id if end_tokens is None else list(end_tokens)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(ends), 0)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if given is not None and any(token is not None for row in given for token in row):
        wanted = torch.full((len(prompts), max_new_tokens), -1)
        for i, row_given in enumerate(given):
            tokens = [-1 if token is None else token for token in row_given[:max_new_tokens]]
            wanted[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        processors.append(_environment(wanted, width))
    greedy = {
        # What the model's generation_config states, such as a repetition_penalty, is in force until it is taken back.
        **dict.fromkeys(settings.to_dict()),
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "use_cache": True,
        "max_new_tokens": max_new_tokens,
        "bos_token_id": settings.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": pad,
    }
    output = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), logits_processor=processors, **greedy
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _environment(wanted: Any, width: int) -> Any:
    """A logits processor: `wanted` [rows, columns] comes where it is not negative; columns begin behind `width`."""
    import torch
    from transformers import LogitsProcessor

    class Environment(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            column = input_ids.shape[1] - width
            rows = (wanted[:, column] >= 0).nonzero().flatten()
            scores[rows] = -torch.inf
            scores[rows, wanted[rows, column].to(scores.device)] = 0
            return scores

    return Environment()


def save_backbone(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """A tiny backbone and its tokenizer, as `backbones.load` reads them."""
    model.save_pretrained(Path(directory))
    task_tokenizer().save_pretrained(Path(directory))


def _first_difference(right: str, answer: str) -> int | None:
    a, b = right.split("\n"), answer.split("\n")
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, but it must be from {least} to {most}")


def _check_range(name: str, value: tuple[int, int], least: int) -> None:
    if not least <= value[0] <= value[1]:
        raise ValueError(f"{name} is {value[0]}:{value[1]}, but it must be two ascending numbers from {least}")


__all__ = [
    "ChainTask",
    "RegisterTask",
    "decode",
    "exact_match",
    "is_exact",
    "save_backbone",
    "synthesize",
    "task_tokenizer",
    "tiny_backbone",
]
