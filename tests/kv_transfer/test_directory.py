"""The prefix directory."""

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.directory import PrefixDirectory
from kv_transfer.prefix import prefix_keys


def keys_of(tokens: int, seed: int = 0) -> list[bytes]:
    """Keys of a prompt of its own."""
    return prefix_keys([seed] * tokens, 1, 2)


def test_each_worker_has_its_leading_blocks() -> None:
    directory = PrefixDirectory(100)
    keys = keys_of(640)
    directory.note("a", keys[:3])
    directory.note("b", keys[:7])
    directory.note("c", keys[4:])
    assert directory.best(keys) == {"a": 3, "b": 7}
    assert directory.best(keys[:2]) == {"a": 2, "b": 2}
    assert directory.best(keys_of(640, seed=1)) == {}
    assert directory.best([]) == {}


def test_a_worker_that_has_gone_is_forgotten() -> None:
    directory = PrefixDirectory(100)
    keys = keys_of(640)
    directory.note("a", keys)
    directory.note("b", keys[:1])
    directory.forget("a")
    assert directory.best(keys) == {"b": 1}
    assert len(directory) == 1


def test_the_last_keys_of_the_oldest_prompt_go_first() -> None:
    directory = PrefixDirectory(12)
    old, new = keys_of(640), keys_of(320, seed=1)
    directory.note("a", old)
    directory.note("b", new)
    assert directory.best(old) == {"a": 7}
    assert directory.best(new) == {"b": 5}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(0, 700)), max_size=20))
def test_it_never_outgrows_its_capacity(notes: list[tuple[str, int, int]]) -> None:
    directory = PrefixDirectory(15)
    for worker, seed, tokens in notes:
        directory.note(worker, keys_of(tokens, seed))
        assert len(directory) <= 15
    for worker in "abc":
        directory.forget(worker)
    assert len(directory) == 0
