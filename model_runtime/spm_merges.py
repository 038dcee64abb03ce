"""The merges that a SentencePiece vocabulary implies: it has scores only, and BPE wants pairs in order."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_runtime.files import write_atomically


def spm_merges(
    tokens: list[str], scores: NDArray[Any], mergeable: NDArray[np.bool_], cache_dir: Path | None
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes up another one, the best scored result first.

    Finding them takes about a second for 262144 tokens, so they are kept in `cache_dir` as pairs of ids.
    """
    if cache_dir is None:
        pairs = _find(tokens, scores, mergeable)
    else:
        pairs = _kept(tokens, scores, mergeable, cache_dir)
    left, right = pairs.tolist()
    return [(tokens[a], tokens[b]) for a, b in zip(left, right, strict=True)]


def _kept(
    tokens: list[str], scores: NDArray[Any], mergeable: NDArray[np.bool_], cache_dir: Path
) -> NDArray[np.int32]:
    digest = hashlib.sha256("\0".join(tokens).encode())
    digest.update(scores.tobytes() + mergeable.tobytes())
    path = cache_dir / "spm_merges" / f"{digest.hexdigest()}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        # Missing or broken: made again.
        pairs = _find(tokens, scores, mergeable)
        buffer = io.BytesIO()
        np.save(buffer, pairs)
        write_atomically(path, buffer.getvalue())
        return pairs


def _find(tokens: list[str], scores: NDArray[Any], mergeable: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Ids of the left and right parts, `[2, merges]`."""
    ids = {tokens[i]: i for i in np.flatnonzero(mergeable).tolist()}
    left: list[int] = []
    right: list[int] = []
    for i in np.argsort(-np.asarray(scores, np.float64), kind="stable").tolist():
        token = tokens[i]
        if not mergeable[i] or len(token) < 2:
            continue
        cuts = [
            (ids[a], ids[b])
            for k in range(1, len(token))
            if (a := token[:k]) in ids and (b := token[k:]) in ids
        ]
        for a, b in sorted(cuts):
            left.append(a)
            right.append(b)
    return np.array([left, right], np.int32)
