"""More problems out of GSM8K-like ones: the numbers are re-drawn, through the calculator marks of the answer.

    Tom has 4 boxes of 12 eggs.   He has 4*12 = <<4*12=48>>48 eggs.   #### 48
    Tom has 6 boxes of 12 eggs.   He has 6*12 = <<6*12=72>>72 eggs.   #### 72

A mark holds a calculation and its result. Every number in it is traced to where it came from: the question, an
earlier result, or a constant that the question's words imply (half: 2, week: 7). Numbers of the question that enter
a calculation are drawn anew; all marks are evaluated again, exactly, and every number in the answer's text is
replaced by what it has become. A number must have one meaning: where it could be two that are no longer equal, or
none, the draw is thrown away. Nothing here understands a sentence, so whatever might be read in two ways is rejected,
with a reason that is counted.
"""

from __future__ import annotations

import ast
import itertools
import operator
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .data import read_lines

_MARK = re.compile(r"<<([^<>\n]*)>>")
_FINAL = re.compile(r"(^|\n)#### *\$?([\d,]*\.?\d+)\s*$")
_OPERATOR = re.compile(r"\s*[-+*/x×÷%]")
_BEHIND = re.compile(r"\s*\$?\s*([\d,]*\.?\d+)")
# A calculation and its result in plain text, where the marks have been taken out.
_EQUATION = re.compile(r"(?<![\w.,])([\d.$(][\d.,$()+\-*/x×÷% ]*)(?==\s*\$?\s*((?:[\d,]*\.)?\d[\d,]*))")
# Both sides of a comparison in plain text, of numbers alone; with a letter behind it (2x), or in a time or a ratio, it
# is something else.
_SIDE = r"[\d.$][\d.,$+\-*/x×÷% ]*"
_COMPARISON = re.compile(rf"(?<![\w.,:])({_SIDE})(?=(<=|>=|≤|≥|<|>)\s*({_SIDE})(?![\w:]))")
_HOLDS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, "≤": operator.le, ">=": operator.ge, "≥": operator.ge}
# Digits that letters or points join to something else ("x2", "v1.2.3") are no number.
_NUMBER = re.compile(r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?![\w.,]*\d)")
_MARK_CHARACTERS = re.compile(r"[-+*/().\d ]+")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


def _table(text: str) -> dict[str, tuple[int, ...]]:
    """Lines of "numbers: words"."""
    table: dict[str, tuple[int, ...]] = {}
    for line in text.strip().splitlines():
        numbers, _, words = line.partition(":")
        for word in words.split():
            table[word] = (*table.get(word, ()), *map(int, numbers.split()))
    return table


_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_SMALL = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()  # noqa: SIM905
_COUNTING = {*_SMALL, *_TENS}
# What a word may put into a calculation without a digit in the question. A final s is taken off where needed.
_IMPLIED: dict[str, tuple[int, ...]] = {
    **{word: (n,) for n, word in enumerate(_SMALL, 1)},
    **{ten: (10 * n,) for n, ten in enumerate(_TENS, 2)},
    **{f"{ten}-{one}": (10 * n + m,) for n, ten in enumerate(_TENS, 2) for m, one in enumerate(_SMALL[:9], 1)},
    **_table("""
        2: half halve halved halves halving halfway twice double doubled doubling couple pair both twin semester pint
        2: rectangle rectangular perimeter circle weekend square duplex
        3: third triple tripled tripling thrice yard trio triangle triplet
        4: quarter fourth quadruple quadrupled square rectangle rectangular perimeter quart gallon week month
        5: fifth nickel weekday quintuple week
        6: sixth cube hexagon half-dozen
        7: seventh week weekly day daily
        8: eighth pint gallon cup
        9: ninth
        10: tenth dime decade
        12: month monthly year yearly annual annually foot feet inch inche dozen
        14: fortnight
        16: ounce pound gallon cup
        24: day daily hour hourly
        25: quarter
        26: biweekly
        30 31: month monthly day daily
        28 29: february
        52: week weekly year yearly annual annually
        60: hour hourly minute second
        90 180 360: degree angle circle
        100: percent percentage cent penny pennie century meter centimeter dollar hundred
        365 366: day daily year yearly leap
        1000: kilometer km kilogram kg gram liter milliliter ml ton thousand
        2000: pound ton
        3600: hour second
        1000000: million
    """),
}
_MAGNITUDES = {"dozen": 12, "dozens": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
# A number that must not exceed what its unit counts, where the question speaks of the larger one.
_CAPS = {"day": ("week", 7), "hour": ("day", 24), "minute": ("hour", 60), "month": ("year", 12)}
_MONTH = "january|february|march|april|may|june|july|august|september|october|november|december"
# What stands directly before a number that is no amount, or a condition on one.
_NO_AMOUNT = re.compile(rf"(?:\b(?:{_MONTH}|grade|chapter|room|number|no\.|route|highway)|[#:/]|\d-) *$", re.I)
_CONDITION = re.compile(
    r"\b(?:more than|less than|fewer than|at least|at most|over|under|above|below|exceed(?:s|ing)?|up to|within|"
    r"first|every|minimum of|maximum of|limit of|limited to|only)\s+\$?$",
    re.I,
)
# What stands directly behind one: letters, a fraction bar, a percentage, a time of day, a range, a magnitude.
_NO_AMOUNT_BEHIND = re.compile(
    r"[a-z]| */|[ -]?(?:%|percent\b)|:\d| *(?:[ap]\.?m\b|o'?clock)|-\d|"
    r"[ -](?:hundred|thousand|million|billion|dozen|to \d|degree)",
    re.I,
)
# Where a question has such a word, its answer may compare numbers and go on with one of them.
_GRADE = "bigg|busi|cheap|earli|fast|great|heavi|high|larg|light|long|low|old|short|slow|small|tall|young"
_CHOICE = re.compile(
    rf"\b(?:(?:{_GRADE})est|(?:the|is|are)\s(?:{_GRADE})er(?!\sthan)|more\sexpensive(?!\sthan)|which\b[^.?!]*\?|"
    r"whichever|whoever|winners?|wins|better|best(?!\sfriend)|worse|worst|(?<!at\s)(?:most|least)|fewest|maximum|"
    r"minimum|choos(?:es?|ing)|choices?|options?)(?!\w)",
    re.I,
)

MALFORMED = "a calculator mark is malformed"
WRONG = "a calculator mark or the final answer is wrong or rounded"
NO_MARKS = "there are no calculator marks"
NOT_COMPUTED = "the final answer is not a mark's result"
UNKNOWN = "a number's origin is unknown"
NOTHING = "no number of the question can be drawn anew"
CONDITION = "a condition of the question may no longer hold"
UNUSED = "a number of the question enters no calculation, and may bound the others"
AMBIGUOUS = "a number has two meanings"
UNNATURAL = "no draw keeps all numbers natural"
COMPARED = "no draw keeps the order of numbers that may be compared"


class Rejected(ValueError):
    """A problem, or one draw of its numbers, that is not used; the message is one of this module's reasons."""


@dataclass(frozen=True)
class Augmented:
    """What became of a file's problems.

    lines: JSON objects with "question", "answer" and "source", the file and line a problem was made from.
    problems: how many the file has. varied: of how many at least one copy was made.
    rejected: reason -> problems without a copy.
    """

    lines: list[dict[str, str]]
    problems: int
    varied: int
    rejected: dict[str, int]


@dataclass(frozen=True)
class _Number:
    """A number written as `text` at `begin`."""

    begin: int
    text: str
    value: Fraction


@dataclass(frozen=True)
class _Mark:
    """`<<expression=result>>`. Numbers are indices into the answer's.

    leaves: those in the expression, from left to right. result: the value.
    results: those that are this result: in the mark and directly behind it, and in `#### n` for the last mark.
    mirrored: number in the text before -> the leaf it repeats, as in `4*12 = <<4*12=48>>`.
    """

    tree: ast.expr
    leaves: list[int]
    result: Fraction
    results: list[int]
    mirrored: dict[int, int]


@dataclass(frozen=True)
class _Problem:
    """A parsed problem.

    fixed: values that have a meaning which no draw changes.
    variables: value -> (step, multiples of it that may be drawn in its place, the value itself among them).
    commas: whether its large numbers are written 1,000.
    compares: whether the answer may choose one of its numbers, for being more or less than another.
    """

    question: str
    answer: str
    asked: list[_Number]
    told: list[_Number]
    marks: list[_Mark]
    fixed: frozenset[Fraction]
    variables: dict[Fraction, tuple[Fraction, range]]
    commas: bool
    compares: bool


def augment_file(file: str | os.PathLike[str], *, copies: int = 1, seed: int = 0) -> Augmented:
    """Re-draw the numbers of every problem in a JSONL file with "question" and "answer".

    copies: at most so many of each problem, all different.
    seed: a problem's copies depend on it and on the problem's text alone.

    Raises OSError where the file cannot be read; ValueError for a file whose name contains "test" (a test set, and
    anything made of it, must never be trained on), for a line that is not such an object (file and line named) and
    for copies below 1.
    """
    path = Path(file)
    if "test" in path.name.lower():
        raise ValueError(f"{path} looks like a test set, which must not be trained on: give the training file")
    if copies < 1:
        raise ValueError(f"copies is {copies}, but it must be 1 or more")
    lines: list[dict[str, str]] = []
    rejected: Counter[str] = Counter()
    problems = varied = 0
    for line, values in read_lines(path, path.read_bytes()):
        problems += 1
        question, answer = values.get("question"), values.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f'{path}:{line} must have the texts "question" and "answer"')
        try:
            made = list(redraw(question, answer, copies=copies, seed=seed))
        except Rejected as reason:
            rejected[str(reason)] += 1
            continue
        varied += 1
        lines += [{"question": q, "answer": a, "source": f"{path.name}:{line}"} for q, a in made]
    return Augmented(lines, problems, varied, dict(rejected.most_common()))


def redraw(
    question: str, answer: str, *, copies: int = 1, seed: int = 0, tries: int = 100
) -> Iterator[tuple[str, str]]:
    """Up to `copies` different (question, answer) pairs with other numbers; `verify` accepts each.

    tries: draws per copy. Raises Rejected, when the first pair is asked for, where there is none.
    """
    problem = _parse(question, answer)
    generator = random.Random(f"{seed}:{question}")
    reasons: Counter[str] = Counter()
    seen = {question}
    for _ in range(copies):
        for attempt in range(tries):
            chosen = list(problem.variables)
            if attempt > tries // 2:  # fewer new numbers break less
                chosen = generator.sample(chosen, generator.randint(1, len(chosen)))
            try:
                new = _rewrite(problem, {value: _draw(generator, *problem.variables[value]) for value in chosen})
            except Rejected as reason:
                reasons[str(reason)] += 1
                continue
            if new[0] not in seen:
                seen.add(new[0])
                yield new
                break
    if len(seen) == 1:
        raise Rejected(reasons.most_common(1)[0][0] if reasons else UNNATURAL)


def verify(answer: str) -> None:
    """Evaluate every calculator mark of an answer exactly, and compare its final `#### n`.

    Raises Rejected, with the reason, where there is no mark, where one is malformed, where a result, in a mark,
    behind it or in an equation of the text, is not what the calculation gives, where a comparison in the text, such
    as `3*4 < 15`, is false, or where the final answer is no mark's result.
    """
    numbers = _numbers(answer)
    marks = _marks(answer, numbers)
    for mark in marks:
        leaves = [numbers[i].value for i in mark.leaves]
        if _evaluate(mark.tree, leaves, leaves)[0] != mark.result:
            raise Rejected(WRONG)
    for match in _MARK.finditer(answer):
        result, behind = match[1].rpartition("=")[2], _BEHIND.match(answer, match.end())
        if behind is not None and _value(behind[1]) != _value(result.strip()):
            raise Rejected(WRONG)
    text = _MARK.sub("", answer)
    for match in _EQUATION.finditer(text):
        whole = not re.search(r"[-+*/×÷(%]\s*$|\bx\s*$", text[: match.start()])
        if whole and _plainly(match[1]) not in (None, _value(match[2])):
            raise Rejected(WRONG)
    for match in _COMPARISON.finditer(text):
        left, right = _plainly(match[1], least=1), _plainly(match[3].rstrip(" .,"), least=1)
        part = re.search(r"[-+*/×÷)]\s*$|\bx\s*$", text[: match.start()])
        if not part and left is not None and right is not None and not _HOLDS[match[2]](left, right):
            raise Rejected(WRONG)
    final = _FINAL.search(answer)
    if final is None or final[2] not in {n.text for n in numbers} or _value(final[2]) not in {m.result for m in marks}:
        raise Rejected(NOT_COMPUTED)


# --- reading ----------------------------------------------------------------------------------------------------


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _numbers(text: str) -> list[_Number]:
    return [_Number(m.start(), m[0], _value(m[0])) for m in _NUMBER.finditer(text)]


def _marks(answer: str, numbers: Sequence[_Number]) -> list[_Mark]:
    """All marks, checked for form only."""
    place = {number.begin: i for i, number in enumerate(numbers)}
    found = list(_MARK.finditer(answer))
    if not found:
        raise Rejected(NO_MARKS)
    final = _FINAL.search(answer)
    marks: list[_Mark] = []
    line_begin = 0
    for match in found:
        source, equals, shown = match[1].partition("=")
        begin, middle = match.start(1), match.start(1) + len(source)
        leaves = [i for i, n in enumerate(numbers) if begin <= n.begin < middle]
        inside = [i for i, n in enumerate(numbers) if middle <= n.begin < match.end(1)]
        tree = _expression(source)
        if not equals or len(inside) != 1 or numbers[inside[0]].text != shown.strip() or len(leaves) != _count(tree):
            raise Rejected(MALFORMED)
        result = numbers[inside[0]].value
        behind = _BEHIND.match(answer, match.end())
        if behind is not None and (i := place.get(behind.start(1))) is not None and numbers[i].value == result:
            inside.append(i)
        if final is not None and match is found[-1]:
            i = place.get(final.start(2))
            if i is not None and numbers[i].value == result:
                inside.append(i)
        # The text before, back to the previous mark or the start of the line.
        line_begin = max(line_begin, answer.rfind("\n", 0, match.start()) + 1)
        before = [i for i, n in enumerate(numbers) if line_begin <= n.begin < match.start()][-len(leaves) :]
        same = [numbers[i].value for i in before] == [numbers[i].value for i in leaves]
        marks.append(_Mark(tree, leaves, result, inside, dict(zip(before, leaves, strict=True)) if same else {}))
        line_begin = match.end() if behind is None else behind.end()
    return marks


def _expression(source: str) -> ast.expr:
    """Numbers, + - * / and parentheses; nothing else is ever evaluated."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", source).strip()
    if len(plain) > 200 or not _MARK_CHARACTERS.fullmatch(plain):
        raise Rejected(MALFORMED)
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise Rejected(MALFORMED) from None
    _count(tree)
    return tree


def _plainly(text: str, *, least: int = 2) -> Fraction | None:
    """The value of a calculation in plain text, such as "$3 x 20%", of `least` numbers; None: it is something else."""
    text = re.sub(r"([\d.]+)%", r"(\1/100)", text.replace("$", "").replace("×", "*").replace("÷", "/"))
    text = re.sub(r"(?<=[\d.) ])x(?=[\d.( ])", "*", text)
    try:
        tree = _expression(text)
        leaves = [number.value for number in _numbers(text)]
        return _evaluate(tree, leaves, leaves)[0] if len(leaves) == _count(tree) >= least else None
    except Rejected:
        return None


def _count(tree: ast.expr) -> int:
    """How many numbers are in a calculation; Rejected where something else is."""
    match tree:
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right):
            return _count(left) + _count(right)
        case ast.UnaryOp(ast.UAdd() | ast.USub(), operand):
            return _count(operand)
        case ast.Constant(int() | float()):
            return 1
    raise Rejected(MALFORMED)


def _parse(question: str, answer: str) -> _Problem:
    """Everything that does not depend on a draw; raises Rejected."""
    verify(answer)
    asked, told = _numbers(question), _numbers(answer)
    marks = _marks(answer, told)
    covered = sum(len(re.findall(r"\d", n.text)) for n in told)
    if covered != len(re.findall(r"\d", answer)) or re.search(r"(?:^|\n)\s*\(?\d+[.)]\s", answer):
        raise Rejected(UNKNOWN)  # digits that belong to something else; numbered lines
    used = {told[i].value for mark in marks for i in mark.leaves}

    results = {mark.result for mark in marks}
    for number in told:
        unmarked = re.search(r"(?<!<)=\s*\$?$", answer[: number.begin])
        if unmarked and number.value not in results and not _OPERATOR.match(answer, number.begin + len(number.text)):
            raise Rejected(UNKNOWN)  # computed, but not in a mark
    words = _words(question)
    said = {word for _, word, _ in words}
    for _, word, values in _words(_MARK.sub("", answer)):
        if word in said or word not in _COUNTING:
            words.append((0, word, values))
        elif values != (1,) and not {Fraction(n) for n in values} & ({n.value for n in asked} | results):
            raise Rejected(UNKNOWN)
    fixed = {Fraction(1)} | {Fraction(n) for _, _, values in words for n in values}
    if Fraction(1) not in {n.value for n in asked} and "one" not in said and any(_by_one(m.tree) for m in marks):
        raise Rejected(UNKNOWN)  # something happens to be 1
    variables: dict[Fraction, tuple[Fraction, range]] = {}
    for number in asked:
        before, behind = question[: number.begin], question[number.begin + len(number.text) :]
        if _NO_AMOUNT.search(before) or _NO_AMOUNT_BEHIND.match(behind) or _is_year(number, before):
            fixed |= _fixed_meanings(number, behind)
        elif number.value not in used and number.value != 1:
            raise Rejected(UNUSED)
        else:
            # Twice the same number may be two numbers, of which the answer uses one.
            repeated = number.value in variables
            variables[number.value] = (number.value, range(0)) if repeated else _candidates(number, question, behind)
    for begin, _, values in _words(question):
        if values and not used & set(map(Fraction, values)) and _CONDITION.search(question[:begin]):
            raise Rejected(CONDITION)
    # A small number in several marks may be another one there: two slices of bread to a sandwich.
    often = Counter(value for mark in marks for value in {told[i].value for i in mark.leaves})
    variables = {
        value: drawn
        for value, drawn in variables.items()
        if len(drawn[1]) > 1 and value not in fixed and (value > 5 or often[value] == 1)
    }
    fixed |= {number.value for number in asked} - variables.keys()
    problem = _Problem(
        question,
        answer,
        asked,
        told,
        marks,
        frozenset(fixed),
        variables,
        "," in "".join(n.text for n in (*asked, *told)),
        # A mark of one number repeats the result that is chosen.
        _CHOICE.search(question) is not None or any(isinstance(mark.tree, ast.Constant) for mark in marks),
    )
    if not variables:
        raise Rejected(NOTHING)
    _rewrite(problem, {})  # every number's origin is known
    return problem


def _by_one(tree: ast.expr) -> bool:
    """Whether something is multiplied or divided by 1."""
    return any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult | ast.Div)
        and any(
            isinstance(side, ast.Constant) and side.value == 1
            for side in ((node.left, node.right) if isinstance(node.op, ast.Mult) else (node.right,))
        )
        for node in ast.walk(tree)
    )


def _words(text: str) -> list[tuple[int, str, tuple[int, ...]]]:
    """Where each word stands that implies numbers, and which."""
    found = []
    for match in _WORD.finditer(text.lower()):
        values: set[int] = set()
        for word in (match[0], *match[0].split("-")):
            values.update(_IMPLIED.get(word) or _IMPLIED.get(word.removesuffix("s"), ()))
        if values:
            found.append((match.start(), match[0], tuple(sorted(values))))
    return found


def _is_year(number: _Number, before: str) -> bool:
    return 1900 <= number.value <= 2100 and len(number.text) == 4 and not before.endswith("$")


def _fixed_meanings(number: _Number, behind: str) -> set[Fraction]:
    """What a number that is no plain amount can put into a calculation."""
    value, part = number.value, None
    if fraction := re.match(r" */ *(\d+)", behind):
        part = value / int(fraction[1]) if int(fraction[1]) else None
    elif re.match(r"[ -]?(?:%|percent\b)", behind, re.I):
        part = value / 100
    elif magnitude := re.match(r"[ -](\w+)", behind):
        return {value, value * _MAGNITUDES.get(magnitude[1].lower(), 1)}
    if part is None:
        return {value}
    whole = Fraction(part.denominator) if fraction else Fraction(100)
    return {value, whole, part, 1 - part, 1 + part, whole - value, whole + value, Fraction(100)}


def _candidates(number: _Number, question: str, behind: str) -> tuple[Fraction, range]:
    """Half to double, as round as it was; 2 at least, since the words around it are plural."""
    value = number.value
    if value < 2 and value.denominator == 1:
        return value, range(0)
    if "." in number.text:
        steps = [Fraction(n, 100) for n in (500, 100, 50, 25, 10, 5, 1)]
        step = next((s for s in steps if value % s == 0 and value >= 2 * s), None)
        if step is None:
            return value, range(0)
    else:
        steps = [Fraction(n) for n in (1000, 500, 100, 50, 10, 5, 1)]
        step = next(s for s in steps if value % s == 0 and (value >= 4 * s or s == 1))
    least, most = max(value / 2, step, Fraction(2) if value >= 2 else step), max(2 * value, value + 3 * step)
    if re.match(r"[ -]years?[ -]old\b", behind):
        most = min(most, Fraction(90))
    if unit := re.match(r"[ -](?:\w+ )?(day|hour|minute|month)", behind):
        larger, cap = _CAPS[unit[1]]
        if larger in question.lower() and value <= cap:
            most = min(most, Fraction(cap))
    return step, range(-(-least // step), most // step + 1)


# --- drawing ----------------------------------------------------------------------------------------------------


def _draw(generator: random.Random, step: Fraction, times: range) -> Fraction:
    return step * generator.choice(times)


def _rewrite(problem: _Problem, drawn: Mapping[Fraction, Fraction]) -> tuple[str, str]:
    """Question and answer with `drawn` in place of the old values; raises Rejected where that does not work out."""
    meanings: dict[Fraction, set[Fraction]] = {value: {value} for value in problem.fixed}
    for value in problem.variables:
        meanings.setdefault(value, set()).add(drawn.get(value, value))

    def meaning(value: Fraction) -> Fraction:
        found = meanings.get(value, set())
        if len(found) != 1:
            raise Rejected(AMBIGUOUS if found else UNKNOWN)
        return next(iter(found))

    new: dict[int, Fraction] = {}
    for mark in problem.marks:
        for i in mark.leaves:
            new[i] = meaning(problem.told[i].value)
        result = _evaluate(mark.tree, [problem.told[i].value for i in mark.leaves], [new[i] for i in mark.leaves])[1]
        new |= dict.fromkeys(mark.results, result)
        new |= {i: new[leaf] for i, leaf in mark.mirrored.items()}
        meanings.setdefault(mark.result, set()).add(result)
    for i, number in enumerate(problem.told):
        if i not in new:
            new[i] = meaning(number.value)
    for _, word, values in _words(_MARK.sub("", problem.answer)):
        if word in _COUNTING and any(meanings.get(Fraction(n), {Fraction(n)}) != {Fraction(n)} for n in values):
            raise Rejected(AMBIGUOUS)
    asked = {i: drawn.get(n.value, n.value) for i, n in enumerate(problem.asked)}
    # What was more, such as what a tank can hold, stays more.
    if not _in_order((n.value, asked[i]) for i, n in enumerate(problem.asked)):
        raise Rejected(UNNATURAL)
    # What was chosen, being the most or the least, stays that.
    compared = [i for mark in problem.marks for i in (*mark.leaves, mark.results[0])] if problem.compares else []
    if not _in_order((problem.told[i].value, new[i]) for i in compared):
        raise Rejected(COMPARED)
    question = _replace(problem.question, problem.asked, asked, problem.commas)
    answer = _replace(problem.answer, problem.told, new, problem.commas)
    if drawn:
        verify(answer)
    return question, answer


def _in_order(values: Iterable[tuple[Fraction, Fraction]]) -> bool:
    """Whether of any two old values that differ the new ones differ in the same direction. values: (old, new)."""
    return all(a[1] < b[1] for a, b in itertools.pairwise(sorted(set(values))))


def _evaluate(tree: ast.expr, old: Sequence[Fraction], new: Sequence[Fraction]) -> tuple[Fraction, Fraction]:
    """The calculation with its old and its new numbers, exactly.

    Raises Rejected where a part of it changes its nature: whole, positive, or less than one.
    """
    leaves = iter(zip(old, new, strict=True))

    def part(node: ast.expr) -> tuple[Fraction, Fraction]:
        match node:
            case ast.BinOp(left, operation, right):
                a, b = part(left), part(right)
                values = (_apply(operation, a[0], b[0]), _apply(operation, a[1], b[1]))
                if not _alike(*values):
                    raise Rejected(UNNATURAL)
                return values
            case ast.UnaryOp(operation, operand):
                a = part(operand)
                return (-a[0], -a[1]) if isinstance(operation, ast.USub) else a
        return next(leaves)

    return part(tree)


def _apply(operation: ast.operator, a: Fraction, b: Fraction) -> Fraction:
    match operation:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
    if b == 0:
        raise Rejected(WRONG)
    return a / b


def _alike(old: Fraction, new: Fraction) -> bool:
    def nature(value: Fraction) -> tuple[bool, bool, bool]:
        return value > 0, value < 0, abs(value) < 1

    return nature(old) == nature(new) and (new.denominator == 1 or old.denominator != 1)


def _replace(text: str, numbers: Sequence[_Number], new: Mapping[int, Fraction], commas: bool) -> str:
    marks = [match.span() for match in _MARK.finditer(text)]
    parts, done = [], 0
    for i, number in enumerate(numbers):
        end = number.begin + len(number.text)
        before, behind = text[done : number.begin], text[end : end + 1]
        written = number.text
        if new[i] != number.value:
            if behind.isalpha():
                raise Rejected(AMBIGUOUS)  # 2x, 3rd
            if (new[i] == 1) != (number.value == 1):
                raise Rejected(UNNATURAL)  # singular and plural
            inside = any(a <= number.begin < b for a, b in marks)
            written = _written(new[i], number.text, commas and not inside)
            if re.search(r"\ban? \$?$", before, re.I) and _takes_an(written) != _takes_an(number.text):
                raise Rejected(UNNATURAL)
        parts += [before, written]
        done = end
    return "".join([*parts, text[done:]])


def _written(value: Fraction, like: str, commas: bool) -> str:
    """A number in the form of another: whole, or with so many places; Rejected where it has no such form."""
    places = len(like.partition(".")[2])
    fixed = places > 0 and like.endswith("0")
    scaled = value * 10 ** (max(places, 2) if places and not fixed else places)
    if scaled.denominator != 1:
        raise Rejected(UNNATURAL)
    text = f"{float(value):.{places if fixed or not places else max(places, 2)}f}"
    if places and not fixed:
        text = text.rstrip("0").rstrip(".")
    whole, point, rest = text.partition(".")
    if "," in like or (commas and _value(like) < 1000):
        whole = f"{int(whole):,}"
    return (whole if not like.startswith(".") or whole != "0" else "") + point + rest


def _takes_an(number: str) -> bool:
    """Eight, eleven and eighteen, and what begins with them."""
    whole = number.partition(".")[0]
    first = whole.partition(",")[0] if "," in whole else whole
    return whole.startswith("8") or (first in ("11", "18")) or (len(whole) == 5 and whole[:2] in ("11", "18"))


__all__ = ["Augmented", "Rejected", "augment_file", "redraw", "verify"]
