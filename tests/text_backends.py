"""Small tokenizers of the kinds that models have, trained on a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_HERE = Path(__file__).parent
TEMPLATES = {
    path.stem: path
    for folder in (_HERE / "templates", _HERE.parent / "examples" / "templates")
    for path in sorted(folder.glob("*.jinja"))
}
LINES = [
    "The quick brown fox jumps over the lazy dog, twice: 1 + 2 = 3.",
    "héllo wörld, naïve café; 世界 你好 😀👍🏽 \u0915\u094d\u0937 e\u0301",
    '<a href="x">[INST] {"name": "f"}\n\n  indented\ttabs </a> ▁ ',
] * 10
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = [AddedToken("<tool_call>", special=False, normalized=False), AddedToken("<｜é Ġ｜>", special=False)]
SPACES = AddedToken("  ", special=False, normalized=False)


def byte_level() -> Tokenizer:
    """As GPT-J, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    made = _with_added(made)
    made.add_tokens([SPACES])
    return made


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: sentencepiece with byte tokens, a space put before a text and taken off again."""
    made = _sentencepiece_bpe()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(made)


def byte_fallback_without_prefix() -> Tokenizer:
    """As Gemma has it."""
    made = _sentencepiece_bpe()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(made)


def metaspace() -> Tokenizer:
    """As T5 has it: a unigram model, no byte tokens."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"],
                                                            show_progress=False))  # fmt: skip
    return _with_added(made)


def word_piece() -> Tokenizer:
    """As BERT has it: a decoder that looks at neighbours."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"],
                                                              show_progress=False))  # fmt: skip
    return _with_added(made)


def _sentencepiece_bpe() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    trained.train_from_iterator([LINES[0]], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in _merges(trained)]
    return Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def _merges(trained: Tokenizer) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(trained.to_str())["model"]["merges"]
    return merges


def _with_added(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens(SPECIAL)
    made.add_tokens(PLAIN_ADDED)
    bos = made.token_to_id("<s>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return made


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_without_prefix": byte_fallback_without_prefix,
    "metaspace": metaspace,
    "word_piece": word_piece,
}
