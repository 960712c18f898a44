"""boundary.py against a simple model that looks at the whole text at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bottlenecked.boundary import BoundaryDetector, BoundaryEvent, newline_token_ids
from bottlenecked.config import BoundaryConfig

NL, NL2 = 7, 8
IDS = (NL, NL2)


def detector(rewrite_prompt=True, **boundary):
    return BoundaryDetector(BoundaryConfig(token_ids=IDS, **boundary), rewrite_prompt=rewrite_prompt)


def started(prompt=5, sequence_begin=0, **options):
    d = detector(**options)
    d.start(0, sequence_begin)
    assert d.prompt(0, prompt) is None
    return d


def fed(d, *tokens):
    """Per token what `decode` returned, as (step_begin, step_end) or None."""
    events = [d.decode(0, token) for token in tokens]
    return [event and (event.step_begin, event.step_end) for event in events]


def test_the_prompt_ends_at_the_first_decode():
    d = started()
    assert d.decode(0, 1) == BoundaryEvent(sequence=0, step_begin=0, step_end=5, sequence_begin=0)
    assert fed(d, 1, 1) == [None, None]


def test_post_rewrites_after_the_newline_is_written():
    assert fed(started(), 1, NL, 1, 1) == [(0, 5), None, (5, 7), None]


def test_pre_rewrites_before_the_newline_is_written():
    assert fed(started(timing="pre"), 1, NL, 1, NL) == [(0, 5), (5, 6), None, (6, 8)]


def test_two_newlines_in_a_row_make_a_step_of_one_token():
    assert fed(started(), NL, NL, NL2, 1) == [(0, 5), (5, 6), (6, 7), (7, 8)]
    # Nothing lies between the prompt and the first newline: no event of its own.
    assert fed(started(timing="pre"), NL, NL, NL2, 1) == [(0, 5), (5, 6), (6, 7), None]


def test_a_step_shorter_than_the_minimum_goes_on():
    # The prompt of 2 tokens is step 0 whatever its length.
    post = started(2, min_step_length=3)
    assert fed(post, NL, NL, NL, 1, 1, NL, 1) == [(0, 2), None, None, (2, 5), None, None, (5, 8)]
    pre = started(2, min_step_length=3, timing="pre")
    assert fed(pre, NL, 1, NL, NL, 1) == [(0, 2), None, None, (2, 5), None]


def test_a_prompt_that_is_not_rewritten_still_ends_a_step():
    assert fed(started(rewrite_prompt=False), 1, NL, 1) == [None, None, (5, 7)]


def test_chunks_of_a_prompt_are_one_step():
    d = started(3)
    assert d.prompt(0, 1) is None
    assert d.prompt(0, 2) is None
    assert d.length(0) == 6
    assert fed(d, 1) == [(0, 6)]


def test_left_padding_belongs_to_no_step():
    d = started(3, sequence_begin=4)
    # A first chunk that is all padding ends nothing.
    assert d.due(0) is None
    d.prompt(0, 3)
    assert d.decode(0, NL) == BoundaryEvent(sequence=0, step_begin=4, step_end=6, sequence_begin=4)
    assert d.decode(0, 1) == BoundaryEvent(sequence=0, step_begin=6, step_end=7, sequence_begin=4)


def test_a_kept_cache_goes_on():
    # The tokens since the last boundary and the new prompt are one step.
    d = started(timing="post")
    assert fed(d, NL, 1, 2) == [(0, 5), (5, 6), None]
    assert d.prompt(0, 4) is None
    assert fed(d, 1) == [(6, 12)]
    # A line whose end is the last written token is a step of its own, due before the new prompt is written.
    assert fed(d, NL) == [None]
    assert d.prompt(0, 1) == BoundaryEvent(0, 12, 14)
    assert fed(d, 1) == [(14, 15)]
    # A second call that only goes on decoding is nothing special.
    assert fed(d, NL, 1) == [None, (15, 17)]


def test_due_reports_before_the_next_token_is_known():
    d = started()
    assert d.due(0) == BoundaryEvent(0, 0, 5)
    assert d.due(0) is None
    assert fed(d, NL) == [None]
    assert d.due(0) == BoundaryEvent(0, 5, 6)
    assert fed(d, 1) == [None]


def test_a_finished_row_is_frozen():
    d = started()
    assert fed(d, 1, NL) == [(0, 5), None]
    d.finish(0)
    assert fed(d, 0, NL, NL) == [None] * 3
    assert d.due(0) is None
    assert d.length(0) == 7
    with pytest.raises(ValueError, match="sequence 0 finished at position 7"):
        d.prompt(0, 2)
    d.start(0)
    d.prompt(0, 2)
    assert fed(d, 1) == [(0, 2)]


def test_the_window_is_the_end_of_the_step():
    event = BoundaryEvent(0, 10, 30, 3)
    assert [event.window_begin(r) for r in (1, 19, 20, 21, 256)] == [29, 11, 10, 10, 10]


def test_rows_of_a_batch():
    d = detector()
    with pytest.raises(ValueError, match="2 tokens were given for 0 started"):
        d.decode_rows([1, 1])
    d.start(1, 2)
    d.start(0)
    assert d.prompt_rows(5) == []
    assert d.decode_rows([1, NL]) == [BoundaryEvent(0, 0, 5, 0), BoundaryEvent(1, 2, 5, 2)]
    d.finish(0)
    assert d.decode_rows([NL, 1]) == [BoundaryEvent(1, 5, 6, 2)]
    d.drop(0)
    assert d.decode_rows([NL]) == []
    assert d.prompt_rows(2) == [BoundaryEvent(1, 6, 8, 2)]


def test_bad_calls():
    with pytest.raises(ValueError, match=r"boundary\.token_ids is empty"):
        BoundaryDetector(BoundaryConfig())
    with pytest.raises(ValueError, match=r"boundary\.token_ids is empty"):
        BoundaryDetector(BoundaryConfig(token_ids=(3,)), token_ids=[])
    d = detector()
    for call in (lambda: d.decode(3, 1), lambda: d.prompt(3, 1), lambda: d.due(3), lambda: d.drop(3)):
        with pytest.raises(ValueError, match="sequence 3 was not started"):
            call()
    with pytest.raises(ValueError, match="sequence_begin is -1"):
        d.start(0, -1)
    d.start(0, 2)
    with pytest.raises(ValueError, match="has 0 tokens"):
        d.prompt(0, 0)
    d.prompt(0, 2)
    with pytest.raises(ValueError, match="empty prompt"):
        d.decode(0, 1)
    d.prompt(0, 1)
    with pytest.raises(TypeError):
        d.decode(0, 7.0)
    assert d.length(0) == 3


def test_token_ids_may_be_integers_of_other_libraries():
    np = pytest.importorskip("numpy")
    d = BoundaryDetector(BoundaryConfig(), token_ids=np.array([NL]))
    d.start(0)
    d.prompt(0, 1)
    d.decode(0, np.int64(NL))
    assert d.due(0) == BoundaryEvent(0, 1, 2)


def test_newline_token_ids():
    class Tokenizer:
        vocabulary = ("a", "\n", " b\n\n", "\r", "", "\\n", ".\nc")

        def __len__(self):
            return len(self.vocabulary)

        def decode(self, ids):
            (i,) = ids
            return self.vocabulary[i]

    assert newline_token_ids(Tokenizer()) == (1, 2, 6)


# A session: left padding; turns, each a prompt in chunks of so many tokens and then decoded tokens; and what
# a batch goes on feeding after this sequence has finished.
tokens = st.lists(st.sampled_from([1, 2, NL, NL2]), max_size=12)
chunks = st.lists(st.integers(1, 3), min_size=1, max_size=3)
turns = st.lists(st.tuples(chunks, tokens), min_size=1, max_size=3)
sessions = st.lists(st.tuples(st.integers(0, 4), turns, tokens), min_size=1, max_size=3)


def expected_events(padding, turns, timing, min_step_length, rewrite_prompt):
    """The boundaries of one sequence, found by looking at the whole text at once.

    Returns {how many positions were announced before the call that reports it: (step_begin, step_end)}.
    """
    text = ["pad"] * padding
    for chunks, decoded in turns:
        text += ["prompt"] * sum(chunks) + decoded
    events = {}
    begin = padding
    for p in range(padding + 1, len(text)):
        prompt_ended = text[p - 1] == "prompt" and text[p] != "prompt"
        line_ended = timing == "post" and text[p - 1] in IDS and p - begin >= min_step_length
        if prompt_ended or line_ended:
            if line_ended or rewrite_prompt:
                events[p] = (begin, p)
            begin = p
        if timing == "pre" and text[p] in IDS and p - begin >= min_step_length:
            events[p] = (begin, p)
            begin = p
    return events


@settings(max_examples=200, deadline=None, print_blob=True)
@given(sessions, st.sampled_from(["post", "pre"]), st.integers(1, 4), st.booleans())
def test_against_a_model_that_sees_the_whole_text(sessions, timing, min_step_length, rewrite_prompt):
    options = {"timing": timing, "min_step_length": min_step_length, "rewrite_prompt": rewrite_prompt}
    d = detector(**options)
    # The calls of every sequence, then taken in turns: sequences do not disturb each other.
    calls = []
    for s, (padding, turns, after_end) in enumerate(sessions):
        d.start(s, padding)
        calls.append([("prompt", s, padding)] if padding else [])
        for chunks, decoded in turns:
            calls[s] += [("prompt", s, n) for n in chunks] + [("decode", s, token) for token in decoded]
        calls[s] += [("finish", s)] + [("decode", s, token) for token in after_end]
    reported = [{} for _ in sessions]
    for i in range(max(map(len, calls))):
        for call in (of_sequence[i] for of_sequence in calls if i < len(of_sequence)):
            what, s, *arguments = call
            length = d.length(s)
            event = getattr(d, what)(s, *arguments)
            if event is not None:
                assert (event.sequence, event.sequence_begin) == (s, sessions[s][0])
                assert length not in reported[s]
                reported[s][length] = (event.step_begin, event.step_end)
    assert reported == [expected_events(padding, turns, **options) for padding, turns, _ in sessions]


rows_of_tokens = st.lists(st.lists(st.sampled_from([1, 1, 1, 2, NL]), min_size=3, max_size=3), max_size=40)


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    rows_of_tokens,
    st.sampled_from(["post", "pre"]),
    st.integers(1, 9),
    st.dictionaries(st.integers(0, 39), st.integers(0, 4)),
)
def test_rows_together_are_rows_alone(steps, timing, min_step_length, interruptions):
    """`decode_rows` only counts tokens where it can; what comes in between finds every row where it is."""
    together, alone = (detector(timing=timing, min_step_length=min_step_length) for _ in range(2))
    for d in (together, alone):
        for row, padding in enumerate((0, 2, 0)):
            d.start(row, padding)
            d.prompt(row, 4)
    for i, tokens in enumerate(steps):
        expected = [event for row, token in enumerate(tokens) if (event := alone.decode(row, token)) is not None]
        assert together.decode_rows(tokens) == expected
        what = interruptions.get(i)
        for d in (together, alone):
            if what == 0:
                d.finish(i % 3)
            elif what == 1:
                d.start(2, 1)
                d.prompt(2, 3)
            elif what == 2:
                assert [d.length(row) for row in range(3)] == [alone.length(row) for row in range(3)]
        if what == 3:
            assert together.due(1) == alone.due(1)
    assert [together.length(row) for row in range(3)] == [alone.length(row) for row in range(3)]


def test_rows_that_cannot_end_a_step_are_not_looked_at():
    class Ids(frozenset):
        def isdisjoint(self, other):
            raise AssertionError

    d = detector(min_step_length=5)
    d.start(0)
    d.prompt(0, 2)
    d.start(1)
    d.prompt(1, 2)
    assert len(d.decode_rows([1, 1])) == 2
    d.line_ending_ids = Ids(IDS)
    for _ in range(3):
        assert d.decode_rows([NL, NL]) == []
    with pytest.raises(AssertionError):
        d.decode_rows([NL, NL])
    d.line_ending_ids = frozenset(IDS)
    assert d.decode_rows([NL, 1]) == []
    assert d.decode_rows([1, 1]) == [BoundaryEvent(0, 2, 7)]
