"""Tokenizers: bytes, characters, byte-pair encoding (published or trained on your text), tokenizer.json."""
