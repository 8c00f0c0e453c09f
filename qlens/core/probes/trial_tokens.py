"""Trial tokens: random float64 tokens to test methods on, ordinary, wide, at extreme p_y and with extreme logits."""

import torch
from torch import Tensor

from qlens.core.tokens import MODELS, Tokens


def random_tokens(n: int, v: int, spread: float = 2.0, seed: int = 0) -> Tokens:
    """Tokens with random float64 logits of the given spread for the student and every other model, and every other field.

    Sequences have up to four tokens; every second one is the chosen sequence of a pair, where n > 1.
    """
    draw = torch.Generator().manual_seed(seed)

    def logits() -> Tensor:
        return spread * torch.randn(n, v, generator=draw, dtype=torch.float64)

    others = {name: logits() for name in MODELS}
    labels = torch.randint(v, (n,), generator=draw)
    sequence = torch.arange(n) // max(1, min(4, n // 2))  # two sequences at least, where there are two tokens
    if n > 1 and sequence[-1] % 2 == 0:  # the last would lack its partner
        sequence = sequence.clamp(max=int(sequence[-1]) - 1)
    given = {
        "sequence": sequence,
        "pair": sequence // 2,
        "chosen": sequence % 2 == 0,
        "critical": torch.rand(n, generator=draw) < 0.5,
        "hint": torch.rand(n, generator=draw) < 0.4,
        "advantage": torch.randn(n, generator=draw, dtype=torch.float64),
        "negatives": (torch.rand(n, v, generator=draw) < 0.2).scatter(1, labels[:, None], False),
    }
    return Tokens(logits=logits(), labels=labels, **given, **others)


def wide_tokens(v: int, n: int = 16, seed: int = 0) -> Tokens:
    """Tokens of every kind of row at a vocabulary: flat to peaked, labels of all ranks, p_y from 1e-6 to 1 - 1e-6.

    Entropies run from near 0 to near ln V. Every second token's other models are near the student, so that ratios of
    label probabilities fall on both sides of a clip.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = random_tokens(n, v, spread=1.0, seed=seed)
    rows = torch.arange(n)
    spread = torch.tensor([0.02, 0.7, 2.0, 6.0], dtype=torch.float64)[rows % 4, None]
    p_y = torch.tensor([1e-6, 1e-3, 0.05, 0.3, 0.7, 0.99, 1 - 1e-6], dtype=torch.float64)[rows % 7]
    logits, index = spread * tokens.logits, tokens.labels[:, None]
    rest = logits.scatter(1, index, -torch.inf).logsumexp(-1)
    odds = torch.logit(p_y) + 0.2 * torch.rand(n, generator=draw, dtype=torch.float64)  # no two alike
    moved = logits.scatter(1, index, (rest + odds)[:, None])
    logits = torch.where((rows % 3 > 0)[:, None], moved, logits)  # every third label keeps its rank among all entries
    near = {m: logits + 0.3 * torch.randn(n, v, generator=draw, dtype=torch.float64) for m in MODELS}
    near = {name: torch.where((rows % 2 == 0)[:, None], getattr(tokens, name), value) for name, value in near.items()}
    return tokens.replace(logits=logits, **near)


def trial_rows(tokens: Tokens, n: int = 16) -> Tokens:
    """Rows of ``wide_tokens`` with the fields, vocabulary, dtypes and device of other tokens."""
    trial, given = wide_tokens(tokens.logits.shape[1], n), tokens.fields()
    fields = trial.fields() | {"weight": torch.linspace(0.5, 1.5, len(trial), dtype=torch.float64)}
    fields = {name: value for name, value in fields.items() if name in given}
    floats = {name: value.to(given[name].dtype) for name, value in fields.items() if given[name].is_floating_point()}
    fields = {name: value.to(tokens.logits.device) for name, value in (fields | floats).items()}
    return Tokens.unchecked(**fields)


def edge_tokens(v: int) -> Tokens:
    """Tokens with p_y from 1e-12 to 1 - 1e-12."""
    tokens = random_tokens(6, v)
    p_y = torch.tensor([1e-12, 1e-9, 1e-3, 1 - 1e-3, 1 - 1e-9, 1 - 1e-12], dtype=torch.float64)
    index = tokens.labels[:, None]
    rest = tokens.logits.scatter(1, index, -torch.inf).logsumexp(-1)
    return tokens.replace(logits=tokens.logits.scatter(1, index, (rest + torch.logit(p_y))[:, None]))


def extreme_tokens(v: int) -> Tokens:
    """Tokens whose logits are 1e4 or -1e4, in every model."""
    tokens = random_tokens(32, v)
    return tokens.replace(**{name: 1e4 * getattr(tokens, name).sign() for name in ("logits", *MODELS)})
