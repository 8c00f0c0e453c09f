"""Summary of tokens for token view and ranking: a few metrics and the top entries of each, instead of all V."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qlens.core.numerics import expectation
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.data.from_text import ENTRIES, token_batches
from qlens.registry import Variant
from qlens.registry.variant import ALONE


@dataclass(frozen=True, eq=False)
class Summary:
    """Metrics and top entries of N tokens under M methods, on the CPU in float32; K entries per token for all methods.

    Args:
        models: a row per token: label, p_y, nll, entropy, p_other = 1 - p_y, runner_up, p_runner_up,
            negative_margin_student; with a teacher also teacher_y, negative_margin_teacher and disagreement; negative_margin.
        methods: by spec, a row per token in unit scale: q_y, label_weight, label_gradient = -g_y, q_other = 1 - Q_y, reshape,
            kl, entropy, negative_mass, total.
        ids, probs: the entries and their p, (N, K), by falling p.
        moves: Q - p of the entries in unit scale, (M, N, K).
        teacher: their probabilities under the teacher, (N, K), or None.
    """

    models: pd.DataFrame
    methods: Mapping[str, pd.DataFrame]
    ids: Int[np.ndarray, "N K"]
    probs: Float[np.ndarray, "N K"]
    moves: Float[np.ndarray, "M N K"]
    teacher: Float[np.ndarray, "N K"] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> "Summary":
        """The chosen tokens."""
        frames = {name: frame.iloc[index].reset_index(drop=True) for name, frame in self.methods.items()}
        models = self.models.iloc[index].reset_index(drop=True)
        teacher = None if self.teacher is None else self.teacher[index]
        return Summary(models, frames, self.ids[index], self.probs[index], self.moves[:, index], teacher)

    @classmethod
    def join(cls, parts: Sequence["Summary"]) -> "Summary":
        """One summary of all tokens, in order."""
        joined = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(
            models=pd.concat(joined["models"], ignore_index=True),
            methods={
                name: pd.concat([methods[name] for methods in joined["methods"]], ignore_index=True)
                for name in parts[0].methods
            },
            ids=np.concatenate(joined["ids"]),
            probs=np.concatenate(joined["probs"]),
            moves=np.concatenate(joined["moves"], 1),
            teacher=None if parts[0].teacher is None else np.concatenate(joined["teacher"]),
        )


def summarise(tokens: Tokens, variants: Sequence[Variant], candidates: int = 20) -> Summary:
    r"""Summarise a chunk of tokens.

    .. math::
        \mathrm{negative\ margin}_m = \max_{k \ne y} \log m_k - \log m_y, \qquad
        \mathrm{negative\ margin} = \min(\mathrm{of\ the\ student}, \mathrm{of\ the\ teacher}), \qquad
        \mathrm{disagreement} = \tfrac12 \sum_k |\mathrm{teacher}_k - p_k|

    Without a teacher the negative margin is the student's. The entries are the label, of each method the one with the
    largest |Q - p|, then those with the largest max(p, |Q|) over all methods: K = max(candidates, M + 1), at most V.

    Args:
        tokens: (n, V) with the fields that the methods need; whole sequences for methods of that scope.
        variants: M methods with different specs.
        candidates: entries per token.

    Raises:
        InputError: a method needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> tokens = Tokens(logits=torch.tensor([[0.0, 1.0, 2.0]]), labels=torch.tensor([1]))
        >>> summary = summarise(tokens, [qlens.get("dft")], candidates=2)
        >>> summary.ids.tolist(), summary.models["negative_margin"].round(3).tolist()
        ([[2, 1]], [1.0])
    """
    targets = {variant.spec: variant.target(tokens).at("unit") for variant in variants}
    p, labels = tokens.probs.detach(), tokens.labels[:, None].long()
    moves = [-target.grad for target in targets.values()]
    weight = p.clone()
    for move in moves:
        weight = torch.maximum(weight, (p + move).abs().nan_to_num(0.0))
    weight.scatter_(1, labels, torch.inf)
    for move in moves:
        weight.scatter_(1, move.abs().nan_to_num(0.0).argmax(-1, keepdim=True), torch.inf)
    chosen = weight.topk(min(max(candidates, len(variants) + 1), p.shape[1])).indices
    chosen = chosen.gather(1, p.gather(1, chosen).argsort(dim=-1, descending=True, stable=True))
    teacher = None if tokens.teacher is None else _array(tokens.log_probs_of("teacher").exp().gather(1, chosen))
    return Summary(
        models=pd.DataFrame({name: _array(values) for name, values in _of_models(tokens).items()}),
        methods={
            name: pd.DataFrame(
                {
                    "q_y": _array(target.q_y),
                    "label_weight": _array(target.label_weight),
                    "label_gradient": _array(target.pull),
                    "q_other": _array(target.room - target.pull),
                    "reshape": _array(target.reshape),
                    "kl": _array(target.kl),
                    "entropy": _array(target.entropy),
                    "negative_mass": _array(target.negative_mass),
                    "total": _array(target.total),
                }
            )
            for name, target in targets.items()
        },
        ids=chosen.cpu().numpy().astype(np.int32),
        probs=_array(p.gather(1, chosen)),
        moves=np.stack([_array(move.gather(1, chosen)) for move in moves])
        if moves
        else np.zeros((0, *chosen.shape), np.float32),
        teacher=teacher,
    )


def _of_models(tokens: Tokens) -> dict[str, Tensor]:
    """Metrics of the models alone."""
    log_p = tokens.log_probs.detach()
    margin, runner_up, p_runner_up = negative_margin(tokens, log_p)
    metrics = {
        "label": tokens.labels,
        "p_y": tokens.label_probs.detach(),
        "nll": -tokens.label_log_probs.detach(),
        "entropy": -expectation(log_p.exp(), log_p),
        "p_other": Target.push(tokens, 1.0).rest,
        "negative_margin_student": margin,
        "runner_up": runner_up,
        "p_runner_up": p_runner_up,
    }
    if tokens.teacher is None:
        return metrics | {"negative_margin": margin}
    log_t = tokens.log_probs_of("teacher")
    teacher_margin, _, _ = negative_margin(tokens, log_t)
    return metrics | {
        "teacher_y": tokens.gather(log_t).exp(),
        "negative_margin_teacher": teacher_margin,
        "disagreement": (log_t.exp() - log_p.exp()).abs().sum(-1) / 2,
        "negative_margin": torch.minimum(margin, teacher_margin),
    }


def negative_margin(
    tokens: Tokens, log_p: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, " N"]]:
    """log p of the runner-up minus log p of the label; the id of the runner-up; its p."""
    top = log_p.scatter(1, tokens.labels[:, None].long(), -torch.inf).max(-1)
    return top.values - tokens.gather(log_p), top.indices, top.values.exp()


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def chunks(
    model: nn.Module, examples: Sequence[Mapping[str, Any]], needs: Sequence[str], whole: bool, **models: nn.Module
) -> Iterator[Tokens]:
    """The tokens of texts in order, at most ``ENTRIES`` logits and one text at a time; ``whole`` keeps a text together.

    Models with a linear head hold no other logits meanwhile.
    """
    yield from token_batches(model, examples, 1, needs, None if whole else ENTRIES, **models)


def summary_of(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    variants: Sequence[Variant],
    candidates: int,
    **models: nn.Module,
) -> Summary:
    """Summarise all supervised tokens of encoded texts, each of which has at least one.

    Methods of scope "token" see a chunk at a time. If one has scope "sequence" or "batch", all see whole texts; a weight that
    is normalised over the batch is normalised within the text.
    """
    needs = sorted({need for variant in variants for need in variant.needs})
    whole = any(variant.scope not in ALONE for variant in variants)
    return Summary.join(
        [summarise(tokens, variants, candidates) for tokens in chunks(model, examples, needs, whole, **models)]
    )
