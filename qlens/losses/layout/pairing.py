"""Losses that compare the texts of their batch by their places: chosen in the first half, or in turn."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from qlens.core.errors import InputError
from qlens.core.probes.trial_tokens import random_tokens
from qlens.core.tokens import Tokens
from qlens.losses.layout import candidates
from qlens.losses.layout.layouts import Style
from qlens.losses.layout.signature import Memo, inputs
from qlens.losses.layout.trial import grad_of
from qlens.losses.replay import Replay

PAIRS, LENGTH, VOCABULARY = 3, 3, 32  # texts of LENGTH tokens, two to a pair
TRIED = 24  # layouts, at most
ORDERS = (0, 1, PAIRS, PAIRS + 1)  # by how many places the contents of the texts are moved
HALVES, ALTERNATE = "halves", "alternate"
PUSH = 0.3  # of the label logits of half of the texts
_FOUND = Memo()


def pairing(fn: Callable, params: Mapping[str, Any]) -> str:
    """How a loss of whole batches takes pairs, as ``Style.pairs``; "" if it takes none.

    A loss of pairs raises the texts at some places of its batch and lowers those at the others, whatever texts stand there.
    It is tried on six texts, whose contents change places. A loss that lowers the first text of each pair takes the rejected
    one first, unless it pulls harder as the second becomes likelier: then its sign is wrong.
    """
    if inputs(fn).kind in ("tokens", "hidden") or given_as_sums(fn):
        return ""
    return _FOUND.get(fn, repr(sorted(params.items(), key=str)), lambda: _pairing(fn, params))


def given_as_sums(fn: Callable) -> bool:
    """Whether a loss of pairs takes the summed log-probabilities of chosen and rejected sequences."""
    return any(role.endswith("chosen log probs") for role in inputs(fn).required.values())


def paired(fn: Callable, how: str) -> Iterator[list[Style]]:
    """The styles of a loss of pairs; log-probabilities without a mask are those of whole texts."""
    roles = {*inputs(fn).required.values(), *inputs(fn).optional.values()}
    if "log probs" in roles and not {"labels", "mask", "attention mask"} & roles:
        yield [Style(pairs=how)]
    for similar in candidates.plain(fn):
        if laid_out := [replace(style, pairs=how) for style in similar if style.laid_out]:
            yield laid_out


def _pairing(fn: Callable, params: Mapping[str, Any]) -> str:
    texts = torch.arange(2 * PAIRS).repeat_interleave(LENGTH)
    places = {"sequence": texts, "pair": texts % PAIRS, "chosen": texts < PAIRS}  # in halves each text is at its place
    tokens = random_tokens(len(texts), VOCABULARY).replace(**places)
    with Replay(tokens.logits.device, fn).again():
        for number, style in enumerate(style for similar in paired(fn, HALVES) for style in similar):
            if number == TRIED:
                break
            try:
                signs = [_signs(fn, params, tokens, places, style, shift) for shift in ORDERS]
            except InputError:
                continue
            if bool(torch.stack(signs).any()):
                how, raised = _pattern(torch.stack(signs))
                return f"rejected {how}" if raised < 0 and _saturates(fn, params, tokens, style) else how
    return ""


def _saturates(fn: Callable, params: Mapping[str, Any], tokens: Tokens, style: Style) -> bool:
    """Whether the gradient does not grow as the texts of the second half become likelier."""
    pushed = tokens.replace(logits=tokens.logits + PUSH * tokens.one_hot * ~tokens.require("chosen")[:, None])
    before, after = (
        float(
            (
                grad_of(fn, params, some_tokens, style).nan_to_num(0.0).norm(dim=-1) / some_tokens.rest_log_probs.exp()
            ).sum()
        )
        for some_tokens in (tokens, pushed)
    )
    return after <= before * (1 + 1e-9)


def _signs(
    fn: Callable,
    params: Mapping[str, Any],
    tokens: Tokens,
    places: Mapping[str, torch.Tensor],
    style: Style,
    shift: int,
) -> torch.Tensor:
    """1 for places whose text's labels are raised, -1 for lowered ones, with the texts moved on by some places."""
    order = torch.arange(len(tokens)).roll(shift * LENGTH)
    reordered = tokens[order].replace(**places)
    grad = grad_of(fn, params, reordered, style).nan_to_num(0.0)
    at_labels = -grad.gather(1, reordered.labels[:, None])[:, 0].view(2 * PAIRS, LENGTH)
    signs = at_labels.sign()
    return torch.where((signs == signs[:, :1]).all(1), signs[:, 0], 2.0)


def _pattern(signs: torch.Tensor) -> tuple[str, float]:
    """The arrangement of a table of signs, (orders, texts), and the sign of the first text of a pair.

    A loss may leave pairs alone that are far enough apart.
    """
    places = torch.arange(2 * PAIRS)
    for how, first in ((HALVES, places < PAIRS), (ALTERNATE, places % 2 == 0)):
        sides = torch.where(first, signs, -signs)
        nonzero = sides[sides != 0]
        both = bool(signs[:, first].any() and signs[:, ~first].any())
        if both and bool((nonzero == nonzero[0]).all()) and abs(float(nonzero[0])) == 1:
            return how, float(nonzero[0])
    return "", 0.0
