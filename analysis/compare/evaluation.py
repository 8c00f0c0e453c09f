"""What a method and a trained model are like on held-out tokens: diagnostics, trust against p_y, targets at one token."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlens.analysis.compare.label_noise import auroc, calibration
from qlens.core.numerics import expectation
from qlens.core.segments import Groups
from qlens.core.tokens import Tokens
from qlens.data.compatibility import vocabulary_size
from qlens.data.from_text import token_batches
from qlens.registry import Variant

ENTRIES = 20_000_000  # logits held at a time
GRID = 60  # tokens of the figure of trust
DOUBTED = 0.1  # the p_y of the token whose targets are shown
CANDIDATES = 6

Examples = Sequence[Mapping[str, Sequence[int]]]


def held_tokens(
    model: PreTrainedModel, examples: Examples, variant: Variant | None = None, **others: PreTrainedModel
) -> Iterator[Tokens]:
    """Tokens at all supervised positions, some whole examples at a time; ``others`` fill the fields of those names."""
    needs = () if variant is None else variant.needs
    longest = max(len(example["input_ids"]) for example in examples)
    return token_batches(model, examples, max(1, ENTRIES // (longest * vocabulary_size(model))), needs, **others)


def row_nll(model: PreTrainedModel, examples: Examples) -> Float[np.ndarray, " I"]:
    """The mean NLL per supervised token of every example, in nats."""
    means = []
    for tokens in held_tokens(model, examples):
        assert tokens.sequence is not None
        means.append(Groups(tokens.sequence).mean(-tokens.label_log_probs))
    return torch.cat(means).double().cpu().numpy()


def diagnostics(
    model: PreTrainedModel, variant: Variant | None, examples: Examples, **others: PreTrainedModel
) -> dict[str, float | None]:
    """Means over held-out tokens of a trained model, in nats; the last two are None without a variant.

    ``nll``: -log p_y. ``entropy``: H(p). ``kl_start``: KL(start || p), where the start is the ``reference`` among the
    others. ``negative_mass``: what Q has below zero. ``trust``: the effective trust, each token with the weight 1 - p_y,
    sum(-g_y) / sum(1 - p_y): how hard the labels are pulled as a share of SFT's pull. (Its plain mean says little: where
    a target does not end at the label, the trust of a token whose p_y is nearly 1 is as large as you like.)
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in ("nll", "entropy", "kl_start", "pull", "negative_mass")}
    room: list[Tensor] = []  # what SFT would pull by
    for tokens in held_tokens(model, examples, variant, **others):
        started = tokens.log_probs_of("reference")
        sums["nll"].append(-tokens.label_log_probs)
        sums["entropy"].append(-expectation(tokens.probs, tokens.log_probs))
        sums["kl_start"].append(expectation(started.exp(), started - tokens.log_probs))
        if variant is not None:
            target = variant.target(tokens).at("unit")
            sums["pull"].append(target.pull)
            room.append(target.room)
            sums["negative_mass"].append(target.negative_mass)
    means = {name: torch.cat(rows).double().mean().item() if rows else None for name, rows in sums.items()}
    pull = means.pop("pull")
    return means | {"trust": None if pull is None else pull / torch.cat(room).double().mean().item()}


def beliefs(
    model: PreTrainedModel, variant: Variant, examples: Examples, **others: PreTrainedModel
) -> dict[str, Float[np.ndarray, " N"]]:
    """Of every supervised token: ``p``, what the model gives the label; ``Q``, what the target (at unit scale) gives it.

    ``trust``: the label's coefficient in the method's own construction; NaN for a loss whose construction is not known.
    All to six significant digits: what differs by rounding alone is the same belief.
    """
    found: dict[str, list[Tensor]] = {"p": [], "Q": [], "trust": []}
    for tokens in held_tokens(model, examples, variant, **others):
        target = variant.target(tokens)
        trust = torch.full_like(target.trust, torch.nan) if variant.derived else target.trust
        for name, values in (("p", tokens.label_probs), ("Q", tokens.gather(target.at("unit").q)), ("trust", trust)):
            found[name].append(values)
    parts = {name: np.frexp(torch.cat(values).double().cpu().numpy()) for name, values in found.items()}
    return {name: np.ldexp(mantissa.round(6), exponent) for name, (mantissa, exponent) in parts.items()}


def separation(
    model: PreTrainedModel,
    variant: Variant,
    examples: Examples,
    truth: Float[np.ndarray, " N"],
    when: str,
    **others: PreTrainedModel,
) -> list[dict[str, Any]]:
    """How well beliefs tell good labels from noisy ones: an AUROC per belief, over judged labels and over all.

    Judged are the labels whose truth is known to be one or the other; among ``all``, the rest counts as good. A belief
    that is not finite at some token leaves it out.
    """
    rows = []
    for belief, values in beliefs(model, variant, examples, **others).items():
        for labels, kept in (("judged", ~np.isnan(truth)), ("all", np.ones_like(truth, dtype=bool))):
            kept &= np.isfinite(values)
            good = truth[kept] != 0
            row = {"when": when, "belief": belief, "labels": labels, "auroc": auroc(values[kept], good)}
            rows.append(row | {"good": int(good.sum()), "noisy": int((~good).sum())})
    return rows


def reading(
    start: PreTrainedModel,
    variant: Variant,
    examples: Examples,
    truth: Float[np.ndarray, " N"] | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    others: Mapping[str, PreTrainedModel],
) -> dict[str, Any]:
    """A method's trust and targets on the starting model's held-out tokens, the same tokens for every method.

    ``trust``: p_y and effective trust at the tokens nearest to an even grid of p_y. ``target``: p and Q of the candidates
    at one token: the label, what model and ``teacher`` hold most likely, and the rest together (``others`` are the models
    that the method itself is given: a control may be given another teacher). That token is chosen before
    any result is known: of those where the label is not the model's favourite, the one with p_y nearest to 0.1.
    ``calibration``: the method's own trust against the truth of the judged labels, where there is one.
    """
    tokens = next(held_tokens(start, examples, variant, **others))
    target, p_y = variant.target(tokens).at("unit"), tokens.label_probs
    grid = torch.linspace(0, 1, GRID, device=p_y.device)
    shown = (p_y[None] - grid[:, None]).abs().argmin(-1).unique()
    trust = target.label_weight[shown]
    kept = trust.isfinite()
    doubted = (tokens.log_probs.argmax(-1) != tokens.labels).nonzero()[:, 0]
    among = doubted if len(doubted) else torch.arange(len(tokens), device=p_y.device)
    at = among[(p_y[among] - DOUBTED).abs().argmin()]
    read = {
        "trust": {"p_y": p_y[shown][kept].tolist(), "trust": trust[kept].tolist()},
        "target": _candidates(_seen(start, examples, teacher)[at[None]], target.q[at], tokenizer),
    }
    if truth is not None:
        own = beliefs(start, variant, examples, **others)["trust"]
        judged = ~np.isnan(truth) & np.isfinite(own)
        read["calibration"] = calibration(own[judged], truth[judged])
    return read


def _seen(start: PreTrainedModel, examples: Examples, teacher: PreTrainedModel | None) -> Tokens:
    return next(held_tokens(start, examples, **({} if teacher is None else {"teacher": teacher})))


def _candidates(token: Tokens, q: Float[Tensor, " V"], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    p, label = token.probs[0], int(token.labels[0])
    teacher = token.log_probs_of("teacher")[0].exp() if token.teacher is not None else p
    likely = torch.maximum(p, teacher).topk(min(CANDIDATES, len(p))).indices.tolist()
    likely = [token_id for token_id in likely if max(p[token_id], teacher[token_id]) >= 0.01]
    ids = sorted({label, *likely}, key=lambda token_id: -p[token_id].item())
    names = [repr(tokenizer.convert_ids_to_tokens(token_id))[1:-1] for token_id in ids]
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    return {
        "token": [*names, "(rest)"],
        "label": [token_id == label for token_id in ids] + [False],
        "p": [*p[ids].tolist(), p[rest].sum().item()],
        "q": [*q[ids].tolist(), q[rest].sum().item()],
    }
