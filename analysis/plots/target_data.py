"""Frames behind the target plots: label weight, Q and g of variants on given tokens, all in unit scale."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlens.analysis.token_view.token_text import TokenText
from qlens.core.deprecation import renamed_arguments, renamed_attributes
from qlens.core.deprecation.columns import renamed_columns
from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import Variant, resolve

Variants = Iterable[Variant | str | Callable] | Mapping[str, Variant | str | Callable]
Decode = Callable[[int], str] | Any
"""A function from a token id to its text, or a tokenizer."""
OTHER_SHARES = (0.7, 0.2, 0.1)  # of 1 - p_y: the runner-up and two other entries
TEACHER = (0.35, 0.5, 0.1, 0.05)  # prefers the runner-up, as in ``qlens.destination``
SMALLEST = 0.005  # a probability that a bar can show
REST_OF_VOCABULARY = "(rest)"

__getattr__ = renamed_attributes(
    __name__,
    {
        "along": "text_frame",
        "candidates": "token_frame",
        "plane": "plane_frame",
        "sweep": "sweep_frame",
        "swept": "sweep_tokens",
        "Losses": "Variants",
    },
)


def sweep_tokens(p_y: Iterable[float] | None = None) -> Tokens:
    """Tokens with V = 4 that differ in p_y alone: the label, a runner-up with 0.7 of 1 - p_y, two others with 0.2 and 0.1.

    The teacher prefers the runner-up, the reference gives the label 0.5; the old policy and the second pass are the student.

    Args:
        p_y: N label probabilities between 0 and 1; by default 0.01, 0.02, ..., 0.99.

    Returns:
        N tokens in float64.

    Raises:
        InputError: a value outside (0, 1).

    Example:
        >>> sweep_tokens([0.5]).probs.round(decimals=2)
        tensor([[0.5000, 0.3500, 0.1000, 0.0500]], dtype=torch.float64)
    """
    p = torch.tensor(np.linspace(0.01, 0.99, 99) if p_y is None else list(p_y), dtype=torch.float64)
    if not bool(((p > 0) & (p < 1)).all()):
        raise InputError(f"p_y must lie between 0 and 1, got {[round(x, 6) for x in p.tolist() if not 0 < x < 1]}")
    shares = torch.tensor(OTHER_SHARES, dtype=torch.float64)
    logits = torch.cat([p[:, None], (1 - p)[:, None] * shares], 1).log()
    models = {
        "teacher": torch.tensor(TEACHER, dtype=torch.float64),
        "reference": torch.cat([shares.new_tensor([1]), shares]),
    }
    fields: dict[str, Any] = {name: probs.log().expand_as(logits) for name, probs in models.items()}
    ones, entries = torch.ones_like(p), torch.arange(4)
    fields |= {"advantage": ones, "critical": ones > 0, "hint": ones > 0, "negatives": (entries == 1).expand(len(p), 4)}
    labels, sequence = torch.zeros(len(p), dtype=torch.long), torch.arange(len(p))
    return Tokens(logits=logits, labels=labels, old=logits, second=logits, sequence=sequence, **fields)


@renamed_arguments(losses="variants")
def sweep_frame(variants: Variants, tokens: Tokens | None = None) -> pd.DataFrame:
    """Gradient, target and label weight of variants along p_y, for ``plot_sweep`` and ``figure_sweep``.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: N tokens; by default ``sweep_tokens()``.

    Returns:
        a row per variant and token: method, p_y, p_runner_up, label_grad and runner_up_grad (g of the label and of the most
        likely other token), q_label, q_runner_up, label_weight = -g_y / (1 - p_y), negative_mass.

    Raises:
        InputError: a variant needs a field that the tokens lack.

    Example:
        >>> sweep_frame(["dft"], sweep_tokens([0.5]))[["q_label", "label_grad"]].round(2).values.tolist()
        [[0.75, -0.25]]
    """
    tokens, parts = sweep_tokens() if tokens is None else tokens, []
    y = tokens.labels[:, None].long()
    runner_up = tokens.probs.scatter(1, y, -1).argmax(1, keepdim=True)
    for name, target in _targets(variants, tokens).items():
        columns = {
            "p_y": target.probs.gather(1, y),
            "p_runner_up": target.probs.gather(1, runner_up),
            "label_grad": target.grad.gather(1, y),
            "runner_up_grad": target.grad.gather(1, runner_up),
            "q_label": target.q.gather(1, y),
            "q_runner_up": target.q.gather(1, runner_up),
            "label_weight": target.label_weight,
            "negative_mass": target.negative_mass,
        }
        parts.append(_frame(columns, method=name))
    frame = pd.concat(parts, ignore_index=True)
    return renamed_columns(frame)


@renamed_arguments(losses="variants", pieces="token_text", at="i")
def token_frame(variants: Variants, tokens: Tokens, i: int, *, token_text: Decode = str, top: int = 8) -> pd.DataFrame:
    """p and Q of one token over its most relevant entries, for ``plot_update``, ``plot_target`` and ``figure_token``.

    The entries are the label and the ``top`` with the largest p or |Q| of any variant, at least 0.005, in the order of p;
    all others are summed as ``(rest)``.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: N tokens; all of them, for variants that use whole sequences.
        i: row of the token.
        token_text: a tokenizer, or a function from a token id to its text.
        top: number of entries beside the rest.

    Returns:
        a row per variant and entry: method, token, label, p, q; the update of the logits is -g = q - p.

    Raises:
        InputError: ``i`` is out of range, or a variant needs a field that the tokens lack.

    Example:
        >>> token_frame(["dft"], sweep_tokens([0.5]), 0)[["token", "q"]].round(3).values.tolist()
        [['0', 0.75], ['1', 0.175], ['2', 0.05], ['3', 0.025]]
    """
    if not -len(tokens) <= i < len(tokens):
        raise InputError(f"i must be a row of the {len(tokens)} tokens, got {i}")
    targets = _targets(variants, tokens)
    p, label = tokens.probs[i].detach().double(), int(tokens.labels[i])
    q = torch.stack([target.q[i].double() for target in targets.values()])
    size = torch.cat([p[None], q.abs()]).amax(0)
    size[label] = torch.inf
    largest = size.topk(min(top, len(p)))
    ids = largest.indices[largest.values >= SMALLEST].tolist()
    ids.sort(key=lambda token: -float(p[token]))
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    text = _decoder(token_text)
    names = [text(token) for token in ids]
    parts = []
    for name, row in zip(targets, q, strict=True):
        frame = pd.DataFrame({"method": name, "token": names, "label": [token == label for token in ids]})
        frame["p"], frame["q"] = p[ids].tolist(), row[ids].tolist()
        if bool(rest.any()):
            last = {"method": name, "token": REST_OF_VOCABULARY, "label": False}
            frame.loc[len(frame)] = last | {"p": float(p[rest].sum()), "q": float(row[rest].sum())}
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


@renamed_arguments(losses="variants", pieces="token_text")
def text_frame(variants: Variants, tokens: Tokens, *, token_text: Decode = str) -> pd.DataFrame:
    """Metrics of the targets along a text, for ``plot_sequence`` and ``figure_sequence``.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: the N tokens of the text, in order.
        token_text: a tokenizer, or a function from a token id to its text.

    Returns:
        a row per variant and token: method, position (0, 1, ...), token, p_y, label_weight = -g_y / (1 - p_y), entropy H(Q)
        and kl KL(Q || p) in nats (NaN where Q has negative mass), negative_mass, reshape.

    Raises:
        InputError: a variant needs a field that the tokens lack.

    Example:
        >>> text_frame(["sft", "gem"], sweep_tokens([0.2, 0.8])).groupby("method").label_weight.max().round(3).to_dict()
        {'gem': 1.053, 'sft': 1.0}
    """
    parts, text = [], _decoder(token_text)
    for name, target in _targets(variants, tokens).items():
        columns = {
            "p_y": tokens.label_probs,
            "label_weight": target.label_weight,
            "entropy": target.entropy,
            "kl": target.kl,
            "negative_mass": target.negative_mass,
            "reshape": target.reshape,
        }
        frame = _frame(columns, method=name)
        frame.insert(1, "position", range(len(tokens)))
        frame.insert(2, "token", [text(int(label)) for label in tokens.labels])
        parts.append(frame)
    return renamed_columns(pd.concat(parts, ignore_index=True))


@renamed_arguments(losses="variants")
def plane_frame(variants: Variants, tokens: Tokens) -> pd.DataFrame:
    """Label weight and reshape of variants on the same tokens, for ``plot_plane`` and ``figure_plane``.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: N real tokens, for example of ``Tokens.from_text``.

    Returns:
        a row per variant: method; label_weight = sum(-g_y) / sum(1 - p_y); reshape and negative_mass (means);
        label_weight_low, label_weight_high, reshape_low, reshape_high (quartiles over tokens); tokens (N).

    Raises:
        InputError: a variant needs a field that the tokens lack.

    Example:
        >>> plane_frame(["dft"], sweep_tokens([0.25, 0.75])).round(3)[["label_weight", "reshape"]].values.tolist()
        [[0.375, 0.0]]
    """
    rows = []
    for name, target in _targets(variants, tokens).items():
        row = {"method": name, "label_weight": float(target.pull.double().sum() / target.room.double().sum())}
        row |= {"reshape": float(target.reshape.double().mean())}
        row |= {"negative_mass": float(target.negative_mass.double().mean())}
        for key, values in {"label_weight": target.label_weight, "reshape": target.reshape}.items():
            finite = values[values.isfinite()].double().cpu().numpy()
            low, high = np.quantile(finite, (0.25, 0.75)) if len(finite) else (np.nan, np.nan)
            row |= {f"{key}_low": float(low), f"{key}_high": float(high)}
        rows.append(row | {"tokens": len(tokens)})
    return renamed_columns(pd.DataFrame(rows))


def _targets(variants: Variants, tokens: Tokens) -> dict[str, Target]:
    """Targets in unit scale by name."""
    if isinstance(variants, str | Variant) or not isinstance(variants, Iterable):
        variants = [variants]
    pairs = variants.items() if isinstance(variants, Mapping) else [((v := resolve(x)).spec, v) for x in variants]
    named = dict(pairs)
    if not named:
        raise InputError("variants is empty: give specs, Variants or callables")
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"variants has {repeated!r} twice: give each once, or a dict with a name for each")
    return {name: resolve(variant).target(tokens).at("unit") for name, variant in named.items()}


def _decoder(token_text: Decode) -> Callable[[int], str]:
    """The text of a token; part of a character (a lone surrogate), which no frame or file can hold, as its escape."""
    text = TokenText(token_text).__getitem__ if hasattr(token_text, "convert_ids_to_tokens") else token_text
    return lambda token: text(token).encode("utf-8", "backslashreplace").decode("utf-8")


def _frame(columns: Mapping[str, Tensor], method: str) -> pd.DataFrame:
    frame = pd.DataFrame({name: value.detach().double().flatten().cpu().numpy() for name, value in columns.items()})
    frame.insert(0, "method", method)
    return frame
