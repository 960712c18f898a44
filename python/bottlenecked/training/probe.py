"""Before training: do the backbone's KV rows hold what a Processor would have to move?

A Processor can only move what the rows it sees already hold. A backbone can answer as well as another and still keep a
needed name nowhere that a row tells; no Processor trains on it. A linear probe asks each layer by itself: can a linear
map of its KV rows, keys and values, tell the label? If it cannot tell more than the commonest label would, there is
nothing to move from there. RoPE on the keys is undone first, where we can: it hides from a linear map what a Processor,
which is none, may well find.

Asked are, for any file, the first tokens of the next step, from the row of the last token of a step; and, where lines
have "probes" (those of `tasks` do), what these name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .. import backbones
from ..config import BoundaryConfig, CacheProcessorConfig
from .data import Example, load_examples, read_lines

if TYPE_CHECKING:
    import torch

Part = Literal["both", "keys", "values"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Classes of a probe: the commonest labels. Each fold must be able to learn each.
_MOST_CLASSES = 32
_LEAST_ROWS = 60
_FOLDS = 5
_NEXT_TOKENS = 3
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_RESAMPLES = 1000
_BATCH = 16


@dataclass(frozen=True)
class Accuracy:
    """A share of rows told right by probes that had not seen their examples.

    low, high: its 95% interval, by a bootstrap over examples.
    """

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Finding:
    """One probe.

    what: from which rows, what. rows, classes: how many. covered: share of the rows whose label is one of the classes,
        the commonest; the others are left out.
    majority: share of the commonest label: what a probe reaches that sees nothing.
    shuffled: the best layer of the same probes with shuffled labels: what they reach by chance.
    layers: per layer. best: the layer that tells most.
    low, high: 95% interval of what the best layer tells beyond the larger of majority and shuffled.
    required: whether the task's own "probes" ask for it.
    """

    what: str
    rows: int
    classes: int
    covered: float
    majority: float
    shuffled: float
    layers: list[Accuracy]
    best: int
    low: float
    high: float
    required: bool

    @property
    def verdict(self) -> Literal["held", "partly held", "barely held", "not held"]:
        """In a word. The share is that of what the baseline leaves open."""
        baseline = max(self.majority, self.shuffled)
        share = (self.layers[self.best].share - baseline) / max(1 - baseline, 1e-9)
        if self.low <= 0 or share < 0.05:
            return "not held"
        return "held" if share > 0.8 else "partly held" if share > 0.3 else "barely held"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the verdict among them."""
        return {**asdict(self), "verdict": self.verdict}


def probe(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    template: str = "auto",
    max_length: int = 512,
    max_examples: int = 400,
    part: Part = "both",
    boundary: BoundaryConfig | None = None,
    seed: int = 0,
) -> list[Finding]:
    """Probe the KV rows that a backbone writes for JSONL problems with their answers.

    model: a transformers causal language model with a plain KV cache. files, template, max_length, boundary: as in
        `load_examples`. max_examples: so many random ones; the interval shrinks and time grows with them.
    part: the whole rows, or the halves of the keys or of the values alone. Keys are with RoPE undone for the rope types
        that `CacheProcessorConfig.inv_freq` knows, else as cached.

    Returns one finding per question that has at least 60 rows of at least two labels, each label common enough for
    cross-validation. Raises ValueError as `load_examples`, for "probes" that point outside their text, or where no
    question has rows enough; NotImplementedError for a cache that is not made of one key and value tensor per layer.
    """
    if max_examples < _FOLDS:
        raise ValueError(f"max_examples is {max_examples}, but {_FOLDS} or more are needed")
    dataset = load_examples(files, tokenizer, template=template, max_length=max_length, boundary=boundary)
    count = len(dataset.examples)
    chosen = np.sort(np.random.default_rng([seed, 1]).permutation(count)[:max_examples])
    examples = [dataset.examples[int(i)] for i in chosen]
    asked: dict[str, list[tuple[int, int, Any]]] = {}  # what -> (example, token, label)
    for number, example in enumerate(examples):
        for (_, end), (begin, after) in zip(example.segments, example.segments[1:], strict=False):
            where = "end of the prompt" if begin == example.segments[0][1] else "end of a step"
            for j in range(min(_NEXT_TOKENS, after - begin)):
                what = f"{where}: token {j + 1} of the next step"
                asked.setdefault(what, []).append((number, end - 1, example.tokens[begin + j]))
    own = _own_probes(files, examples, tokenizer)
    asked |= own
    positions = sorted({(number, token) for rows in asked.values() for number, token, _ in rows})
    rows = _kv_rows(model, examples, positions, part, _inv_freq(model))
    place = {position: i for i, position in enumerate(positions)}

    findings = []
    for what, entries in asked.items():
        labels, kept, covered = _classes([label for _, _, label in entries])
        if len(kept) < _LEAST_ROWS or labels.max(initial=0) < 1:
            continue
        groups = np.array([entries[i][0] for i in kept], np.int64)
        index = np.array([place[entries[i][:2]] for i in kept], np.int64)
        findings.append(_finding(what, rows[:, index], labels, groups, covered, what in own, seed))
    if not findings:
        raise ValueError(f"{count} examples give no question {_LEAST_ROWS} rows of two or more labels: give more data")
    return findings


def lacking(findings: Sequence[Finding]) -> list[str]:
    """What the task's own "probes" ask for and the rows do not hold well.

    Of a subject with several properties ("a fact: name, from its end", "a fact: value, from its end"), one place must
    hold all: a row is found by one of them and read for another, so it is of no use where another row holds the rest.
    """
    subjects: dict[str, dict[str, list[str]]] = {}  # subject -> property -> places that hold it
    for finding in findings:
        if finding.required:
            text, _, place = finding.what.partition(", from ")
            subject, _, said = text.partition(": ")
            places = subjects.setdefault(subject, {}).setdefault(said, [])
            if finding.verdict == "held":
                places.append(place)
    lost = {subject: held for subject, held in subjects.items() if not set.intersection(*map(set, held.values()))}
    return [subject + (f": {' and '.join(held)}" if any(held) else "") for subject, held in lost.items()]


def conclusion(findings: Sequence[Finding]) -> str:
    """What the findings mean for training, in a few plain sentences."""
    if any(finding.required for finding in findings):
        lost = lacking(findings)
        if not lost:
            return (
                "The rows hold what this task needs moved. If the backbone also does well what a single look-up can, "
                "training a Processor is worth its time."
            )
        return (
            f"The rows do not hold, or not well: {'; '.join(lost)}. A Processor cannot move what no row tells: "
            "train the backbone further, or from another seed, and probe again before training a Processor."
        )
    judged = [f for f in findings if f.what.startswith("end of a step")] or list(findings)
    if all(f.verdict == "not held" for f in judged):
        return (
            "At the end of a step no layer's row tells what comes next: the backbone plans nothing that a rewrite of "
            "these rows could improve. Fine-tune it on such data first, and probe again; more examples tell more."
        )
    much = "something" if any(f.verdict in ("held", "partly held") for f in judged) else "a little"
    return (
        f"Rows at the end of a step tell {much} of the next one, so a rewrite of them can reach it. How much a "
        "Processor gains, only training tells."
    )


# --- rows -------------------------------------------------------------------------------------------------------


def _own_probes(
    files: Sequence[str | Path], examples: Sequence[Example], tokenizer: Any
) -> dict[str, list[tuple[int, int, Any]]]:
    """The "probes" of the lines that the examples were made of, at their tokens."""
    wanted = {example.name: number for number, example in enumerate(examples)}
    found: dict[str, list[tuple[int, int, Any]]] = {}
    for path in map(Path, dict.fromkeys(map(str, files))):
        for line, values in read_lines(path, path.read_bytes()):
            name = f"{path}:{line}"
            if name not in wanted or "probes" not in values:
                continue
            number = wanted[name]
            token_at = _token_at(examples[number], values, tokenizer)
            if not isinstance(values["probes"], Mapping):
                raise ValueError(f'{name} has "probes" that are not an object')
            for what, rows in values["probes"].items():
                for row in rows:
                    try:
                        where, at, label = row
                        token = token_at[where][at]
                    except (KeyError, IndexError, TypeError, ValueError):
                        raise ValueError(f"{name} has the probe {row!r}, which names no character of it") from None
                    found.setdefault(what, []).append((number, token, label))
    return found


def _token_at(example: Example, values: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """For question and answer, the token that writes each character.

    Found from the text that tokens decode to, so that any template will do.
    """
    cut = example.segments[0][1]
    places = {}
    for name, begin, end in (("question", 0, cut), ("answer", cut, len(example.tokens))):
        pieces = [tokenizer.decode([t]) for t in example.tokens[begin:end]]
        of_character = [begin + i for i, piece in enumerate(pieces) for _ in piece]
        start = "".join(pieces).rfind(values[name]) if isinstance(values.get(name), str) else -1
        places[name] = of_character[start : start + len(values[name])] if start >= 0 else []
    return places


def _inv_freq(model: Any) -> list[float] | None:
    """RoPE's angle per position, in radians, of each pair of a head; None where there is none that we can undo."""
    try:
        return CacheProcessorConfig(**backbones.describe(model.config.to_dict())).inv_freq()
    except ValueError:
        return None


def _kv_rows(
    model: Any,
    examples: Sequence[Example],
    positions: Sequence[tuple[int, int]],
    part: Part,
    inv_freq: Sequence[float] | None,
) -> npt.NDArray[np.float32]:
    """KV rows at (example, token) positions, in order: [layers, positions, features]; RoPE undone by `inv_freq`."""
    import torch

    collected: list[npt.NDArray[np.float32]] = []
    for begin in range(0, len(examples), _BATCH):
        batch = examples[begin : begin + _BATCH]
        width = max(len(example.tokens) for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(batch):
            # Padded on the right: causal attention keeps it from the rows before.
            ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
            mask[row, : len(example.tokens)] = 1
        with torch.inference_mode():
            output = model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=True, logits_to_keep=1)
        here = [(number - begin, token) for number, token in positions if begin <= number < begin + len(batch)]
        sequence, token = (torch.tensor([p[i] for p in here], device=model.device) for i in (0, 1))
        layers = []
        for keys, values in _layers(output):
            k, v = (half[sequence, :, token].float().cpu().numpy() for half in (keys, values))
            halves = {"both": (_unrotated(k, token.cpu().numpy(), inv_freq), v), "values": (v,)}
            halves["keys"] = halves["both"][:1]
            layers.append(np.concatenate([half.reshape(len(here), -1) for half in halves[part]], 1))
        collected.append(np.stack(layers))
    return np.concatenate(collected, 1)


def _layers(output: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [batch, KV heads, tokens, head_dim]."""
    layers = []
    for cache in backbones.kv_cache(output).layers:
        keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise NotImplementedError("this backbone's cache is not made of one key and value tensor per layer")
        layers.append((keys, values))
    return layers


def _unrotated(
    keys: npt.NDArray[np.float32], positions: Ints, inv_freq: Sequence[float] | None
) -> npt.NDArray[np.float32]:
    """keys [rows, KV heads, head_dim] with RoPE undone; element i of a head is paired with i + head_dim / 2."""
    if inv_freq is None:
        return keys
    angles = positions[:, None, None] * np.array(inv_freq)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = np.split(keys, 2, 2)
    return np.concatenate([a * cos + b * sin, b * cos - a * sin], 2).astype(np.float32)


# --- probes -----------------------------------------------------------------------------------------------------


def _classes(labels: Sequence[Any]) -> tuple[Ints, Ints, float]:
    """Numbers of the commonest labels, the rows that have one of these, and their share of all."""
    counts = Counter(labels).most_common(_MOST_CLASSES)
    number = {label: i for i, (label, count) in enumerate(counts) if count >= 2 * _FOLDS}
    kept = [i for i, label in enumerate(labels) if label in number]
    return np.array([number[labels[i]] for i in kept], np.int64), np.array(kept, np.int64), len(kept) / len(labels)


def _finding(
    what: str,
    rows: npt.NDArray[np.float32],
    labels: Ints,
    groups: Ints,
    covered: float,
    required: bool,
    seed: int,
) -> Finding:
    """rows [layers, n, features], labels and groups (examples) [n]."""
    generator = np.random.default_rng([seed, 2])
    members = np.unique(groups)
    fold = dict(zip(members.tolist(), (generator.permutation(len(members)) % _FOLDS).tolist(), strict=True))
    folds = np.array([fold[g] for g in groups.tolist()], np.int64)
    shuffled = generator.permutation(labels)
    majority = np.zeros(len(labels))
    for k in range(_FOLDS):
        majority[folds == k] = labels[folds == k] == np.bincount(labels[folds != k]).argmax()
    right, by_chance = [], []
    for layer in rows:
        told = _cross_validated(layer.astype(np.float64), np.stack([labels, shuffled]), folds)
        right.append((told[0] == labels).astype(np.float64))
        by_chance.append(float((told[1] == shuffled).mean()))

    # Examples are drawn, not rows: those of one example are alike.
    number = np.searchsorted(members, groups)
    drawn = generator.multinomial(len(members), [1 / len(members)] * len(members), _RESAMPLES)
    sizes = drawn @ np.bincount(number, minlength=len(members))

    def resampled(per_row: Floats) -> tuple[float, float]:
        shares = drawn @ np.bincount(number, per_row, len(members)) / sizes
        low, high = np.quantile(shares, (0.025, 0.975))
        return float(low), float(high)

    layers = [Accuracy(float(r.mean()), *resampled(r)) for r in right]
    best = int(np.argmax([layer.share for layer in layers]))
    chance = max(by_chance)
    low, high = resampled(right[best] - (majority if majority.mean() >= chance else chance))
    return Finding(
        what=what,
        rows=len(labels),
        classes=int(labels.max()) + 1,
        covered=covered,
        majority=float(majority.mean()),
        shuffled=chance,
        layers=layers,
        best=best,
        low=low,
        high=high,
        required=required,
    )


def _cross_validated(x: Floats, labels: Ints, folds: Ints) -> Ints:
    """Labels that ridge regression onto one-hot labels tells for the rows of each fold from those of the others.

    x [n, features]; labels [sets, n], several sets of labels for the same rows; returns [sets, n]. The strength of
    the ridge is chosen in the training rows, by their leave-one-out accuracy, which has a closed form.
    """
    told = np.zeros_like(labels)
    classes = int(labels.max()) + 1
    for k in range(_FOLDS):
        train, test = folds != k, folds == k
        if not test.any():
            continue
        middle, scale = x[train].mean(0), x[train].std(0) + 1e-6
        a = np.concatenate([(x[train] - middle) / scale, np.ones((int(train.sum()), 1))], 1)
        b = np.concatenate([(x[test] - middle) / scale, np.ones((int(test.sum()), 1))], 1)
        eigenvalues, vectors = np.linalg.eigh(a.T @ a)
        projected = a @ vectors
        for i, own in enumerate(labels):
            y = np.eye(classes)[own[train]]
            moment = projected.T @ y
            best, chosen = -1.0, _RIDGES[0]
            for ridge in _RIDGES:
                weight = 1 / (np.maximum(eigenvalues, 0) + ridge * len(a))
                leverage = ((projected**2) @ weight)[:, None]
                fitted = projected @ (weight[:, None] * moment)
                left_out = (fitted - leverage * y) / np.maximum(1 - leverage, 1e-6)
                accuracy = float((left_out.argmax(1) == own[train]).mean())
                if accuracy > best:
                    best, chosen = accuracy, ridge
            weight = 1 / (np.maximum(eigenvalues, 0) + chosen * len(a))
            told[i, test] = (b @ vectors @ (weight[:, None] * moment)).argmax(1)
    return told


__all__ = ["Accuracy", "Finding", "conclusion", "lacking", "probe"]
