"""Models of the lab: tiny Llamas and sampling from them."""

from collections.abc import Sequence

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlens.core.errors import InputError
from qlens.engine.models.forward import evaluating
from qlens.lab.language import LONGEST_ENDING, LONGEST_STEP, Problem
from qlens.lab.setting import Setting
from qlens.training.fitting import isolated


def longest(setting: Setting) -> int:
    """Tokens of the longest solution, end token included."""
    return setting.depth * LONGEST_STEP + LONGEST_ENDING


def new_model(setting: Setting, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model, with larger initial weights and a smaller rotary base than Llama's.

    In a narrow model on short texts both speed up learning the arithmetic several times.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=setting.width,
            intermediate_size=2 * setting.width,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            num_key_value_heads=setting.heads,
            max_position_embeddings=2 * (2 + 2 * setting.depth + longest(setting)),
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    k: int,
    seed: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """k completions of each problem at temperature 1 in one batch, deterministic given the seed.

    Raises:
        InputError: no problems, or k below 1.
    """
    if k < 1 or not problems:
        raise InputError(f"sampling needs k >= 1 and at least one problem, got k={k} and {len(problems)} problems")
    inputs = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt").to(model.device)
    with isolated(seed), evaluating(model):
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=k,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    answers = []
    for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        answers.append(tokenizer.decode(row[:end]))
    return [answers[start : start + k] for start in range(0, len(answers), k)]
