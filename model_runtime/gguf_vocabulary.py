"""A tokenizer from GGUF metadata: vocabularies of gpt2 (byte-level BPE) and llama (SentencePiece) kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kvrelay.errors import ModelFileInvalid
from model_runtime.gguf import GgufFile, StringArray
from model_runtime.spm_merges import spm_merges

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
SPACE = "▁"
"""What stands for a space in SPM vocabularies."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
QWEN2 = rf"{_WORDS}\p{{N}}{_REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "tekken": (TEKKEN,),
}
"""Regular expressions that cut text before BPE, one after the other, by the name in `tokenizer.ggml.pre`.

The names and what they stand for are llama.cpp's (src/llama-vocab.cpp).
"""
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
"""Vocabularies in which a piece that is a token as a whole is not built from merges."""


def build_tokenizer(file: GgufFile, cache_dir: Path | None) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes; `cache_dir` keeps the merges of SPM vocabularies.

    Raises:
        ModelFileInvalid: the vocabulary is missing, broken, or of an unknown kind.
    """
    model = file.get("tokenizer.ggml.model", str)
    tokens = file.strings("tokenizer.ggml.tokens")
    kinds = _kinds(file, len(tokens))
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer = _spm(file, tokens, kinds, cache_dir)
    else:
        raise ModelFileInvalid(
            f"{file.path.name}: tokenizer model {model!r:.80} is not supported (gpt2 and llama are)"
        )
    for kind in (CONTROL, USER_DEFINED):
        added = [
            AddedToken(tokens[i], normalized=False, special=kind == CONTROL)
            for i in np.flatnonzero(kinds == kind)
        ]
        tokenizer.add_tokens(added)
    if file.get("tokenizer.ggml.add_bos_token", bool, model == "llama"):
        bos = file.get("tokenizer.ggml.bos_token_id", int)
        if not 0 <= bos < len(tokens):
            raise ModelFileInvalid(f"{file.path.name}: tokenizer.ggml.bos_token_id is {bos}")
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def control_tokens(file: GgufFile) -> dict[int, str]:
    """The control tokens of the vocabulary by id.

    Raises:
        ModelFileInvalid: the vocabulary is missing or broken.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray):
        raise ModelFileInvalid(f"{file.path.name}: metadata 'tokenizer.ggml.tokens' is missing")
    kinds = _kinds(file, len(tokens.spans))
    return {int(token): tokens[int(token)] for token in np.flatnonzero(kinds == CONTROL)}


def _kinds(file: GgufFile, count: int) -> NDArray[np.int32]:
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return np.full(count, NORMAL, np.int32)
    if not isinstance(kinds, np.ndarray) or len(kinds) != count:
        raise ModelFileInvalid(f"{file.path.name}: tokenizer.ggml.token_type does not fit {count} tokens")
    return kinds


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFileInvalid(f"{file.path.name}: pre-tokenizer {pre!r:.80} is not known; known: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.strings("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = _bpe(file, vocabulary, merges, ignore_merges=pre in WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(bpe)
    if PRE_TOKENIZERS[pre] == (QWEN2,):
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _spm(file: GgufFile, tokens: list[str], kinds: NDArray[np.int32], cache_dir: Path | None) -> Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ModelFileInvalid(f"{file.path.name}: tokenizer.ggml.scores does not fit {len(tokens)} tokens")
    merges = spm_merges(tokens, scores, kinds == NORMAL, cache_dir)
    unknown = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    if not 0 <= unknown < len(tokens):
        raise ModelFileInvalid(f"{file.path.name}: tokenizer.ggml.unknown_token_id is {unknown}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = _bpe(file, vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    strip: list[decoders.Decoder] = []
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        strip.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _bpe(
    file: GgufFile, vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]], **options: object
) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)  # pyright: ignore[reportArgumentType]
    except Exception as error:  # The library raises a bare Exception for a merge of unknown parts.
        raise ModelFileInvalid(f"{file.path.name}: the vocabulary is broken: {error}") from error
