"""Evaluation on held-out tokens: diagnostics, scores of labels, label weights and targets of a method."""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.label_noise import auroc, calibration
from qlens.analysis.token_view.token_text import TokenText
from qlens.core.numerics import expectation
from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.data.compatibility import vocabulary_size
from qlens.data.from_text import token_batches
from qlens.registry import Variant

ENTRIES = 20_000_000  # logits in memory at a time
GRID = 60  # tokens in the figure of label weights
SHOWN_P_Y = 0.1  # p_y of the token whose targets are shown
CANDIDATES = 6  # entries shown of its targets
SMALLEST = 0.01  # probability of an entry that is shown

FROM_STUDENT = ("old", "second", "negatives")  # fields that follow from the student and its text

Examples = Sequence[Mapping[str, Sequence[int]]]


class HeldOut(tuple):
    """Encoded rows, with the predictions of models that are not trained any more, kept while the models live.

    Kept where those on all rows are few enough to be in memory at a time.
    """

    def __init__(self, examples: Examples):
        self.kept: weakref.WeakKeyDictionary[PreTrainedModel, Tokens] = weakref.WeakKeyDictionary()

    def tokens(self, model: PreTrainedModel, needs: Collection[str], models: Mapping[str, PreTrainedModel]) -> Tokens:
        """Tokens at all supervised positions, with the other models' logits in their fields."""
        for each in (model, *models.values()):
            if each not in self.kept:
                (self.kept[each],) = token_batches(each, self, len(self))
        if any(name in FROM_STUDENT for name in needs):
            (student,) = token_batches(model, self, len(self), needs)
        else:
            student = self.kept[model]
        return student.replace(**{name: self.kept[other].logits.to(model.device) for name, other in models.items()})


def held_out_tokens(
    model: PreTrainedModel, examples: Examples, variant: Variant | None = None, **models: PreTrainedModel
) -> Iterator[Tokens]:
    """Batches of tokens at all supervised positions, whole examples each.

    Args:
        model: the student.
        examples: encoded rows; a ``HeldOut`` keeps the predictions.
        variant: whose needed fields are filled.
        models: other models by the name of their field ("teacher", "reference").
    """
    needs = () if variant is None else variant.needs
    longest = max(len(example["input_ids"]) for example in examples)
    size = max(1, ENTRIES // (longest * vocabulary_size(model)))
    if isinstance(examples, HeldOut) and len(examples) <= size:
        return iter([examples.tokens(model, needs, models)])
    return token_batches(model, examples, size, needs, **models)


def row_nll(model: PreTrainedModel, examples: Examples) -> Float[np.ndarray, " I"]:
    """Mean NLL per supervised token of every example, in nats."""
    means = []
    for tokens in held_out_tokens(model, examples):
        assert tokens.sequence is not None
        means.append(Groups(tokens.sequence).mean(-tokens.label_log_probs))
    return torch.cat(means).double().cpu().numpy()


def diagnostics(
    model: PreTrainedModel, variant: Variant | None, examples: Examples, **models: PreTrainedModel
) -> dict[str, float | None]:
    """Means over held-out tokens of a trained model, in nats.

    Args:
        model: the trained model.
        variant: what it was trained with; None for the starting model.
        examples: encoded rows.
        models: "reference", the starting model, and the teacher of the variant.

    Returns:
        ``nll``: -log p_y; ``entropy``: H(p); ``kl_start``: KL(reference || p); ``negative_mass`` of Q; ``label_weight``:
        sum(-g_y) / sum(1 - p_y), the gradient on the labels as a share of SFT's. (The mean of -g_y / (1 - p_y) over tokens is
        unbounded where p_y is near 1 and Q_y is not.) The last two are None without a variant.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in ("nll", "entropy", "kl_start", "pull", "negative_mass")}
    room: list[Tensor] = []  # the label gradient of SFT
    for tokens in held_out_tokens(model, examples, variant, **models):
        start = tokens.log_probs_of("reference")
        sums["nll"].append(-tokens.label_log_probs)
        sums["entropy"].append(-expectation(tokens.probs, tokens.log_probs))
        sums["kl_start"].append(expectation(start.exp(), start - tokens.log_probs))
        if variant is not None:
            target = variant.target(tokens).at("unit")
            sums["pull"].append(target.pull)
            room.append(target.room)
            sums["negative_mass"].append(target.negative_mass)
    means = {name: torch.cat(rows).double().mean().item() if rows else None for name, rows in sums.items()}
    pull = means.pop("pull")
    return means | {"label_weight": None if pull is None else pull / torch.cat(room).double().mean().item()}


def label_scores(
    model: PreTrainedModel, variant: Variant, examples: Examples, **models: PreTrainedModel
) -> dict[str, Float[np.ndarray, " N"]]:
    """Three scores of every supervised label, rounded to six significant digits, so that rounding makes no order.

    Returns:
        ``p``: p_y; ``Q``: Q_y at unit scale; ``trust``: the label's coefficient in the method's own construction of Q,
        NaN for a loss without one.
    """
    parts: dict[str, list[Tensor]] = {"p": [], "Q": [], "trust": []}
    for tokens in held_out_tokens(model, examples, variant, **models):
        target = variant.target(tokens)
        trust = torch.full_like(target.trust, torch.nan) if variant.derived else target.trust
        for name, values in (("p", tokens.label_probs), ("Q", tokens.gather(target.at("unit").q)), ("trust", trust)):
            parts[name].append(values)
    exact = {name: np.frexp(torch.cat(values).double().cpu().numpy()) for name, values in parts.items()}
    return {name: np.ldexp(mantissa.round(6), exponent) for name, (mantissa, exponent) in exact.items()}


def separation(
    model: PreTrainedModel,
    variant: Variant,
    examples: Examples,
    correct: Float[np.ndarray, " N"],
    when: str,
    **models: PreTrainedModel,
) -> list[dict[str, Any]]:
    """AUROCs of the label scores, correct labels against noisy ones.

    Args:
        model, variant, examples, models: as for ``label_scores``.
        correct: of every supervised label 1 (correct), 0 (noisy) or NaN (no fact decides).
        when: "start" or "end" of training.

    Returns:
        a row per score, over the judged labels and over all (NaN counts as correct). Labels whose score is not finite are
        left out.
    """
    rows = []
    for score, values in label_scores(model, variant, examples, **models).items():
        for labels, mask in (("judged", ~np.isnan(correct)), ("all", np.ones_like(correct, dtype=bool))):
            mask &= np.isfinite(values)
            good = correct[mask] != 0
            row = {"when": when, "belief": score, "labels": labels, "auroc": auroc(values[mask], good)}
            rows.append(row | {"good": int(good.sum()), "noisy": int((~good).sum())})
    return rows


def reading(
    start: PreTrainedModel,
    variant: Variant,
    examples: Examples,
    correct: Float[np.ndarray, " N"] | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    models: Mapping[str, PreTrainedModel],
) -> dict[str, Any]:
    """Label weights and targets of a method on held-out tokens of the starting model, the same tokens for every method.

    Args:
        start, teacher: the starting model, and the teacher of the setting.
        variant, examples: the method, and encoded rows.
        correct: as for ``separation``; None without known label noise.
        tokenizer: of all models.
        models: other models as the method gets them; a control may get another teacher.

    Returns:
        ``label_weight``: p_y and -g_y / (1 - p_y) at the tokens nearest to an even grid of p_y. ``target``: p and Q at one
        token, of those whose label is not the most likely token the one with p_y nearest to 0.1. ``calibration``: trust
        against ``correct``.
    """
    tokens = next(held_out_tokens(start, examples, variant, **models))
    target, p_y = variant.target(tokens).at("unit"), tokens.label_probs
    grid = torch.linspace(0, 1, GRID, device=p_y.device)
    nearest = (p_y[None] - grid[:, None]).abs().argmin(-1).unique()
    label_weight = target.label_weight[nearest]
    finite = label_weight.isfinite()
    unlikely = (tokens.log_probs.argmax(-1) != tokens.labels).nonzero()[:, 0]
    among = unlikely if len(unlikely) else torch.arange(len(tokens), device=p_y.device)
    i = among[(p_y[among] - SHOWN_P_Y).abs().argmin()]
    with_teacher = next(held_out_tokens(start, examples, **({} if teacher is None else {"teacher": teacher})))
    columns = {
        "label_weight": {"p_y": p_y[nearest][finite].tolist(), "label_weight": label_weight[finite].tolist()},
        "target": _entries(with_teacher[i[None]], target.q[i], tokenizer),
    }
    if correct is not None:
        trust = label_scores(start, variant, examples, **models)["trust"]
        judged = ~np.isnan(correct) & np.isfinite(trust)
        columns["calibration"] = calibration(trust[judged], correct[judged])
    return columns


def _entries(token: Tokens, q: Float[Tensor, " V"], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """p and Q of the label and of the entries most likely under student or teacher; the others summed."""
    p, label = token.probs[0], int(token.labels[0])
    teacher = token.log_probs_of("teacher")[0].exp() if token.teacher is not None else p
    likely = torch.maximum(p, teacher).topk(min(CANDIDATES, len(p))).indices.tolist()
    likely = [token_id for token_id in likely if max(p[token_id], teacher[token_id]) >= SMALLEST]
    ids = sorted({label, *likely}, key=lambda token_id: -p[token_id].item())
    text = TokenText(tokenizer)
    names = [repr(text[token_id])[1:-1] for token_id in ids]
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    return {
        "token": [*names, "(rest)"],
        "label": [token_id == label for token_id in ids] + [False],
        "p": [*p[ids].tolist(), p[rest].sum().item()],
        "q": [*q[ids].tolist(), q[rest].sum().item()],
    }
