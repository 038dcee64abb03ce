"""Arrays of 16-bit elements as kernels take them: as uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.gpu.paged_cache import DTYPES


def elements(values: NDArray[Any], element: str) -> NDArray[np.uint16]:
    """The nearest elements, as their bits."""
    return values.astype(DTYPES[element]).view(np.uint16)


def floats(found: NDArray[Any], element: str) -> NDArray[np.float32]:
    """The values of bits."""
    return found.view(DTYPES[element]).astype(np.float32)
