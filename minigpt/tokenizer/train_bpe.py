"""Train a byte-level BPE vocabulary on a text.

Hugging Face's `tokenizers` counts and merges; what comes out is a list of tokens in the order they were learned, which
`BPETokenizer` runs. The trainer starts from the 256 bytes and again and again makes one token of the pair of neighbours
that is seen most often. Of pairs seen equally often it takes the one whose first token, then second, is the older
(bytes in the order of `BYTE_OF`). It ends with the vocabulary full or no pair seen twice. No token is longer than
`LONGEST` characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from minigpt.errors import DataError
from minigpt.terminal import notice, progress
from minigpt.tokenizer.base import END_OF_TEXT, well_formed
from minigpt.tokenizer.bpe import BYTE_OF, LINE_START, BPETokenizer

# GPT-4's way of splitting, changed in three points that matter to a small vocabulary: numbers go by two digits, not
# three (100 ids instead of 1000); marks belong to the word they are written on (Hindi, Thai, decomposed accents); and
# 's, 't, 'll are split off only at a word's end, so that 'tis stays whole. tokenizers and tiktoken read it alike.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)(?!\p{L})"  # the end of it's, we'll
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word, with one blank or sign before it
    r"|\p{N}{1,2}"  # digits
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # signs, with a space before and line ends after
    r"|\s*[\r\n]"  # blanks up to a line's end
    r"|\s+(?!\S)"  # blanks, all but the last before a word
    r"|\s+"
)
LEAST_COUNT = 2  # a pair seen once would only learn the corpus by heart
PORTION = 1 << 18  # characters handed to the trainer at a time; it holds offsets for each of them

# Characters of one split that are counted together. The trainer takes time by the square of a split's length, and a
# line of a million dashes, letters or blanks is one split. Cut, it loses one pair in so many; a power of two keeps the
# tokens of a run of one character (2, 4, 8, ... of it) as they are. Only training cuts, encoding never does.
LONGEST = 256


def train_bpe(texts: Iterable[str], vocab_size: int, show: bool = True) -> BPETokenizer:
    """A tokenizer of kind "bpe" whose ids are the 256 bytes, the learned tokens, and last <|endoftext|>.

    Args:
        texts: pieces of the corpus; long ones are cut at line starts.
        vocab_size: number of ids, at least 257. A corpus too small for it gives a smaller vocabulary, with a notice.
        show: whether to show progress and that notice.

    Raises:
        DataError: the texts are empty.
    """
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=LEAST_COUNT,
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = splitter(SPLIT_PATTERN, LONGEST)
    read = 0

    def portions() -> Iterator[str]:
        nonlocal read
        for text in texts:
            for portion in _portions(well_formed(text)):
                read += len(portion)
                bar.update(read)
                yield portion
        bar.update(read, "learning merges")

    with progress(f"learning {vocab_size} tokens", None, "characters", show=show) as bar:
        tokenizer.train_from_iterator(portions(), trainer)
    if not read:
        raise DataError("the corpus holds no text; kind 'bpe' learns its vocabulary from it: give it some text")
    spelled = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    learned = [bytes(BYTE_OF[character] for character in token) for token, _ in spelled[len(BYTE_OF) :]]
    tokens = [bytes([byte]) for byte in range(256)] + learned
    if show and len(tokens) + 1 < vocab_size:
        notice(
            f"the corpus of {read} characters gives {len(tokens) + 1} tokens, not the {vocab_size} of "
            "tokenizer.vocab_size: no further pair of tokens is seen twice"
        )
    return BPETokenizer("bpe", SPLIT_PATTERN, tokens, {END_OF_TEXT: len(tokens)})


def splitter(pattern: str, longest: int | None = None) -> Sequence:
    """The pattern as `tokenizers` applies it, with bytes spelled as characters.

    Args:
        pattern: what a split is.
        longest: characters after which a split is cut again, for training; None: it stays whole.
    """
    steps = [pattern] if longest is None else [pattern, rf"[\s\S]{{{longest}}}"]
    splits = [Split(Regex(step), behavior="isolated") for step in steps]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _portions(text: str) -> Iterator[str]:
    start = 0
    while cut := LINE_START.search(text, start + PORTION):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
