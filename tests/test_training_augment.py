"""training/augment.py: copies with other numbers, against what the new question asks for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bottlenecked.training import augment
from bottlenecked.training.augment import Rejected, augment_file, redraw, verify
from bottlenecked.training.data import load_examples, write_lines

from .test_cli import fails, run
from .test_training_data import characters

Oracle = Callable[..., Any]

# Question, answer, and what the answer must be, given the question's numbers in their order. {n} are computed.
TEMPLATES: list[tuple[str, str, Oracle, list[Oracle]]] = [
    (
        "Tom has {a} boxes of {b} eggs and sells {c} eggs for $1 each. How many eggs has he left?",
        "He has {a}*{b} = <<{a}*{b}={0}>>{0} eggs.\n{0} eggs - {c} eggs = <<{0}-{c}={1}>>{1} eggs are left.\n#### {1}",
        lambda a, b, c, _: a * b - c,
        [lambda a, b, c: a * b, lambda a, b, c: a * b - c],
    ),
    (
        "Ann reads {a} pages on Monday, {b} on Tuesday and half as many as both together on Friday, {c} more than "
        "planned. How many did she plan?",
        "She reads <<{a}+{b}={0}>>{0} pages, then {0}/2 = <<{0}/2={1}>>{1}.\nShe planned <<{1}-{c}={2}>>{2}.\n#### {2}",
        lambda a, b, c: (a + b) / Fraction(2) - c,
        [lambda a, b, c: a + b, lambda a, b, c: (a + b) / 2, lambda a, b, c: (a + b) / 2 - c],
    ),
    (
        "A shop sells {a} pens at ${b}.50 and gives 20% of the money away. What remains of it, with {c} dollars more?",
        "They get {a}*{b}.50 = $<<{a}*{b}.50={0}>>{0}.\nThey give {0}*20/100 = $<<{0}*20/100={1}>>{1}.\n"
        "There remain {0}-{1} = $<<{0}-{1}={2}>>{2}, and <<{2}+{c}={3}>>{3} in all.\n#### {3}",
        lambda a, b, _, c: a * b * Fraction(4, 5) + c,
        [
            lambda a, b, c: a * (b + Fraction(1, 2)),
            lambda a, b, c: a * (b + Fraction(1, 2)) / 5,
            lambda a, b, c: a * (b + Fraction(1, 2)) * Fraction(4, 5),
            lambda a, b, c: a * (b + Fraction(1, 2)) * Fraction(4, 5) + c,
        ],
    ),
]


def shown(value: Any) -> str:
    value = Fraction(value)
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.4f}".rstrip("0")


def numbers(text: str) -> list[Fraction]:
    return [Fraction(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


@settings(deadline=None, print_blob=True, max_examples=150)
@given(
    template=st.sampled_from(TEMPLATES),
    a=st.integers(2, 80),
    b=st.integers(2, 60),
    c=st.integers(2, 40),
    seed=st.integers(0, 9),
)
def test_copies_answer_the_new_question(template: Any, a: int, b: int, c: int, seed: int) -> None:
    question, answer, oracle, parts = template
    values = [part(a, b, c) for part in parts]
    assume(min(values) > 0)
    filled = {"a": a, "b": b, "c": c}
    question, answer = question.format(**filled), answer.format(*map(shown, values), **filled)
    assert oracle(*numbers(question)) == values[-1]
    try:
        verify(answer)
        copies = list(redraw(question, answer, copies=3, seed=seed))
    except Rejected:
        return
    assert copies
    assert len({q for q, _ in copies} | {question}) == len(copies) + 1
    for new_question, new_answer in copies:
        verify(new_answer)
        assert numbers(new_answer)[-1] == oracle(*numbers(new_question)) > 0
        # Only numbers change.
        for old, new in ((question, new_question), (answer, new_answer)):
            assert re.sub(r"[\d,.]+", "#", old) == re.sub(r"[\d,.]+", "#", new)
        for old_number, new_number in zip(numbers(answer), numbers(new_answer), strict=True):
            assert new_number.denominator == 1 or old_number.denominator > 1
    assert copies == list(redraw(question, answer, copies=3, seed=seed))


def test_most_of_such_problems_are_varied() -> None:
    """So that the property above is about something."""
    made = 0
    for a in range(20, 60, 2):
        question, answer, _, parts = TEMPLATES[0]
        values = [part(a, 13, 11) for part in parts]
        filled = {"a": a, "b": 13, "c": 11}
        made += len(list(redraw(question.format(**filled), answer.format(*values, **filled), copies=5)))
    assert made == 100


def draws(question: str, answer: str, tries: int = 400) -> list[tuple[str, str]]:
    return [pair for seed in range(40) for pair in redraw(question, answer, seed=seed, tries=tries)]


def test_forms_are_kept() -> None:
    question = "Al pays $2,400 for 3 beds and $1.50 for a pin, on the 5th of May 2019, with 16% off."
    answer = "A bed is 2,400/3 = $<<2400/3=800>>800.\nIt is 800+1.50 = $<<800+1.50=801.50>>801.50.\n#### 801.50"
    for q, a in draws(question, answer):
        assert q.endswith("for a pin, on the 5th of May 2019, with 16% off.")
        price, text = re.search(r"for a", q), re.search(r"\$(\d,\d{3}) for (\d+) beds and \$(\d+\.\d0)", q)
        assert price is not None
        assert text is not None, q
        assert f"is {text[1]}/{text[2]} = $<<{text[1].replace(',', '')}/{text[2]}=" in a
    # Days of a week, articles, and what is more stays more.
    question = "Bo runs 6 miles for 3 days a week on an 8-mile track. How far is it, in the 4th week?"
    pairs = draws(question, "It is 3*6 = <<3*6=18>>18, and 18+8 = <<18+8=26>>26.\n#### 26")
    for q, _ in pairs:
        six, three, eight, four = numbers(q)
        assert three < four == 4 < six < eight
        assert three <= 7
        assert eight in (8, 11, 18) or 80 <= eight < 90
    assert {numbers(q)[1] for q, _ in pairs} == {2, 3}


SLOWER = "Al climbs 20 stairs in 15 minutes each. Bo climbs 9 hills in 40 minutes each. How long is the {}?"
TIMES = "Al: <<20*15=300>>300\nBo: <<9*40=360>>360\n"


def test_what_an_answer_chooses_stays_its_choice() -> None:
    """The question's numbers may keep their order while the results that are compared do not."""

    def orders(question: str, answer: str) -> set[int]:
        found = (numbers(q) for q, _ in draws(question, answer))
        return {(c * d > a * b) - (c * d < a * b) for a, b, c, d in found}

    answer = TIMES + "It is <<360+20=380>>380 with a rest.\n#### 380"
    for choice in ("trip of the slower one", "trip of the winner", "longest trip", "most expensive trip", "better way"):
        assert orders(SLOWER.format(choice), answer) == {1}, choice
    # A result that is picked, and one that is compared; `at least` chooses nothing.
    for other in ("trip of both", "trip, at least"):
        assert orders(SLOWER.format(other), answer) >= {-1, 1}
        assert orders(SLOWER.format(other), TIMES + "It is <<360=360>>360.\n#### 360") == {1}
        assert orders(SLOWER.format(other), answer.replace("It is", "As 360 > 300, it is")) == {1}
    # A number of the question may be what is compared.
    question = "May has 30 eggs, June 47 and July 4 boxes of 12. How many are {}?"
    answer = "July has <<4*12=48>>48, <<48+30=78>>78 with May and <<78+47=125>>125 with June.\n#### 125"
    for what, both in (("in July and the largest of the others", False), ("there", True)):
        orders_of_july = {c * d > b for _, b, c, d in (numbers(q) for q, _ in draws(question.format(what), answer))}
        assert orders_of_july == ({True, False} if both else {True})
    # A draw that is thrown away for it says so.
    reasons = set()
    for seed in range(40):
        try:
            list(redraw(SLOWER.format("longest trip"), TIMES + "#### 360", seed=seed, tries=1))
        except Rejected as reason:
            reasons.add(str(reason))
    assert augment.COMPARED in reasons


def test_numbers_stay_natural() -> None:
    """Positive stays positive, whole stays whole, also on the way; a day has 24 hours."""
    question, answer = "Tom has 6 boxes of 9 eggs and eats 52 eggs.", "6*9-52 = <<6*9-52=2>>2 are left.\n#### 2"
    assert all(a * b - c > 1 for a, b, c in (numbers(q) for q, _ in draws(question, answer)))
    question, answer = "Al cuts 9 m in 3 parts and takes 2 of 6 such.", "<<9/3*2*6=36>>36\n#### 36"
    for a, b, _, _ in (numbers(q) for q, _ in draws(question, answer)):
        assert a % b == 0
    question, answer = "Bo sleeps 14 hours a day for 9 nights.", "<<14*9=126>>126\n#### 126"
    assert max(numbers(q)[0] for q, _ in draws(question, answer)) == 24


def test_text_that_repeats_a_mark_means_what_the_mark_does() -> None:
    """The first 12 is asked, the last one computed; only the marks tell them apart."""
    question = "Al has 12 red, 3 blue and 9 green eggs. How many are not red?"
    answer = "12+3 = <<12+3=15>>15, then 15+9 = <<15+9=24>>24.\nNot red are 24-12 = <<24-12=12>>12.\n#### 12"
    pairs = draws(question, answer)
    assert any(red != blue + green for red, blue, green in (numbers(q) for q, _ in pairs))
    for q, a in pairs:
        red, blue, green = numbers(q)
        assert a.startswith(f"{red}+{blue} = <<")
        assert numbers(a)[-1] == blue + green


GOOD_QUESTION = "Tom has 40 boxes of 12 eggs. How many eggs has he?"
GOOD_ANSWER = "He has 40*12 = <<40*12=480>>480 eggs.\n#### 480"


def test_verify() -> None:
    verify(GOOD_ANSWER)
    verify("<<+2+3=5>>5, 2 cats x 3 + 1 = 7 legs\n<<(2+3)*1,000=5000>>5,000\n<<5000/.5=10000.00>>10,000\n#### $10,000")
    for answer, reason in (
        ("He has 480.\n#### 480", augment.NO_MARKS),
        (GOOD_ANSWER.replace("=480>>", "=481>>"), augment.WRONG),
        (GOOD_ANSWER.replace(">>480", ">>481"), augment.WRONG),
        (GOOD_ANSWER.replace("40*12 = <<", "41*12 = <<"), augment.WRONG),
        ("<<10/3=3.33>>3.33\n#### 3.33", augment.WRONG),
        ("<<5*2=10>>10. The tip is 11*.2=$2.5.\n#### 10", augment.WRONG),
        ("<<5/0=0>>0\n#### 0", augment.WRONG),
        *(
            (GOOD_ANSWER.replace("eggs.", f"eggs, {false}."), augment.WRONG)
            for false in ("480 < 40", "480>$1,000", "480 > 480", "479>=480", "12 \u2265 480", "40*12 = 480 <= 12*39")
        ),
        (GOOD_ANSWER.replace("eggs.", "eggs (.5 < 12 < 3)."), augment.WRONG),
        (GOOD_ANSWER.replace("#### 480", "#### 481"), augment.NOT_COMPUTED),
        (GOOD_ANSWER.replace("#### 480", "480"), augment.NOT_COMPUTED),
        (GOOD_ANSWER + " eggs", augment.NOT_COMPUTED),
    ):
        with pytest.raises(Rejected) as error:
            verify(answer)
        assert str(error.value) == reason, answer
    for true in ("480 > 40", "12 < $1,000", "480>=480", "12 \u2264 480", "12*39 < 480", "0.5 < 12 < 13", "50% < 1"):
        verify(GOOD_ANSWER.replace("eggs.", f"eggs ({true})."))
    # Nothing that is read as numbers alone.
    others = ("2x > 480", "480 < 2x", "x > 480", "480 -> 40", "480 => 1000", "2*(3+4) < 5", "2:30 < 3:15", "2:1 > 1:3")
    for other in others:
        verify(GOOD_ANSWER.replace("eggs.", f"eggs: {other}."))


@pytest.mark.parametrize(
    "mark",
    [
        *("2**9=512", "__import__('os')=1", "2=2=2", "2+2", "=2", "x+2=4", "2(3)=6", "2,3=5", "7//2=3", "1e3=1000"),
        *("2+=2", "(" * 150 + "1" + ")" * 40 + "=1", "1+" * 120 + "1=121", "05+1=6", "2+2=4 eggs", "2+2=five"),
    ],
)
def test_nothing_but_arithmetic_is_evaluated(mark: str) -> None:
    with pytest.raises(Rejected, match=augment.MALFORMED):
        verify(f"<<{mark}>>\n#### 4")


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        # 9 comes from nowhere; 2 from "twice".
        ("Tom has 40 eggs.", "<<40+9=49>>49\n#### 49", augment.UNKNOWN),
        ("Tom has 40 eggs.", "<<40*2=80>>80\n#### 80", augment.UNKNOWN),
        # A result in the text that no mark computes; digits that are part of something else; numbered lines.
        ("Tom has 40 and 15.", "25 is what 40 is more.\n<<40+15=55>>55\n#### 55", augment.UNKNOWN),
        ("Tom has 40% of 20 and 8.", "40% of 20 eggs = 8\n<<8+20=28>>28\n#### 28", augment.UNKNOWN),
        ("Tom has 40 and 15.", "B12 is <<40+15=55>>55\n#### 55", augment.UNKNOWN),
        ("Tom has 40 and 15.", "15) <<40+15=55>>55\n#### 55", augment.UNKNOWN),
        # "two weeks" is said of the 14 days and would stay.
        ("Tom has 40 eggs for 14 days.", "<<40*14=560>>560 in two of them\n#### 560", augment.UNKNOWN),
        # Something happens to be one kilogram.
        ("Tom eats 500 grams, Al 500, for 14 days.", "<<500+500=1000>>1000\n<<14*1=14>>14\n#### 14", augment.UNKNOWN),
        # Percentages, fractions, years, times, ordinals, ranges and words are no amounts to vary.
        ("Tom has 20% of $1.", "<<20/100=.2>>.2\n#### .2", augment.NOTHING),
        ("Tom has 3/4 of 1 cake.", "<<3/4=.75>>.75\n#### .75", augment.NOTHING),
        ("In 1998 Tom was 1.", "<<1998-1=1997>>1997\n#### 1997", augment.NOTHING),
        ("At 10:30 or 10 am.", "<<10+30=40>>40\n#### 40", augment.NOTHING),
        ("On May 21st or the 12th, 5-10 times.", "<<21+12+5+10=48>>48\n#### 48", augment.NOTHING),
        ("Tom has twice what Al has, 2.", "<<2*2=4>>4\n#### 4", augment.NOTHING),
        # A threshold, or a total, that no calculation knows of.
        ("Over 30 eggs are half off. He buys 40.", "<<40/2=20>>20\n#### 20", augment.UNUSED),
        ("More than three are half off. He buys 40.", "<<40/2=20>>20\n#### 20", augment.CONDITION),
        # 12 is a number of the question and a result; 40 is said in words; 3x is no 3.
        ("Tom has 12 and 9 and 3.", "<<9+3=12>>12\nSo 12 are there.\n<<12+12=24>>24\n#### 24", augment.AMBIGUOUS),
        ("Tom has 40 and 1.", "<<40+1=41>>41, forty of his\n#### 41", augment.AMBIGUOUS),
        ("Tom has 37 and 1.", "37x is it\n<<37+1=38>>38\n#### 38", augment.AMBIGUOUS),
        # One egg stays one egg.
        ("Tom has 50% of 2 eggs.", "<<2*50/100=1>>1 egg\n#### 1", augment.UNNATURAL),
    ],
)
def test_rejected_problems(question: str, answer: str, reason: str) -> None:
    with pytest.raises(Rejected) as error:
        draws(question, answer, tries=8)
    assert str(error.value) == reason


def test_a_value_may_have_two_origins_that_stay_equal() -> None:
    """Computed twice: whichever is meant, it is the same."""
    question = "Tom has 15 red and 17 blue eggs, and eats 11. Al does the same."
    answer = "Tom: 15+17 = <<15+17=32>>32\nAl: 15+17 = <<15+17=32>>32\n32 each, <<32+32-11=53>>53\n#### 53"
    for q, a in draws(question, answer):
        red, blue, eaten = numbers(q)
        assert numbers(a)[-1] == 2 * (red + blue) - eaten


def test_numbers_that_may_be_others_stay() -> None:
    """Two packs for $2, of which a mark tells one; two slices to a sandwich, of which nothing tells."""
    question = "Two of 12: he buys 12 packs at $9 each and a pear for $12."
    assert {numbers(q)[1] for q, _ in draws(question, "<<12*9=108>>108\n<<108+12=120>>120\n#### 120")} == {12}
    question = "All 7 eat 3 sandwiches. How many slices is that?"
    answer = "<<7*3=21>>21 sandwiches of 3 slices are <<21*3=63>>63\n#### 63"
    assert {numbers(q)[1] for q, _ in draws(question, answer)} == {3}
    question = "Ann is 60 years old, Al 7 years older."
    assert 80 < max(numbers(q)[0] for q, _ in draws(question, "<<60+7=67>>67\n#### 67")) <= 90


# --- files and the command -----------------------------------------------------------------------------------------


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


GOOD = {"question": GOOD_QUESTION, "answer": GOOD_ANSWER}


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", GOOD, "\n", GOOD | {"answer": "480\n#### 480"}, GOOD)
    out = tmp_path / "more.jsonl"
    status, printed, err = run(capsys, "augment", path, "--output", out, "--copies", 2, "--seed", 3)
    assert (status, err) == (0, "")
    assert printed == (f"wrote {out}: 4 problems made from 2 of 3 (66.7%)\n       1  there are no calculator marks\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in lines] == ["train.jsonl:1"] * 2 + ["train.jsonl:4"] * 2
    assert [(line["question"], line["answer"]) for line in lines[:2]] == list(
        redraw(GOOD_QUESTION, GOOD_ANSWER, copies=2, seed=3)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "more.jsonl"}
    fails(capsys, 1, "more.jsonl exists: give another name", "augment", path, "--output", out)
    # What is made from a problem stays on its side of a split.

    dataset = load_examples([path, out], characters(), template="{question}", max_length=200)
    assert dataset.sources[0] == dataset.sources[3] == dataset.sources[4] == "train.jsonl:1"


def test_refused_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for name in ("gsm8k_test.jsonl", "Test-00000.jsonl"):
        test = write(tmp_path / name, GOOD)
        fails(capsys, 1, f"{name} looks like a test set, which must not be", "augment", test, "--output", out)
    path = write(tmp_path / "train.jsonl", GOOD, "{")
    fails(capsys, 1, "train.jsonl:2 is not JSON", "augment", path, "--output", out)
    write(path, GOOD, {"question": "x"})
    fails(capsys, 1, 'train.jsonl:2 must have the texts "question"', "augment", path, "--output", out)
    write(path, GOOD | {"answer": "480"})
    fails(capsys, 1, "not one of 1 problems can be varied.*no calculator marks", "augment", path, "--output", out)
    write(path, GOOD)
    fails(capsys, 1, "copies is 0", "augment", path, "--output", out, "--copies", 0)
    fails(capsys, 1, "none.jsonl: No such file", "augment", tmp_path / "none.jsonl", "--output", out)
    assert not out.exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_lines([GOOD], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
    assert augment_file(write(tmp_path / "train.jsonl", GOOD)).varied == 1
