"""Which prompts begin alike, and which of their blocks are kept: no vLLM is needed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bottlenecked.integrations.vllm.prompts import PromptIndex, block_keys


def test_keys_name_all_tokens_so_far() -> None:
    keys = block_keys([1, 2, 3, 4, 5, 6, 7], 3, "")
    assert len(keys) == 2
    assert block_keys([1, 2, 3, 4, 5, 6], 3, "") == keys
    assert block_keys([1, 2, 3, 4, 5, 9], 3, "")[0] == keys[0]
    assert block_keys([1, 2, 3, 4, 5, 9], 3, "")[1] != keys[1]
    assert block_keys([9, 2, 3, 4, 5, 6], 3, "")[1] != keys[1]
    assert block_keys([1, 2, 3, 4, 5, 6], 3, "salt")[0] != keys[0]
    assert block_keys([1, 2], 3, "") == []


def test_the_least_recently_used_goes_first() -> None:
    index = PromptIndex(4)
    first, second, third = (block_keys([i] * 4, 2, "") for i in range(3))
    assert index.keep(first) == ([0, 1], [])
    assert index.keep(second) == ([0, 1], [])
    index.use(first)
    new, gone = index.keep(third)
    assert new == [0, 1]
    assert gone == [second[1], second[0]]  # a later block is of no use without the earlier ones
    assert [index.match(keys) for keys in (first, second, third)] == [2, 0, 2]


def test_a_prompt_longer_than_the_index() -> None:
    index = PromptIndex(3)
    keys = block_keys(list(range(10)), 2, "")
    assert index.keep(keys) == ([0, 1, 2], [])
    assert index.match(keys) == 3
    assert PromptIndex(0).keep(keys) == ([], [])


@settings(deadline=None, print_blob=True)
@given(
    size=st.integers(0, 6),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=9), max_size=12),
)
def test_a_mirror_agrees(size: int, prompts: list[list[int]]) -> None:
    """A worker that does what `keep` says has every block that `match` promises, and no more than allowed."""
    index, stored = PromptIndex(size), {}
    for prompt in prompts:
        keys = block_keys(prompt, 2, "")
        matched = index.match(keys)
        for i, key in enumerate(keys[:matched]):
            assert stored[key] == prompt[: 2 * i + 2]
        index.use(keys[:matched])
        new, gone = index.keep(keys)
        for i in new:
            assert keys[i] not in stored
            stored[keys[i]] = prompt[: 2 * i + 2]
        for key in gone:
            del stored[key]
        assert len(stored) == len(index) <= size
