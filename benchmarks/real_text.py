"""Real English prose that every Python brings along: its own language reference, `pydoc_data.topics`."""

import platform
import random
from pydoc_data.topics import topics

from model_runtime.tokenizer import Tokenizer

TOPICS = (
    "specialnames",
    "compound",
    "types",
    "execmodel",
    "import",
    "customization",
    "attribute-access",
    "assignment",
    "comparisons",
    "calls",
    "naming",
    "objects",
)
"""Those with the most running text, and few tables."""

SOURCE = f"pydoc_data.topics of Python {platform.python_version()}: {', '.join(TOPICS)}"


def real_tokens(tokenizer: Tokenizer) -> list[int]:
    """The topics as one text of tokens."""
    return tokenizer.encode("\n".join(topics[name] for name in TOPICS), add_special=False)


def stretch(tokens: list[int], length: int, rng: random.Random) -> list[int]:
    """A part of the text that begins anywhere: it shares no prefix with others, so none finds it cached."""
    start = rng.randrange(len(tokens) - length)
    return tokens[start : start + length]
