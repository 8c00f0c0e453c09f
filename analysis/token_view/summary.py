"""What the token view and the ranking keep of each token: a few figures and the top candidates, never a row of V entries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qlens.core.numerics import expectation
from qlens.core.tokens import Tokens
from qlens.data.from_text import ENTRIES, token_batches
from qlens.registry import Variant
from qlens.registry.variant import ALONE


@dataclass(frozen=True, eq=False)
class Summary:
    """Figures and candidates of N tokens under M methods, on the CPU in float32; M methods share K candidates per token.

    Args:
        models: a row per token: label, p_y, nll, entropy, room = 1 - p_y, doubt, rival and p_rival; with a teacher also
            teacher_y, teacher_doubt and disagreement; suspicion.
        methods: of every method a row per token, in unit scale: q_y, trust, pull, ignored, reshape, kl, entropy,
            negative_mass, total.
        ids, probs: the candidates and the student's p of them, (N, K), by falling p.
        moves: Q - p of the candidates in unit scale, (M, N, K).
        teacher: the teacher's probabilities of them, (N, K), or None.
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
    r"""The summary of a chunk of tokens: a pure function of the chunk.

    .. math::
        \mathrm{doubt} = \max_{k \ne y} \log p_k - \log p_y, \qquad
        \mathrm{suspicion} = \min(\mathrm{doubt}, \mathrm{teacher\ doubt}), \qquad
        \mathrm{ignored} = (1 - p_y) - (-g_y) = 1 - Q_y, \qquad
        \mathrm{disagreement} = \tfrac12 \sum_k |\mathrm{teacher}_k - p_k|

    Suspicion is doubt where there is no teacher. The candidates are the label, of each method the entry with the largest
    |Q - p|, then those with the largest max(p, |Q|) over all methods: K = max(candidates, M + 1), at most V, per token.

    Args:
        tokens: (n, V), with whatever the methods need; of methods that look at whole sequences, whole sequences.
        variants: M methods with different specs.
        candidates: how many entries are kept per token.

    Raises:
        InputError: a method needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> tokens = Tokens(logits=torch.tensor([[0.0, 1.0, 2.0]]), labels=torch.tensor([1]))
        >>> made = summarise(tokens, [qlens.get("dft")], candidates=2)
        >>> made.ids.tolist(), made.models["doubt"].round(3).tolist()
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
                    "q_y": _array(tokens.gather(target.q)),
                    "trust": _array(target.label_weight),
                    "pull": _array(target.pull),
                    "ignored": _array(target.room - target.pull),
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
    """What the models themselves say of every label."""
    log_p = tokens.log_probs.detach()
    doubt, rival = _doubt(tokens, log_p)
    found = {
        "label": tokens.labels,
        "p_y": tokens.label_probs.detach(),
        "nll": -tokens.label_log_probs.detach(),
        "entropy": -expectation(log_p.exp(), log_p),
        "room": tokens.rest_log_probs.detach().exp(),
        "doubt": doubt,
        "rival": rival,
        "p_rival": log_p.exp().gather(1, rival[:, None])[:, 0],
    }
    if tokens.teacher is None:
        return found | {"suspicion": doubt}
    log_t = tokens.log_probs_of("teacher")
    teacher_doubt, _ = _doubt(tokens, log_t)
    return found | {
        "teacher_y": tokens.gather(log_t).exp(),
        "teacher_doubt": teacher_doubt,
        "disagreement": (log_t.exp() - log_p.exp()).abs().sum(-1) / 2,
        "suspicion": torch.minimum(doubt, teacher_doubt),
    }


def _doubt(tokens: Tokens, log_p: Float[Tensor, "N V"]) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """By how many nats the strongest alternative beats the label, and which it is."""
    top = log_p.scatter(1, tokens.labels[:, None].long(), -torch.inf).max(-1)
    return top.values - tokens.gather(log_p), top.indices


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return values.float().numpy() if values.is_floating_point() else values.numpy()


def chunks(
    model: nn.Module, examples: Sequence[Mapping[str, Any]], needs: Sequence[str], whole: bool, **others: nn.Module
) -> Iterator[Tokens]:
    """The tokens of texts in order, ``ENTRIES`` logits at a time, a text never sharing a chunk: the one place that asks models.

    Of models with a linear head no other logits exist at that time, however long the text.

    ``whole``: the tokens of a text stay together, however long it is.
    """
    yield from token_batches(model, examples, 1, needs, None if whole else ENTRIES, **others)


def summary_of(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    variants: Sequence[Variant],
    candidates: int,
    **others: nn.Module,
) -> Summary:
    """The summary of all supervised tokens of encoded texts, of which each has one at least.

    Methods that look at single tokens see a chunk at a time; if one of the methods looks further (its scope is sequence or
    batch), all are given the text whole. The text is the batch: such a weight is normalised within its own text.
    """
    needs = sorted({need for variant in variants for need in variant.needs})
    whole = any(variant.scope not in ALONE for variant in variants)
    return Summary.join(
        [summarise(tokens, variants, candidates) for tokens in chunks(model, examples, needs, whole, **others)]
    )
