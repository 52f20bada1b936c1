"""Kimi-VL's tokenizer: the official one, converted from `tiktoken.model`, or a small one trained on texts.

Both are byte-level BPEs over the same split of a text into words, and both carry the same special tokens and
chat format, so that code which asks for tokens by name works with either. Facts: arXiv 2504.07491 and the
released tokenizer files.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

# The official ids: 163,584 ranks, then 256 reserved ids of which these have a name.
SPECIAL_TOKENS: dict[str, int] = {
    "[BOS]": 163584,
    "[EOS]": 163585,
    "<|im_end|>": 163586,
    "<|im_user|>": 163587,
    "<|im_assistant|>": 163588,
    "<|im_system|>": 163594,
    "<|im_middle|>": 163601,
    "<|media_start|>": 163602,
    "<|media_content|>": 163603,
    "<|media_end|>": 163604,
    "<|media_pad|>": 163605,
    "[PAD]": 163839,
}
OFFICIAL_RANKS = 163584
RESERVED = 256

# Alternatives of the official split, in order; part of the file format. `&&` intersects character classes.
_LETTER = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}{_LETTER}]", rf"[\p{{Ll}}{_LETTER}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SIGNS = r"[^\s\p{L}\p{N}]"
_NUMBER = r"\p{N}{1,3}"
_SPLIT_ALTERNATIVES = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    _NUMBER,
    rf" ?{_SIGNS}+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
SPLIT_PATTERN = "|".join(_SPLIT_ALTERNATIVES)
# The trained tokenizer keeps digits single, so that a number is read and written digit by digit, and the
# marks of thinking whole: no run of signs before a mark may swallow its beginning.
_SINGLE_DIGITS = SPLIT_PATTERN.replace(_NUMBER, r"\p{N}")
TRAINED_SPLIT_PATTERN = "◁/?think▷|" + _SINGLE_DIGITS.replace(_SIGNS, f"{_SIGNS[:-1]}◁]")

# No newlines and no BOS. A turn's text is gathered first, so that thinking is dropped even if it spans parts.
CHAT_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set turn = namespace(text='') -%}"
    "{%- if message['content'] is string -%}"
    "{%- set turn.text = message['content'] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set turn.text = turn.text"
    " + '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' -%}"
    "{%- else -%}"
    "{%- set turn.text = turn.text + part['text'] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' and (add_generation_prompt or not loop.last) -%}"
    "{%- set turn.text = turn.text.split('◁/think▷')[-1] -%}"
    "{%- endif -%}"
    "{{- '<|im_' + message['role'] + '|>' + message['role'] + '<|im_middle|>' + turn.text + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_assistant|>assistant<|im_middle|>' -}}"
    "{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` ids trained on `texts`, its last ids the special tokens.

    The 256 bytes are always in the vocabulary, so any text can be encoded. Same texts, same tokenizer.
    """
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 256:
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}")
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = _byte_level_split(TRAINED_SPLIT_PATTERN)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, BpeTrainer(vocab_size=room, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    return _wrap(bpe, list(SPECIAL_TOKENS))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a local folder: `tokenizer.json`, or the official `tiktoken.model` (converted).

    Raises ValueError, saying what was looked for, when the folder has neither.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        missing = [name for name in SPECIAL_TOKENS if name not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(f"{folder / 'tokenizer.json'} lacks Kimi-VL's special tokens {missing}")
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        return tokenizer
    if (folder / "tiktoken.model").is_file():
        return _from_tiktoken(folder / "tiktoken.model")
    raise ValueError(
        f"no tokenizer in {folder}: expected tokenizer.json or tiktoken.model; copy the file of the official "
        "weights there, or write the embedded task, whose folder holds a trained tokenizer"
    )


def _from_tiktoken(path: Path) -> PreTrainedTokenizerFast:
    """Convert a tiktoken ranks file; the 256 ids behind its ranks are special tokens, at official places.

    Ids equal tiktoken's, for texts of up to 400,000 characters (the official code cuts longer ones first).
    """
    converter = TikTokenConverter(vocab_file=str(path), pattern=SPLIT_PATTERN)
    bpe = converter.converted()
    ranks = bpe.get_vocab_size()
    names = {id_ - OFFICIAL_RANKS: name for name, id_ in SPECIAL_TOKENS.items()}
    return _wrap(bpe, [names.get(i, f"<|reserved_token_{ranks + i}|>") for i in range(RESERVED)])


def _byte_level_split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut a text by the pattern and spell the pieces in bytes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _wrap(bpe: Tokenizer, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Give a BPE its special tokens, as the ids behind its vocabulary, and the chat format."""
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        extra_special_tokens=[n for n in special_tokens if n not in ("[BOS]", "[EOS]", "[PAD]")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


MAX_PIECE, MAX_RUN = 400_000, 25_000
"""The official code encodes pieces of so many characters, with runs of (non-)space characters no longer than this."""
_LONG_RUN = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], np.ndarray]:
    """The fastest way from a text to the tokenizer's (L,) int64 ids; the names of special tokens are ordinary text.

    A tokenizer converted from tiktoken ranks goes back to tiktoken, which is 5 to 8 times as fast; any other encodes by
    itself. The result can be pickled.
    """
    ranks = _tiktoken_ranks(tokenizer.backend_tokenizer)
    return TokenizerEncoder(tokenizer) if ranks is None else TiktokenEncoder(ranks)


class TiktokenEncoder:
    """Encodes by tiktoken, cutting long texts where the official code cuts them."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        # Told of no special token at all, tiktoken would stop at each character to look for one.
        special = {"[EOS]": max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding(
            "kimi-vl", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def __call__(self, text: str) -> np.ndarray:
        if len(text) <= MAX_RUN:
            return self._encode(text)
        return np.concatenate([self._encode(piece) for piece in _pieces(text)])

    def _encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)


class TokenizerEncoder:
    """Encodes by a tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return np.array(ids, dtype=np.int64)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces as the official code cuts it."""
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        cuts = [cut for run in _LONG_RUN.finditer(piece) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        for begin, end in zip([0, *cuts], [*cuts, len(piece)], strict=True):
            yield piece[begin:end]


def _tiktoken_ranks(bpe: Tokenizer) -> dict[bytes, int] | None:
    """The tiktoken ranks that a tokenizer was converted from, or None where it was not."""
    spec = json.loads(bpe.to_str())
    blank = Tokenizer(BPE(ignore_merges=True))
    blank.pre_tokenizer = _byte_level_split(SPLIT_PATTERN)
    wanted = json.loads(blank.to_str())
    vocab, merges = spec["model"].pop("vocab", {}), spec["model"].pop("merges", [])
    for part in ("vocab", "merges"):
        del wanted["model"][part]
    alike = all(spec[part] == wanted[part] for part in ("model", "pre_tokenizer", "normalizer"))
    if not alike or not all(token["special"] for token in spec["added_tokens"]):
        return None
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    spelled_in_bytes = set("".join(vocab)) == letters.keys() <= vocab.keys()
    if not spelled_in_bytes or not _are_merges_of_ranks(vocab, merges):
        return None
    to_bytes = {ord(letter): byte for letter, byte in letters.items()}
    return {word.translate(to_bytes).encode("latin-1"): rank for word, rank in vocab.items()}


def _are_merges_of_ranks(vocab: dict[str, int], merges: list[list[str]]) -> bool:
    """Whether the merges are those that the conversion makes: all ways to cut each word in two words, by their ranks.

    Then, as in tiktoken, the next merge is always the one that makes the word of the lowest rank. A trained BPE knows
    one way to make a word, and by the others its ids could differ.
    """
    order = [(vocab[left + right], vocab[left], vocab[right]) for left, right in merges]
    if any(later <= earlier for earlier, later in pairwise(order)):
        return False
    cuts = sum(word[:cut] in vocab and word[cut:] in vocab for word in vocab for cut in range(1, len(word)))
    return cuts == len(merges)
