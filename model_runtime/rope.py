"""Angles of rotary position embedding, stretched ones included."""

import math

import numpy as np
from numpy.typing import NDArray

from model_runtime.config import RopeScaling


def rope_angles(
    base: float,
    head_dim: int,
    context: int,
    scaling: RopeScaling | None = None,
    factors: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, `[context, head_dim / 2]`; `factors` divide the frequencies (GGUF's rope_freqs)."""
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = stretched(frequencies, scaling)
    if factors is not None:
        frequencies = frequencies / factors
    # transformers and llama.cpp multiply in float32; doing as they do keeps late positions alike.
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return np.cos(angles), np.sin(angles)


def stretched(frequencies: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Frequencies for a longer context than the model was first trained on.

    `linear` divides all of them; `llama3` only those of long wavelength, with a ramp between
    (https://github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling).
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * frequencies / (2 * math.pi)
    ramp = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
