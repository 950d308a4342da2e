"""A tokenizer of the kind that Llama and Mixtral have: spaces as U+2581, one in front, bytes where no token fits."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import TEXTS


def sentencepiece_tokenizer(size: int = 160) -> PreTrainedTokenizerFast:
    """Trained on the tests' texts; ids 0..2 are its special tokens, the last 256 the single bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    learned = json.loads(trained.to_str())["model"]
    vocabulary = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = trained.normalizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
