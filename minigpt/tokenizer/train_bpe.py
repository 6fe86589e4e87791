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
from minigpt.tokenizer.alphabet import BYTE_OF, LINE_START
from minigpt.tokenizer.base import well_formed

# GPT-4's split pattern with three changes for small vocabularies: numbers are split into two digits, not three (100 ids
# instead of 1000); combining marks belong to their word (Hindi, Thai, decomposed accents); and 's, 't, 'll are split
# off only at the end of a word, so that 'tis stays whole. tokenizers and tiktoken give the same splits for it.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)(?!\p{L})"  # the end of it's, we'll
    r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"  # a word, with one space or punctuation character before it
    r"|\p{N}{1,2}"  # digits
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"  # punctuation, with a space before and line ends after
    r"|\s*[\r\n]"  # whitespace up to a line end
    r"|\s+(?!\S)"  # whitespace, except the last character before a word
    r"|\s+"
)
LEAST_COUNT = 2  # minimum frequency of a merged pair; merging pairs that occur once would memorize the corpus
PORTION = 1 << 18  # characters passed to the trainer at a time; it stores offsets for each of them

# Maximum characters of a split in training. The trainer's time is quadratic in the length of a split, and a line of a
# million dashes, letters or spaces is one split. Cutting loses one pair per LONGEST characters. A power of two keeps
# the tokens of runs of one character (2, 4, 8, ... of it) unchanged. Only training cuts, encoding never does.
LONGEST = 256


def train_bpe(texts: Iterable[str], vocab_size: int, show: bool = True) -> list[bytes]:
    """Learn the tokens of a `BPETokenizer`: the 256 bytes, then the learned tokens; <|endoftext|> follows them.

    Args:
        texts: pieces of the corpus; long ones are cut at line starts.
        vocab_size: number of ids, at least 257. If the corpus is too small, the vocabulary is smaller, with a notice.
        show: whether to show progress and the notice.

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
        raise DataError("the corpus is empty; tokenizer kind 'bpe' is trained on it: give a text")
    spelled = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    learned = [bytes(BYTE_OF[character] for character in token) for token, _ in spelled[len(BYTE_OF) :]]
    tokens = [bytes([byte]) for byte in range(256)] + learned
    if show and len(tokens) + 1 < vocab_size:
        notice(
            f"the corpus of {read} characters gives {len(tokens) + 1} tokens instead of tokenizer.vocab_size "
            f"{vocab_size}: no further pair of tokens occurs twice"
        )
    return tokens


def splitter(pattern: str, longest: int | None = None) -> Sequence:
    """Create a pre-tokenizer of `tokenizers` that splits by a pattern and maps bytes to characters.

    Args:
        pattern: regular expression of a split.
        longest: maximum characters of a split, for training; None: no maximum.
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
