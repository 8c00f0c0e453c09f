"""Small tokenizers with templates of the common families, and what of an example is learned."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlens.core.supervised import IGNORE

LOOP = "{% for m in messages %}"
FAMILIES = {
    "chatml": (
        LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        dict(eos_token="<|endoftext|>"),
    ),
    "llama3": (
        "{{ bos_token }}" + LOOP + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|eot|>"],
        dict(bos_token="<|bos|>", eos_token="<|eos|>"),
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + LOOP
        + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        ["<bos>", "<eos>", "<turn>", "</turn>"],
        dict(bos_token="<bos>", eos_token="<eos>"),
    ),
    "mistral": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
        ["<s>", "</s>"],
        dict(bos_token="<s>", eos_token="</s>"),
    ),
    "phi": (
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>"],
        dict(eos_token="<|endoftext|>"),
    ),
}  # fmt: skip
"""Templates, added tokens and special tokens of families; eos is not the end of a turn in most."""

THINKING = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last or m.reasoning_content %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A template with thinking, which leaves empty think blocks out of earlier turns, as Qwen3's does."""


def small_tokenizer(
    template=None, added=(), merges=(), metaspace=False, rstrip=(), **special
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with merges of two tokens each; ``metaspace``: of characters after sentencepiece's prefix space."""
    if metaspace:
        letters = ["▁", *map(chr, range(32, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
        vocab = {letter: at for at, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: at for at, letter in enumerate([*alphabet, *map("".join, merges)])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=token in rstrip) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def family(name: str, **options) -> PreTrainedTokenizerFast:
    """A tokenizer with the template of a family."""
    template, added, special = FAMILIES[name]
    return small_tokenizer(**{"template": template, "added": added, **special, **options})


def learned(tokenizer, example: dict) -> list[str]:
    """The text of every run of learned tokens."""
    runs, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = label != IGNORE
    return [spelled(tokenizer, run) for run in runs]


def spelled(tokenizer, ids: list[int]) -> str:
    """The text of tokens, with all that are special."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
