"""A small tokenizer of every family of tokenizer.json, built with the `tokenizers` library."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROSE = ["the cat sat there, the other cats sat here.", "žluťoučký kůň 漢字 😀", "  two  blanks\n\tand a line"] * 3
SPECIALS = ["<s>", "</s>"]


def byte_level() -> Tokenizer:
    """GPT-2's and Llama 3's family: ids stand for bytes, a text begins with <s>, blanks are an ordinary added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's family: marks for spaces, one before the text, and bytes for unknown characters."""
    vocabulary = {text: id for id, text in enumerate(["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = []
    for text in ["▁", *"thecasro", "th", "the", "▁the", "at", "▁▁"]:
        vocabulary[text] = len(vocabulary)
        if len(text) > 1:
            start = next(i for i in range(len(text) - 1, 0, -1) if text[:i] in vocabulary and text[i:] in vocabulary)
            merges.append((text[:start], text[start:]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    return tokenizer


def gemma() -> Tokenizer:
    """As sentencepiece, with no space before the text."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace(scheme: str = "always") -> Tokenizer:
    """T5's family: a unigram model, whose first token loses its marks when decoded."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return tokenizer


def no_prefix() -> Tokenizer:
    return metaspace("never")


def wordpiece() -> Tokenizer:
    """BERT's family, decoded by the library."""
    words = ["[UNK]", *SPECIALS, "the", "cat", "##s", "sat", ",", ".", "漢", "##字"]
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", *SPECIALS])
    return tokenizer


def word_endings() -> Tokenizer:
    """GPT-1's family, decoded by the library: a space wherever a word ended, but at the last one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", *SPECIALS], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words, decoded by the library."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "cat": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    return tokenizer


def template(tokenizer: Any, first: str = "<s>") -> Any:
    ids = [(first, tokenizer.token_to_id(first))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=ids)
    return tokenizer
