"""Training data: JSONL files of reasoning traces, as tokens cut into steps.

A line is one problem, in one of two forms:

    {"question": "...", "answer": "first step\\nsecond step\\n#### 72"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Of a conversation everything before the last message is the prompt, and the last one, the assistant's, is the
answer. Two more keys are known: "forced", ranges of characters of the answer that an environment writes rather
than the model, and "source", the problem a line was derived from; other keys are ignored.

Prompt and answer are tokenized apart, as they are at inference: the prompt as `bottlenecked generate` encodes it,
then the answer's tokens, which the model has to produce, and the end-of-text token. Steps (arXiv 2505.16950,
section 3) are those that `BoundaryDetector` finds at inference.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..boundary import BoundaryDetector, newline_token_ids
from ..config import BoundaryConfig

PLAIN_TEMPLATE = "{question}\n"
# Why `Dataset.without` drops examples.
HELD_BACK = "of a problem that is held back"

# Part of every digest: counts up whenever the same file would give other tokens, or the cache another layout.
_FORMAT = 1
_MARK = re.compile(r"<<[^<>\n]*>>")
# Batches of one length band are sorted out of this many bands' worth of shuffled examples.
_BANDS = 8

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One problem as the model reads and writes it.

    tokens: ids of the prompt, the answer and the end of text.
    segments: half-open ranges of `tokens`, adjacent and covering all: the prompt (step 0), then one per step of
        the answer. The last one may end with the end of text instead of a line.
    loss_mask: per token, whether the model has to produce it: True in the answer, unless it is forced.
    name: "file:line", for messages.
    """

    tokens: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    loss_mask: tuple[bool, ...]
    name: str

    @property
    def num_steps(self) -> int:
        """Steps of the answer: the prompt, which is step 0, is not counted."""
        return len(self.segments) - 1


@dataclass(frozen=True)
class Dataset:
    """Examples, and what became of the rest.

    examples: in the order of the files.
    dropped: reason -> number of lines.
    digest: SHA-256, in hexadecimal, of everything the tokens depend on: files, template, tokenizer, options.
    sources: per example, the problem it was derived from, or its own line, as "file:line" without the file's folder;
        empty means: each from its own.
    """

    examples: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    sources: tuple[str, ...] = ()

    def lengths(self) -> Ints:
        """Tokens of each example, int64 [examples]."""
        if isinstance(self.examples, _Packed):
            return self.examples.lengths()
        return np.array([len(e.tokens) for e in self.examples], np.int64)

    def num_steps(self) -> Ints:
        """Steps of each example's answer, int64 [examples]."""
        if isinstance(self.examples, _Packed):
            return self.examples.num_steps()
        return np.array([e.num_steps for e in self.examples], np.int64)

    def prompts(self) -> list[bytes]:
        """The tokens of each example's prompt, as the bytes of int32."""
        if isinstance(self.examples, _Packed):
            return self.examples.prompts()
        return [np.array(e.tokens[: e.segments[0][1]], np.int32).tobytes() for e in self.examples]

    @functools.cached_property
    def part(self) -> str:
        """Which examples these are, of all that `digest` is of: how many, and a hash of their tokens in their order."""
        digest, examples = hashlib.sha256(self.lengths().tobytes()), self.examples
        if isinstance(examples, _Packed):
            tokens = examples.tokens()
        else:
            tokens = (np.array(e.tokens, np.int32) for e in examples)
        for of_one in tokens:
            digest.update(of_one.tobytes())
        return f"{len(self.examples)}, {digest.hexdigest()[:16]}"

    def split(self, held_back: int, *, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two parts: for training, and at least `held_back` random examples to judge it by.

        What has one source or one prompt stays together: a copy with other numbers, or another solution of the same
        question, would give the answer away. Raises ValueError unless both parts have an example.
        """
        count = len(self.examples)
        first: dict[object, int] = {}
        for i, name in enumerate(self.sources or range(count)):
            first.setdefault(name if name in self._stated else i, i)
        problems, rows = self._problems(), list(first.values())
        held: set[int] = set()
        # Sources are drawn, each with its whole problem: two of one prompt do not change what else is drawn.
        for i in np.random.default_rng([seed, 0]).permutation(len(rows)):
            if len(held) >= held_back:
                break
            held.update(problems[rows[i]])
        if not 0 < len(held) < count:
            raise ValueError(f"held_back is {held_back}, but it must leave some of the {count} examples on either side")
        return self._part([i for i in range(count) if i not in held]), self._part(sorted(held))

    def without(self, held_back: Dataset) -> Dataset:
        """The examples of problems that have neither source nor prompt in `held_back`; others are dropped and counted.

        A problem is whatever sources and prompts lead to, as in `split`: where one example of it is dropped all are.
        Raises ValueError where none is left.
        """
        sources = set(held_back.sources) & (self._stated | held_back._stated)
        names, prompts = self.sources or (None,) * len(self.examples), set(held_back.prompts())
        gone: set[int] = set()
        for i, (problem, name, prompt) in enumerate(zip(self._problems(), names, self.prompts(), strict=True)):
            if i not in gone and (prompt in prompts or name in sources):
                gone.update(problem)
        rows = [i for i in range(len(self.examples)) if i not in gone]
        dropped = len(self.examples) - len(rows)
        if not dropped:
            return self
        if not rows:
            raise ValueError(f"all {dropped} examples are of problems that are held back: use others")
        return replace(self._part(rows), dropped={**self.dropped, HELD_BACK: dropped})

    @functools.cached_property
    def _stated(self) -> set[str]:
        """The sources that tie examples: a line states them, and they are not just its own, for two files may have one
        name."""
        examples = self.examples
        names = examples.names() if isinstance(examples, _Packed) else [example.name for example in examples]
        return {s for s, name in zip(self.sources, names, strict=False) if s != Path(name).name}

    def _problems(self) -> list[list[int]]:
        """Per example, the rows of its problem: all that one source or one prompt leads to, and theirs in turn."""
        first: dict[object, int] = {}
        earlier = list(range(len(self.examples)))

        def root(i: int) -> int:
            while earlier[i] != i:
                earlier[i] = earlier[earlier[i]]
                i = earlier[i]
            return i

        sources = [(i, source) for i, source in enumerate(self.sources) if source in self._stated]
        for i, key in [*sources, *enumerate(self.prompts())]:
            a, b = root(first.setdefault(key, i)), root(i)
            earlier[max(a, b)] = min(a, b)
        rows: list[list[int]] = [[] for _ in earlier]
        for i in range(len(earlier)):
            rows[root(i)].append(i)
        return [rows[root(i)] for i in range(len(earlier))]

    def _part(self, rows: list[int]) -> Dataset:
        examples = self.examples
        if isinstance(examples, _Packed):
            part: Sequence[Example] = examples.take(np.array(rows, np.int64))
        else:
            part = [examples[i] for i in rows]
        return Dataset(part, self.dropped, self.digest, tuple(self.sources[i] for i in rows) if self.sources else ())


def load_examples(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    template: str = "auto",
    max_length: int,
    cache_dir: str | os.PathLike[str] | None = None,
    boundary: BoundaryConfig | None = None,
    keep_marks: bool = False,
) -> Dataset:
    """Read JSONL files and tokenize them, or take the tokens from the cache.

    files: read in this order. Blank lines are skipped.
    tokenizer: a transformers tokenizer with an end-of-text token.
    template: "chat" (the tokenizer's chat template), a text with "{question}" in it, behind which the answer
        begins at once, or "auto": the chat template if there is one, else `PLAIN_TEMPLATE`.
    max_length: tokens of prompt, answer and end of text together; longer examples are dropped and counted.
    cache_dir: where tokens are kept, in a file named after the digest; made if it does not exist.
    boundary: what ends a step; default: the tokens whose text contains a newline. With timing "pre" a segment
        ends before its line-ending token, which begins the next one.
    keep_marks: keep GSM8K's calculator marks (`<<48/2=24>>`), which are removed otherwise.

    Raises OSError where a file cannot be read, and ValueError, naming file and line where there is one: a line
    that is not JSON or lacks a key; an empty question or answer; "forced" ranges that are not ranges of the
    answer or that cut a token in two; a tokenizer without what is needed; no newline in any answer; nothing left.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("no data files were given: name at least one JSONL file")
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, but it must be 2 or more tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token: set tokenizer.eos_token")
    template = resolve_template(template, tokenizer)
    boundary = BoundaryConfig() if boundary is None else boundary
    ids = boundary.token_ids or newline_token_ids(tokenizer)
    if not ids:
        raise ValueError("the tokenizer has no token that contains a newline: use another, or boundary.token_ids")

    contents = [path.read_bytes() for path in paths]
    rules = [template, max_length, keep_marks, list(ids), boundary.min_step_length, boundary.timing]
    digest = _digest(contents, tokenizer, rules)
    cache = None if cache_dir is None else Path(cache_dir) / f"{digest}.safetensors"
    if cache is not None and (cached := _read_cache(cache, paths, digest)) is not None:
        return cached

    records = [r for path, content in zip(paths, contents, strict=True) for r in _records(path, content, keep_marks)]
    if not records:
        raise ValueError(f"{_names(paths)} holds no examples")
    prompts = encode_prompts(records, tokenizer, template)
    answers, offsets = _encode_answers(records, tokenizer)
    detector = BoundaryDetector(boundary, token_ids=ids)
    packer, too_long = _Packer(), 0
    lines_end = False
    for record, prompt, answer, offset in zip(records, prompts, answers, offsets, strict=True):
        mask = _mask(record, offset)
        lines_end = lines_end or not detector.line_ending_ids.isdisjoint(answer)
        if len(prompt) + len(answer) + 1 > max_length:
            too_long += 1
            continue
        answer = [*answer, tokenizer.eos_token_id]
        packer.add(record, prompt, answer, mask, _step_ends(detector, len(prompt), answer))
    if not lines_end:
        raise ValueError(
            f"no answer in {_names(paths)} holds a newline, so there is no step to learn from: "
            "write one step of reasoning per line"
        )
    dropped = {f"longer than {max_length} tokens": too_long} if too_long else {}
    if not packer.names:
        raise ValueError(f"every example of {_names(paths)} is longer than {max_length} tokens: raise max_length")
    dataset = Dataset(packer.pack(paths), dropped, digest, tuple(packer.sources))
    if cache is not None:
        _write_cache(cache, dataset)
    return dataset


def num_batches(dataset: Dataset, *, batch_size: int, world_size: int = 1) -> int:
    """How many batches `batches` yields per epoch, on every rank; ValueError as there."""
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size is {batch_size} and world_size {world_size}, but both must be 1 or more")
    count = len(dataset.examples) // (batch_size * world_size)
    if count == 0:
        raise ValueError(
            f"one batch of {batch_size} on {world_size} devices needs more than the {len(dataset.examples)} "
            "examples there are: use a smaller batch_size"
        )
    return count


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    bucket: int = 4,
) -> Iterator[list[Example]]:
    """The batches of one epoch on one of `world_size` devices: shuffled, of similar lengths, mixed step counts.

    batch_size: examples on each device. Together the devices' i-th batches are the i-th batch of one device with
        batch_size * world_size examples, whatever world_size is.
    seed, epoch: the same numbers give the same batches, on every machine.
    start: how many batches to skip, in order to go on where a run stopped.
    bucket: batches drawn from one band of lengths. More: step counts mix better and more tokens are padding; with
        as many as an epoch has, lengths play no part.

    A band is widened until at least one example in each of its batches can differ in its number of steps:
    batches of one step count made the first tokens of steps drift. Examples that fill no batch are left out;
    they are others in each epoch.

    Raises ValueError where a number makes no sense or where there are too few examples for one batch.
    """
    count = num_batches(dataset, batch_size=batch_size, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, but it must be from 0 to {world_size - 1}")
    if not 0 <= start <= count or bucket < 1:
        raise ValueError(f"start is {start} and bucket {bucket}, but they must be 0 to {count} and 1 or more")
    rows = _batch_rows(dataset.lengths(), dataset.num_steps(), batch_size * world_size, seed, epoch, bucket)
    for batch in rows[start:]:
        yield [dataset.examples[i] for i in batch[rank::world_size]]


def _batch_rows(lengths: Ints, steps: Ints, size: int, seed: int, epoch: int, bucket: int) -> list[list[int]]:
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))[: len(lengths) // size * size]
    rows: list[list[int]] = []
    for begin in range(0, len(order), size * bucket * _BANDS):
        chunk = order[begin : begin + size * bucket * _BANDS]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        for band in _bands(chunk, steps, size, bucket):
            # Dealt like cards sorted by suit: every batch gets its share of each step count.
            dealt = band[np.argsort(steps[band], kind="stable")]
            rows += [dealt[i :: len(band) // size].tolist() for i in range(len(band) // size)]
    return [rows[i] for i in generator.permutation(len(rows))]


def _bands(chunk: Ints, steps: Ints, size: int, bucket: int) -> list[Ints]:
    """Cut a chunk that is sorted by length; each band has enough of other step counts for all its batches."""

    def mixed(band: Ints) -> bool:
        return len(band) - int(np.unique(steps[band], return_counts=True)[1].max()) >= len(band) // size

    bands: list[Ints] = []
    begin = 0
    while begin < len(chunk):
        end = min(begin + size * bucket, len(chunk))
        while end < len(chunk) and not mixed(chunk[begin:end]):
            end += size
        bands.append(chunk[begin:end])
        begin = end
    while len(bands) > 1 and not mixed(bands[-1]):
        bands[-2:] = [np.concatenate(bands[-2:])]
    return bands


def read_lines(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and JSON object of each line of a JSONL file that is not blank.

    Raises ValueError, naming the file and the line, for a line that is not a JSON object in UTF-8.
    """
    for line, raw in enumerate(content.split(b"\n"), 1):
        if not raw.strip():
            continue
        name = f"{path}:{line}"
        try:
            values = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            _refuse(name, f"is not UTF-8 text: {error.reason} at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            _refuse(name, f"is not JSON: {error.msg} at character {error.colno}")
        except RecursionError:
            _refuse(name, "is not JSON that can be read: it is nested too deeply")
        if not isinstance(values, dict):
            _refuse(name, f"must be a JSON object, not {type(values).__name__}")
        yield line, values


def write_lines(lines: Sequence[Mapping[str, Any]], output: str | os.PathLike[str]) -> None:
    """Write JSON objects as a JSONL file, all or nothing; OSError where the disk refuses."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """One line. messages: the prompt's; forced: character ranges of the answer, its end of text counted as one."""

    path: Path
    line: int
    messages: list[dict[str, str]]
    answer: str
    forced: list[tuple[int, int]]
    source: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}"


def _records(path: Path, content: bytes, keep_marks: bool) -> Iterator[_Record]:
    for line, values in read_lines(path, content):
        name = f"{path}:{line}"
        messages, answer = read_conversation(name, values)
        forced = _forced(name, values.get("forced", []), answer)
        if not keep_marks and _MARK.search(answer):
            if forced:
                _refuse(name, 'has calculator marks and "forced" ranges: remove the marks first, or keep them')
            answer = _MARK.sub("", answer)
        if not answer.strip():
            _refuse(name, "has an empty answer: remove the line")
        source = values.get("source", f"{path.name}:{line}")
        if not isinstance(source, str):
            _refuse(name, f'has the "source" {source!r}, but it must be a text')
        yield _Record(path, line, messages, answer, forced, source)


def read_conversation(name: str, values: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """The prompt's messages and the answer of one line in either form. name: of the line, for messages.

    Raises ValueError for a line that lacks a key, an empty question, or half of a surrogate pair.
    """
    if "messages" in values:
        messages = values["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            _refuse(name, 'must have "messages" that are a list of objects with the texts "role" and "content"')
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            _refuse(name, 'must have two or more "messages", the last one with the role "assistant"')
        prompt = [{"role": m["role"], "content": m["content"]} for m in messages[:-1]]
        answer = messages[-1]["content"]
    else:
        for key in ("question", "answer"):
            if not isinstance(values.get(key), str):
                _refuse(name, f'has no text "{key}": a line needs "question" and "answer", or "messages"')
        prompt = [{"role": "user", "content": values["question"]}]
        answer = values["answer"]
    if not any(m["content"].strip() for m in prompt):
        _refuse(name, "has an empty question: remove the line")
    try:
        "".join([answer, *(m["content"] for m in prompt)]).encode()
    except UnicodeEncodeError:
        _refuse(name, "holds half of a surrogate pair, which is no text: remove the line")
    return prompt, answer


def _forced(name: str, ranges: Any, answer: str) -> list[tuple[int, int]]:
    last, checked = 0, []
    for pair in ranges if isinstance(ranges, list) else [ranges]:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(i) is int for i in pair)
            and last <= pair[0] < pair[1]
        ):
            _refuse(name, f'has "forced" {pair!r}, but it must be a list of ascending [begin, end] character ranges')
        last = pair[1]
        checked.append((pair[0], pair[1]))
    if last > len(answer) + 1:
        _refuse(name, f'has "forced" up to {last}, but the answer ends at {len(answer)}, its end of text one later')
    return checked


# --- tokens -----------------------------------------------------------------------------------------------------


class Conversation(Protocol):
    """name: for messages. messages: the prompt's."""

    @property
    def name(self) -> str: ...
    @property
    def messages(self) -> Sequence[Mapping[str, str]]: ...


def resolve_template(template: str, tokenizer: Any) -> str:
    """What "auto" is for this tokenizer, or `template` itself. ValueError where it is none or lacks a chat template."""
    if template == "auto":
        return "chat" if tokenizer.chat_template else PLAIN_TEMPLATE
    if template == "chat":
        if not tokenizer.chat_template:
            raise ValueError('template is "chat", but the tokenizer has no chat template: use "{question}" in a text')
    elif template.count("{question}") != 1:
        raise ValueError(f'template is {template!r}, but it must be "auto", "chat" or a text with one "{{question}}"')
    return template


def encode_prompts(records: Sequence[Conversation], tokenizer: Any, template: str) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins. template: as `resolve_template` returns it.

    Raises ValueError, naming the record, where it does not fit the template or has no tokens.
    """
    if template == "chat":
        texts = []
        for record in records:
            try:
                text = tokenizer.apply_chat_template(record.messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # whatever the template raises about an order of roles
                _refuse(record.name, f"does not fit the chat template: {error}")
            texts.append(text)
        # The template writes the special tokens itself.
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    else:
        for record in records:
            if len(record.messages) != 1 or record.messages[0]["role"] != "user":
                _refuse(record.name, "is a longer conversation, which needs the chat template")
        texts = [template.replace("{question}", record.messages[0]["content"]) for record in records]
        encoded = tokenizer(texts, verbose=False)
    prompts: list[list[int]] = encoded["input_ids"]
    for record, prompt in zip(records, prompts, strict=True):
        if not prompt:
            _refuse(record.name, "has a question without tokens: use another tokenizer, or remove the line")
    return prompts


def _encode_answers(records: Sequence[_Record], tokenizer: Any) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Tokens, and where they are known and needed the character range of each."""
    texts = [record.answer for record in records]
    forced = next((record for record in records if record.forced), None)
    if forced is None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], [[]] * len(records)
    if not tokenizer.is_fast:
        _refuse(forced.name, 'has "forced" ranges, which need a fast tokenizer (one with a tokenizer.json)')
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _mask(record: _Record, offsets: Sequence[tuple[int, int]]) -> list[bool] | None:
    """Per token of the answer and its end of text, whether the model has to produce it; None: all of them."""
    if not record.forced:
        return None
    forced = np.zeros(len(record.answer) + 1, bool)
    for begin, end in record.forced:
        forced[begin:end] = True
    mask = []
    for begin, end in [*offsets, (len(record.answer), len(record.answer) + 1)]:
        part = forced[begin:end]
        if part.any() != part.all():
            text = record.answer[begin:end]
            _refuse(record.name, f'has "forced" ranges that cut the token {text!r} at character {begin} in two')
        mask.append(not part.any())
    return mask


def _step_ends(detector: BoundaryDetector, prompt_length: int, answer: Sequence[int]) -> list[int]:
    """Where prompt and steps end, the last one at the end of text."""
    detector.start(0)
    detector.prompt(0, prompt_length)
    ends = [event.step_end for token in answer if (event := detector.decode(0, token)) is not None]
    return [*ends, prompt_length + len(answer)]


class _Packed(Sequence[Example]):
    """Examples in a few flat arrays: a hundred thousand of them as tuples would take gigabytes.

    tokens int32 and mask bool, [all tokens]; ends int32 [all segments], counted from the example's first token;
    token_begin, segment_begin int64 [examples + 1]; file int32, line int32 [examples]. rows: which of these are
    in this part, in order.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], paths: Sequence[Path], rows: Ints | None = None) -> None:
        self.arrays = arrays
        self.paths = tuple(paths)
        self.rows: Ints = np.arange(len(arrays["file"])) if rows is None else rows

    def take(self, rows: Ints) -> _Packed:
        return _Packed(self.arrays, self.paths, self.rows[rows])

    def lengths(self) -> Ints:
        lengths: Ints = np.diff(self.arrays["token_begin"])[self.rows]
        return lengths

    def prompts(self) -> list[bytes]:
        a = self.arrays
        begins = a["token_begin"][self.rows]
        ends = begins + a["ends"][a["segment_begin"][self.rows]]
        return [a["tokens"][begin:end].tobytes() for begin, end in zip(begins, ends, strict=True)]

    def tokens(self) -> Iterator[npt.NDArray[np.int32]]:
        a = self.arrays
        return (a["tokens"][a["token_begin"][row] : a["token_begin"][row + 1]] for row in self.rows)

    def num_steps(self) -> Ints:
        steps: Ints = np.diff(self.arrays["segment_begin"])[self.rows] - 1
        return steps

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> _Packed: ...
    def __getitem__(self, index: int | slice) -> Example | _Packed:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = self.rows[index]
        a = self.arrays
        tokens = slice(a["token_begin"][row], a["token_begin"][row + 1])
        ends = a["ends"][a["segment_begin"][row] : a["segment_begin"][row + 1]].tolist()
        return Example(
            tuple(a["tokens"][tokens].tolist()),
            tuple(zip([0, *ends[:-1]], ends, strict=True)),
            tuple(a["mask"][tokens].tolist()),
            self._name(row),
        )

    def names(self) -> list[str]:
        return [self._name(row) for row in self.rows]

    def _name(self, row: int) -> str:
        return f"{self.paths[self.arrays['file'][row]]}:{self.arrays['line'][row]}"


class _Packer:
    """Collects examples for `_Packed`."""

    def __init__(self) -> None:
        self.tokens: list[npt.NDArray[np.int32]] = []
        self.masks: list[npt.NDArray[np.bool_]] = []
        self.ends: list[list[int]] = []
        self.names: list[tuple[Path, int]] = []
        self.sources: list[str] = []

    def add(
        self, record: _Record, prompt: list[int], answer: list[int], mask: list[bool] | None, ends: list[int]
    ) -> None:
        self.tokens.append(np.array(prompt + answer, np.int32))
        self.masks.append(np.array([False] * len(prompt) + (mask or [True] * len(answer)), bool))
        self.ends.append(ends)
        self.names.append((record.path, record.line))
        self.sources.append(record.source)

    def pack(self, paths: Sequence[Path]) -> _Packed:
        number = {path: i for i, path in enumerate(paths)}
        return _Packed(
            {
                "tokens": np.concatenate(self.tokens),
                "mask": np.concatenate(self.masks),
                "ends": np.array([end for ends in self.ends for end in ends], np.int32),
                "token_begin": np.cumsum([0, *map(len, self.tokens)], dtype=np.int64),
                "segment_begin": np.cumsum([0, *map(len, self.ends)], dtype=np.int64),
                "file": np.array([number[path] for path, _ in self.names], np.int32),
                "line": np.array([line for _, line in self.names], np.int32),
            },
            paths,
        )


# --- the cache --------------------------------------------------------------------------------------------------


def _digest(contents: Iterable[bytes], tokenizer: Any, rules: list[Any]) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        described = json.loads(backend.to_str())
        # Left there by whoever used it last; we neither pad nor truncate.
        described |= {"padding": None, "truncation": None}
    what = [_FORMAT, described, tokenizer.chat_template, tokenizer.eos_token_id, rules]
    digest.update(json.dumps(what, sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _write_cache(cache: Path, dataset: Dataset) -> None:
    """All or nothing, whoever else writes the same file."""
    assert isinstance(dataset.examples, _Packed)
    cache.parent.mkdir(parents=True, exist_ok=True)
    kept = {"digest": dataset.digest, "dropped": dataset.dropped, "sources": dataset.sources}
    descriptor, unfinished = tempfile.mkstemp(dir=cache.parent, prefix=cache.stem[:16], suffix=".new")
    os.close(descriptor)
    try:
        save_file(dataset.examples.arrays, unfinished, {"kept": json.dumps(kept)})
        descriptor = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(unfinished, cache)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _read_cache(cache: Path, paths: Sequence[Path], digest: str) -> Dataset | None:
    """None where there is none, or a damaged one: it is made again then."""
    try:
        with safe_open(cache, framework="np") as file:
            kept = json.loads((file.metadata() or {})["kept"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    if kept["digest"] != digest:
        return None
    return Dataset(_Packed(arrays, paths), kept["dropped"], digest, tuple(kept["sources"]))


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _refuse(name: str, message: str) -> NoReturn:
    raise ValueError(f"{name} {message}")


__all__ = [
    "HELD_BACK",
    "PLAIN_TEMPLATE",
    "Conversation",
    "Dataset",
    "Example",
    "batches",
    "encode_prompts",
    "load_examples",
    "num_batches",
    "read_conversation",
    "read_lines",
    "resolve_template",
    "write_lines",
]
