"""Summary of tokens for token view and ranking: a few metrics and the top entries of each, instead of all V."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, repeat
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qlens.analysis.token_view.vocabulary import VocabularyTotals
from qlens.core.numerics import expectation, release_memory, top_ids
from qlens.core.progress import track
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.data.compatibility import vocabulary_size
from qlens.data.from_text import ENTRIES, token_batches
from qlens.registry import Variant
from qlens.registry.variant import ALONE

RELEASED = 16  # rows between releases of memory
LONG = 2**24  # logits whose reading takes long enough to show progress


@dataclass(frozen=True, eq=False)
class Summary:
    """Metrics and top entries of N tokens under M methods, on the CPU in float32; K entries per token for all methods.

    Args:
        models: a row per token: label, p_y, nll, entropy, p_other = 1 - p_y, label_rank, runner_up, p_runner_up,
            negative_margin_student; with a teacher also teacher_y, teacher_rank, negative_margin_teacher and disagreement;
            negative_margin; with ``top_k_teacher`` also teacher_top_mass.
        methods: by name, a row per token in unit scale: q_y, label_weight, label_gradient = -g_y, q_other = 1 - Q_y, reshape,
            kl, entropy, negative_mass, total.
        ids, probs: the entries and their p, (N, K), by falling p.
        moves: Q - p of the entries in unit scale, (M, N, K).
        teacher: their probabilities under the teacher, (N, K), or None.
        after: the same entries under another checkpoint of the model, or None; its ``models`` also has ``change``.
    """

    models: pd.DataFrame
    methods: Mapping[str, pd.DataFrame]
    ids: Int[np.ndarray, "N K"]
    probs: Float[np.ndarray, "N K"]
    moves: Float[np.ndarray, "M N K"]
    teacher: Float[np.ndarray, "N K"] | None = None
    after: "Summary | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> "Summary":
        """The chosen tokens."""
        frames = {name: frame.iloc[index].reset_index(drop=True) for name, frame in self.methods.items()}
        models = self.models.iloc[index].reset_index(drop=True)
        teacher = None if self.teacher is None else self.teacher[index]
        after = None if self.after is None else self.after[index]
        return Summary(models, frames, self.ids[index], self.probs[index], self.moves[:, index], teacher, after)

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
            after=None if parts[0].after is None else cls.join(joined["after"]),
        )


def summarise(
    tokens: Tokens,
    variants: Sequence[Variant],
    candidates: int = 20,
    *,
    after: Tokens | None = None,
    top_k_teacher: int | None = None,
    totals: VocabularyTotals | None = None,
) -> Summary:
    r"""Summarise a chunk of tokens.

    .. math::
        \mathrm{negative\ margin}_m = \max_{k \ne y} \log m_k - \log m_y, \qquad
        \mathrm{negative\ margin} = \min(\mathrm{of\ the\ student}, \mathrm{of\ the\ teacher}), \qquad
        \mathrm{disagreement} = \tfrac12 \sum_k |\mathrm{teacher}_k - p_k|

    Without a teacher the negative margin is the student's. The label's rank is 1 + the number of entries with a larger
    probability. The entries are the label, of each method the one with the largest |Q - p|, then those with the largest
    max(p, |Q|) over all methods and checkpoints: K = max(candidates, M + 1), at most V.

    Args:
        tokens: (n, V) with the fields that the methods need; whole sequences for methods of that scope.
        variants: M methods with different specs.
        candidates: entries per token.
        after: the same tokens under another checkpoint of the model.
        top_k_teacher: methods of a teacher are read a second time with a teacher that is known by its k most probable
            entries alone; the rest of its mass is shared out in the student's ratios.
        totals: sums over the vocabulary, to which this chunk is added.

    Raises:
        InputError: a method needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> tokens = Tokens(logits=torch.tensor([[0.0, 1.0, 2.0]]), labels=torch.tensor([1]))
        >>> summary = summarise(tokens, [qlens.get("dft")], candidates=2)
        >>> summary.ids.tolist(), summary.models["label_rank"].tolist()
        ([[2, 1]], [2])
    """
    checkpoints = [tokens] if after is None else [tokens, after]
    tops = [None if top_k_teacher is None else _top_teacher(each, top_k_teacher) for each in checkpoints]
    targets = [_targets(each, variants, top_k_teacher, top) for each, top in zip(checkpoints, tops, strict=True)]
    probs, labels = [each.probs.detach() for each in checkpoints], tokens.labels[:, None].long()
    moves = [[-target.grad for target in chosen.values()] for chosen in targets]
    if totals is not None:
        totals.add(labels[:, 0], probs[0], dict(zip(targets[0], moves[0], strict=True)))
    weight = torch.zeros_like(probs[0])
    for p, of_methods in zip(probs, moves, strict=True):
        weight = torch.maximum(weight, p)
        for move in of_methods:
            weight = torch.maximum(weight, (p + move).abs().nan_to_num(0.0))
    weight.scatter_(1, labels, torch.inf)
    for move in moves[0]:
        weight.scatter_(1, move.abs().nan_to_num(0.0).argmax(-1, keepdim=True), torch.inf)
    chosen = weight.topk(min(max(candidates, len(moves[0]) + 1), weight.shape[1])).indices
    chosen = chosen.gather(1, probs[0].gather(1, chosen).argsort(dim=-1, descending=True, stable=True))
    teacher = None if tokens.teacher is None else _array(tokens.log_probs_of("teacher").exp().gather(1, chosen))
    parts = []
    for each, p, of_methods, chunk_targets in zip(checkpoints, probs, moves, targets, strict=True):
        metrics = _of_models(each)
        if tops[0] is not None:
            metrics |= {"teacher_top_mass": tops[0][1]}
        if each is not tokens:
            metrics |= {"change": (p - probs[0]).abs().sum(-1) / 2}
        part = Summary(
            models=pd.DataFrame({name: _array(values) for name, values in metrics.items()}),
            methods={name: _of_method(each, target) for name, target in chunk_targets.items()},
            ids=chosen.cpu().numpy().astype(np.int32),
            probs=_array(p.gather(1, chosen)),
            moves=np.stack([_array(move.gather(1, chosen)) for move in of_methods])
            if of_methods
            else np.zeros((0, *chosen.shape), np.float32),
            teacher=teacher,
        )
        parts.append(part)
    return parts[0] if after is None else replace(parts[0], after=parts[1])


def _targets(
    tokens: Tokens, variants: Sequence[Variant], top_k_teacher: int | None, top: tuple[Tensor, Tensor] | None
) -> dict[str, Target]:
    """Targets by method, in unit scale; with ``top_k_teacher``, methods of a teacher also under the truncated one."""
    truncated = None if top is None else tokens.replace(teacher=top[0])
    targets = {}
    for variant in variants:
        targets[variant.spec] = variant.target(tokens).at("unit")
        if truncated is not None and "teacher" in variant.needs:
            targets[f"{variant.spec}, top {top_k_teacher} of teacher"] = variant.target(truncated).at("unit")
    return targets


def _top_teacher(tokens: Tokens, k: int) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """The logits of a teacher that is known by its k most probable entries, and their mass; the rest as the student has it."""
    log_t, log_p = tokens.log_probs_of("teacher"), tokens.log_probs.detach()
    top = torch.zeros_like(log_t, dtype=torch.bool).scatter_(1, top_ids(log_t, k), True)
    mass = log_t.exp().masked_fill(~top, 0.0).sum(-1).clamp(max=1.0)
    rest = log_p.masked_fill(top, -torch.inf).log_softmax(-1) + torch.log1p(-mass)[:, None]
    return torch.where(top, log_t, rest.nan_to_num(nan=-torch.inf)), mass


def _of_method(tokens: Tokens, target: Target) -> pd.DataFrame:
    """Metrics of a target, a row per token."""
    metrics = {
        "q_y": target.q_y,
        "label_weight": target.label_weight,
        "label_gradient": target.pull,
        "q_other": target.room - target.pull,
        "reshape": target.reshape,
        "kl": target.kl,
        "entropy": target.entropy,
        "negative_mass": target.negative_mass,
        "total": target.total,
    }
    return pd.DataFrame({name: _array(values) for name, values in metrics.items()})


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
        "label_rank": _label_rank(tokens, log_p),
        "runner_up": runner_up,
        "p_runner_up": p_runner_up,
    }
    if tokens.teacher is None:
        return metrics | {"negative_margin": margin}
    log_t = tokens.log_probs_of("teacher")
    teacher_margin, _, _ = negative_margin(tokens, log_t)
    return metrics | {
        "teacher_y": tokens.gather(log_t).exp(),
        "teacher_rank": _label_rank(tokens, log_t),
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


def _label_rank(tokens: Tokens, log_p: Float[Tensor, "N V"]) -> Int[Tensor, " N"]:
    """The rank of the label: 1 is the most probable entry, also among equal ones."""
    return 1 + (log_p > tokens.gather(log_p)[:, None]).sum(-1)


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def summary_of(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    variants: Sequence[Variant],
    candidates: int,
    *,
    after: nn.Module | None = None,
    top_k_teacher: int | None = None,
    totals: VocabularyTotals | None = None,
    progress: bool = False,
    **models: nn.Module,
) -> Summary:
    """Summarise all supervised tokens of encoded texts, each of which has at least one.

    Methods of scope "token" see a chunk at a time, at most ``ENTRIES`` logits. If one has scope "sequence" or "batch", all see
    whole texts; a weight that is normalised over the batch is normalised within the text. Models with a linear head hold no
    other logits meanwhile.

    Args:
        model, examples, variants, models: the student, the texts, the methods, and teacher and reference by name.
        candidates, top_k_teacher, totals: as of ``summarise``.
        after: another checkpoint of the model.
        progress: show a bar on stderr where there are more than ``LONG`` logits.
    """
    needs = sorted({need for variant in variants for need in variant.needs})
    whole = any(variant.scope not in ALONE for variant in variants)
    entries = None if whole else ENTRIES
    chunks = token_batches(model, examples, 1, needs, entries, **models)
    later = repeat(None) if after is None else token_batches(after, examples, 1, needs, entries)
    texts = groupby(zip(chunks, later, strict=False), key=lambda pair: int(pair[0].require("sequence")[0]))
    options = {"top_k_teacher": top_k_teacher, "totals": totals}
    parts = []
    logits = vocabulary_size(model) * sum(len(example["labels"]) for example in examples)
    for number, text_chunks in track(texts, len(examples), "reading rows", progress and logits > LONG):
        for tokens, other in text_chunks:
            if other is not None:  # the models beside the two checkpoints are the same
                other = other.replace(**{name: getattr(tokens, name) for name in models})
            parts.append(summarise(tokens, variants, candidates, after=other, **options))
        if number % RELEASED == 0:
            release_memory()
    return Summary.join(parts)
