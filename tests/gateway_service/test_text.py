"""Stop strings: the same whatever the pieces are."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway_service.text import StopStrings

LETTERS = "abc"


def split(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces, cut at the given places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


def reference(pieces: list[str], stops: list[str], min_pieces: int) -> tuple[str, str | None]:
    """Text up to the stop string that is complete first, at the earliest in piece number `min_pieces`."""
    text = ""
    for number, piece in enumerate(pieces, 1):
        for letter in piece:
            text += letter
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending and number >= min_pieces:
                longest = max(ending, key=len)
                return text[: -len(longest)], longest
    return text, None


@given(
    st.text(LETTERS, max_size=30),
    st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 100), max_size=20),
    st.integers(0, 5),
)
def test_stop_strings_equal_the_reference_at_every_split(
    text: str, stops: list[str], cuts: list[int], min_pieces: int
) -> None:
    pieces = split(text, cuts)
    wanted, hit = reference(pieces, stops, min_pieces)
    finder = StopStrings(stops)
    given_out = ""
    for number, piece in enumerate(pieces, 1):
        given_out += finder.push(piece, number >= min_pieces)
        assert wanted.startswith(given_out), "text was given that the stop string takes back"
        if finder.hit is not None:
            break
        seen = "".join(pieces[:number])
        held = seen[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in stops), "text was held back without need"
    assert given_out + finder.flush() == wanted
    assert finder.hit == hit
