"""Readings: what losses teach on some tokens, as the frames that the plots draw; Q and g in unit scale throughout."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlens.core.errors import InputError
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.registry import Variant, resolve

Losses = Iterable[Variant | str | Callable] | Mapping[str, Variant | str | Callable]
REST = (0.7, 0.2, 0.1)  # of what the label leaves: the strongest rival's share, and two others'
TEACHER = (0.35, 0.5, 0.1, 0.05)  # prefers the rival, as in ``destination``
LEAST = 0.005  # a probability that a bar can show
REST_OF_VOCABULARY = "(rest)"


def swept(p_y: Iterable[float] | None = None) -> Tokens:
    """Tokens that differ in p_y alone, (N, 4): a label, its strongest rival with .7 of the rest, two others with .2 and .1.

    The teacher prefers the rival, the reference gives the label .5, the old policy and the second pass are the student.

    Args:
        p_y: label probabilities between 0 and 1; by default .01, .02, ..., .99.

    Raises:
        InputError: a value outside (0, 1).

    Example:
        >>> swept([0.5]).probs.round(decimals=2)
        tensor([[0.5000, 0.3500, 0.1000, 0.0500]], dtype=torch.float64)
    """
    p = torch.tensor(np.linspace(0.01, 0.99, 99) if p_y is None else list(p_y), dtype=torch.float64)
    if not bool(((p > 0) & (p < 1)).all()):
        raise InputError(f"p_y must lie between 0 and 1, got {[round(x, 6) for x in p.tolist() if not 0 < x < 1]}")
    rest = torch.tensor(REST, dtype=torch.float64)
    logits = torch.cat([p[:, None], (1 - p)[:, None] * rest], 1).log()
    fixed = {
        "teacher": torch.tensor(TEACHER, dtype=torch.float64),
        "reference": torch.cat([rest.new_tensor([1]), rest]),
    }
    fields: dict[str, Any] = {name: probs.log().expand_as(logits) for name, probs in fixed.items()}
    ones, entries = torch.ones_like(p), torch.arange(4)
    fields |= {"advantage": ones, "critical": ones > 0, "hint": ones > 0, "negatives": (entries == 1).expand(len(p), 4)}
    labels, each = torch.zeros(len(p), dtype=torch.long), torch.arange(len(p))
    return Tokens(logits=logits, labels=labels, old=logits, second=logits, sequence=each, **fields)


def sweep(losses: Losses, tokens: Tokens | None = None) -> pd.DataFrame:
    """Gradient, target and trust of losses along p_y, as ``plot_sweep`` draws them: the authors' chart for any loss.

    Columns: method, p_y, p_rival, label_grad, other_grad (g of the label and of its strongest rival), q_label, q_rest,
    trust, negative_mass.

    Args:
        losses: specs, Variants or callables, or these by the names that the figure shall give them.
        tokens: where to read them; by default ``swept()``.

    Raises:
        InputError: a loss that needs what the tokens lack.

    Example:
        >>> sweep(["dft"], swept([0.5]))[["q_label", "label_grad"]].round(2).values.tolist()
        [[0.75, -0.25]]
    """
    tokens, parts = swept() if tokens is None else tokens, []
    y = tokens.labels[:, None].long()
    rival = tokens.probs.scatter(1, y, -1).argmax(1, keepdim=True)
    for name, target in _targets(losses, tokens).items():
        columns = {
            "p_y": target.probs.gather(1, y),
            "p_rival": target.probs.gather(1, rival),
            "label_grad": target.grad.gather(1, y),
            "other_grad": target.grad.gather(1, rival),
            "q_label": target.q.gather(1, y),
            "q_rest": target.q.gather(1, rival),
            "trust": target.label_weight,
            "negative_mass": target.negative_mass,
        }
        parts.append(_frame(columns, method=name))
    return pd.concat(parts, ignore_index=True)


def candidates(
    losses: Losses, tokens: Tokens, at: int, *, pieces: Callable[[int], str] = str, top: int = 8
) -> pd.DataFrame:
    """One token's p and Q over its top tokens, as ``plot_update`` and ``plot_target`` draw them.

    Shown are the label and the ``top`` tokens that the student or any of the targets holds most likely or pushes down most,
    in the order of p, down to half a percent; the others together are ``(rest)``.
    Columns: method, token, label, p, q; the update is -g = q - p.

    Args:
        losses: specs, Variants or callables, or these by name.
        tokens: the tokens around it too, for losses that look at a whole sequence.
        at: which row of the tokens.
        pieces: turns a token id into its text.
        top: how many tokens beside the rest.

    Raises:
        InputError: ``at`` is no row, or a loss needs what the tokens lack.

    Example:
        >>> candidates(["dft"], swept([0.5]), 0)[["token", "q"]].round(3).values.tolist()
        [['0', 0.75], ['1', 0.175], ['2', 0.05], ['3', 0.025]]
    """
    if not -len(tokens) <= at < len(tokens):
        raise InputError(f"at must be a row of the {len(tokens)} tokens, got {at}")
    targets = _targets(losses, tokens)
    p, label = tokens.probs[at].detach().double(), int(tokens.labels[at])
    q = torch.stack([target.q[at].double() for target in targets.values()])
    weight = torch.cat([p[None], q.abs()]).amax(0)
    weight[label] = torch.inf
    most = weight.topk(min(top, len(p)))
    ids = most.indices[most.values >= LEAST].tolist()
    ids.sort(key=lambda token: -float(p[token]))
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    names = [_text(pieces, token) for token in ids]
    parts = []
    for name, row in zip(targets, q, strict=True):
        frame = pd.DataFrame({"method": name, "token": names, "label": [token == label for token in ids]})
        frame["p"], frame["q"] = p[ids].tolist(), row[ids].tolist()
        if bool(rest.any()):
            last = {"method": name, "token": REST_OF_VOCABULARY, "label": False}
            frame.loc[len(frame)] = last | {"p": float(p[rest].sum()), "q": float(row[rest].sum())}
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def along(losses: Losses, tokens: Tokens, *, pieces: Callable[[int], str] = str) -> pd.DataFrame:
    """Targets along a text, a row per method and token, as ``plot_sequence`` draws them.

    Columns: method, position (0, 1, ...), token, p_y, trust (effective), entropy H(Q) and kl KL(Q || p) in nats (NaN where Q
    is signed), negative_mass, reshape.

    Args:
        losses: specs, Variants or callables, or these by name.
        tokens: those of the text, in order.
        pieces: turns a token id into its text.

    Raises:
        InputError: a loss needs what the tokens lack.

    Example:
        >>> along(["sft", "gem"], swept([0.2, 0.8])).groupby("method").trust.max().round(3).to_dict()
        {'gem': 1.053, 'sft': 1.0}
    """
    parts = []
    for name, target in _targets(losses, tokens).items():
        columns = {
            "p_y": tokens.label_probs,
            "trust": target.label_weight,
            "entropy": target.entropy,
            "kl": target.kl,
            "negative_mass": target.negative_mass,
            "reshape": target.reshape,
        }
        frame = _frame(columns, method=name)
        frame.insert(1, "position", range(len(tokens)))
        frame.insert(2, "token", [_text(pieces, int(label)) for label in tokens.labels])
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def plane(losses: Losses, tokens: Tokens) -> pd.DataFrame:
    """Every method's trust and reshape on the same tokens, as ``plot_plane`` draws them; a row per method.

    Columns: method; trust, the pull on the labels as a share of SFT's, sum(-g_y) / sum(1 - p_y); reshape, the mean;
    negative_mass, the mean; trust_low, trust_high, reshape_low, reshape_high: the middle half of the tokens' own; tokens.

    Args:
        losses: specs, Variants or callables, or these by name.
        tokens: real ones, say of ``Tokens.from_text``.

    Raises:
        InputError: a loss needs what the tokens lack.

    Example:
        >>> plane(["dft"], swept([0.25, 0.75])).round(3)[["trust", "reshape"]].values.tolist()
        [[0.375, 0.0]]
    """
    rows = []
    for name, target in _targets(losses, tokens).items():
        row = {"method": name, "trust": float(target.pull.double().sum() / target.room.double().sum())}
        spread = {"trust": target.label_weight, "reshape": target.reshape}
        row |= {"reshape": float(target.reshape.double().mean())}
        row |= {"negative_mass": float(target.negative_mass.double().mean())}
        for key, values in spread.items():
            finite = values[values.isfinite()].double().cpu().numpy()
            low, high = np.quantile(finite, (0.25, 0.75)) if len(finite) else (np.nan, np.nan)
            row |= {f"{key}_low": float(low), f"{key}_high": float(high)}
        rows.append(row | {"tokens": len(tokens)})
    return pd.DataFrame(rows)


def _targets(losses: Losses, tokens: Tokens) -> dict[str, Target]:
    """The targets of all losses in unit scale, by name."""
    if isinstance(losses, str | Variant) or not isinstance(losses, Iterable):
        losses = [losses]
    given = losses.items() if isinstance(losses, Mapping) else [((v := resolve(each)).spec, v) for each in losses]
    named = dict(given)
    if not named:
        raise InputError("losses is empty: give specs, Variants or callables")
    if len(named) < len(given):
        names = [name for name, _ in given]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"losses has {twice!r} twice: give each once, or a dict with a name for each")
    return {name: resolve(each).target(tokens).at("unit") for name, each in named.items()}


def _text(pieces: Callable[[int], str], token: int) -> str:
    """The text of a token; half a character (a lone surrogate), which no frame or file holds, as its escape."""
    return pieces(token).encode("utf-8", "backslashreplace").decode("utf-8")


def _frame(columns: Mapping[str, Tensor], method: str) -> pd.DataFrame:
    frame = pd.DataFrame({name: value.detach().double().flatten().cpu().numpy() for name, value in columns.items()})
    frame.insert(0, "method", method)
    return frame
