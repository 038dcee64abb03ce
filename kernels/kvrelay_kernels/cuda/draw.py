"""Drawing tokens on the device: what is kept of each sequence, and the kernels that draw from logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.cuda.batch import ALIGNMENT
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.interface import Draw

MOST_TOKENS = 1 << 18
"""The largest vocabulary: its weights, whole numbers of up to 45 bits, add up to less than 2^64."""
PIECE_THREADS = 256
PIECE_UNIT = 8 * PIECE_THREADS
"""Tokens that a thread block looks at, or a multiple of it."""
FEWEST_PIECES, MOST_PIECES = 16, 64
BLOCKS_WANTED = 256
"""Thread blocks among which the rows of a step are divided, as far as the bounds on pieces allow."""

SETTINGS = np.dtype(
    {
        "names": [
            "seed", "temperature", "top_p", "min_p", "presence", "frequency", "repetition", "top_k",
            "ending_from", "counted",
        ],
        "formats": ["u8", "f8", "f8", "f8", "f8", "f8", "f4", "i4", "i4", "u4"],
        "itemsize": 4 * ALIGNMENT,
    }
)  # fmt: skip
"""A sequence's settings, as `draw.cuh` reads them; as long as an upload's alignment."""

IN_PROMPT, ENDS_ANSWER = np.uint32(1 << 31), np.uint32(1 << 30)
"""Bits of a token as a sequence has seen it; those below count how often the answer has it."""


def is_counted(draw: Draw, prompt_tokens: int) -> bool:
    """Whether a setting of a sequence depends on the tokens that it has, or may not have yet."""
    penalized = draw.repetition_penalty != 1 or draw.presence_penalty != 0 or draw.frequency_penalty != 0
    return penalized or draw.ending_from > prompt_tokens


def settings_of(draw: Draw, counted: bool) -> NDArray[np.void]:
    """`[1]` of SETTINGS."""
    settings = np.zeros(1, SETTINGS)
    settings["seed"], settings["temperature"] = draw.seed, draw.temperature
    settings["top_p"], settings["min_p"] = draw.top_p, draw.min_p
    settings["presence"], settings["frequency"] = draw.presence_penalty, draw.frequency_penalty
    # No row has more tokens than these, nor an answer that ends later.
    most = np.iinfo(np.int32).max
    settings["repetition"], settings["top_k"] = draw.repetition_penalty, min(draw.top_k, most)
    settings["ending_from"], settings["counted"] = min(draw.ending_from, most), counted
    return settings


def seen_of(
    draw: Draw, prompt_ids: Sequence[int], answer_ids: Sequence[int], vocabulary: int
) -> NDArray[np.uint32]:
    """`[vocabulary]`: what a sequence has seen of each token."""
    seen = np.bincount(np.asarray(answer_ids, np.intp), minlength=vocabulary).astype(np.uint32)
    seen[np.asarray(prompt_ids, np.intp)] |= IN_PROMPT
    seen[np.asarray(draw.ending_ids, np.intp)] |= ENDS_ANSWER
    return seen


def piece_length(rows: int, vocabulary: int) -> int:
    """Tokens of a row that one thread block looks at in a step of so many rows; it changes no result."""
    pieces = min(MOST_PIECES, max(FEWEST_PIECES, BLOCKS_WANTED // rows))
    return -(-vocabulary // (pieces * PIECE_UNIT)) * PIECE_UNIT


@dataclass(frozen=True)
class DrawShape:
    """What the kernels are compiled for."""

    bins: int = 1024
    """Of logits, from the likeliest to one that is never drawn; also tokens that are sorted together."""
    threads: int = 1024
    """Of the thread block that draws for a row."""

    def key(self, source: str, arch: str) -> KernelKey:
        """`draw_peak`, `draw_tally` or `draw`."""
        threads = self.threads if source == "draw" else min(self.threads, PIECE_THREADS)
        return KernelKey.of(source, {"BINS": self.bins, "THREADS": threads}, arch)


class TokenDraws:
    """The state of sequences at their places, and the kernels on it, wherever that lies.

    Nothing here allocates after the beginning, or waits.
    """

    def __init__(
        self,
        vocabulary: int,
        places: int,
        rows: int,
        arch: str,
        kernels: KernelCache,
        arrays: Any,
        shape: DrawShape | None = None,
    ) -> None:
        """For steps of up to `rows` rows; `arrays` is the array library: CuPy, or NumPy in tests.

        Raises MemoryError.
        """
        shape = shape or DrawShape()
        self.vocabulary, self.places = vocabulary, places
        self._stride = -(-vocabulary // ALIGNMENT) * ALIGNMENT
        self.settings = arrays.zeros((places, SETTINGS.itemsize // 4), np.int32)
        """`[places]` of SETTINGS, as words."""
        self.seen = arrays.zeros((places, self._stride), np.uint32)
        """`[places, vocabulary and some more]`: IN_PROMPT, ENDS_ANSWER, and a count."""
        self.newest = arrays.zeros(places, np.int32)
        """`[places]`: each sequence's newest token."""
        self._firsts = arrays.zeros((rows, MOST_PIECES), np.uint64)
        self._masses = arrays.zeros((rows, shape.bins), np.uint64)
        self._counts = arrays.zeros((rows, shape.bins), np.uint32)
        self._threads = shape.threads, min(shape.threads, PIECE_THREADS)
        self._kernels = [
            kernels.load(shape.key(source, arch), 0) for source in ("draw_peak", "draw_tally", "draw")
        ]

    def draw(self, logits: Any, places: Any, lengths: Any, tokens: Any, answer: Any) -> None:
        """Draw `[rows]` tokens for the sequences at `places`, which have `lengths` tokens; NOWHERE: none.

        They go to `tokens`, int32, from element `answer[0]` on: an array, or the address of pinned memory of
        the host, which may read them when an event behind this is done.

        Penalties and masks are put into the `logits` `[rows, vocabulary]` of rows that have such. Tokens are
        counted, and become the newest ones.
        """
        rows = len(places)
        peak, tally, draw = self._kernels
        threads, piece_threads = self._threads
        vocabulary, stride = np.int32(self.vocabulary), np.int32(self._stride)
        length = piece_length(rows, self.vocabulary)
        pieces, piece = -(-self.vocabulary // length), np.int32(length)
        grid = pieces, rows
        state = self._firsts, self._masses, self._counts
        peak(
            grid, (piece_threads,),
            (logits, places, lengths, self.settings, self.seen, vocabulary, stride, piece, *state),
        )  # fmt: skip
        tally(grid, (piece_threads,), (logits, places, self.settings, vocabulary, piece, *state))
        draw(
            (rows,), (threads,),
            (
                logits, places, lengths, self.settings, vocabulary, stride, np.int32(pieces), *state,
                self.seen, self.newest, tokens, answer,
            ),
        )  # fmt: skip
