"""Vocabulary table: which entries a method promotes and demotes, summed over the tokens of a text."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor


class VocabularyTotals:
    r"""Sums over tokens of p and Q - p for every entry of the vocabulary, in float64.

    .. math::
        \mathrm{labels}_k = \sum_n [y_n = k], \quad \mathrm{p}_k = \sum_n p_{nk}, \quad
        \mathrm{move}_k = \sum_n (Q_{nk} - p_{nk})

    The move is also kept over the tokens with label k alone; the rest is what a method does to k where it is no label.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.labels = self.p = np.zeros(0)
        self.moves: dict[str, np.ndarray] = {}
        self.label_moves: dict[str, np.ndarray] = {}

    def add(
        self, labels: Int[Tensor, " N"], p: Float[Tensor, "N V"], moves: Mapping[str, Float[Tensor, "N V"]]
    ) -> None:
        """Add the tokens of a chunk.

        Args:
            labels: ids, (N,).
            p: the student's probabilities, (N, V).
            moves: Q - p in unit scale by method, (N, V).
        """
        size = p.shape[1]
        if not self.tokens:
            self.labels, self.p = np.zeros(size), np.zeros(size)
            self.moves = {name: np.zeros(size) for name in moves}
            self.label_moves = {name: np.zeros(size) for name in moves}
        self.tokens += len(labels)
        ids = labels.cpu().numpy()
        self.labels += np.bincount(ids, minlength=size)
        self.p += p.sum(0, dtype=torch.float64).cpu().numpy()
        for name, move in moves.items():
            self.moves[name] += move.sum(0, dtype=torch.float64).cpu().numpy()
            own = move.gather(1, labels[:, None])[:, 0].double().cpu().numpy()
            self.label_moves[name] += np.bincount(ids, own, minlength=size)

    def frame(self) -> pd.DataFrame:
        """A line per method and entry: method, id, labels, p, q, move, move_label, move_other; of the methods' order.

        ``labels`` counts the tokens with that label, ``p`` and ``q`` are the student's and the target's expected counts,
        ``move = q - p``, ``move_label`` over the tokens with that label, ``move_other`` over the others.
        """
        ids = np.arange(len(self.p))
        frames = []
        for name, move in self.moves.items():
            own = self.label_moves[name]
            columns = {"method": name, "id": ids, "labels": self.labels.astype(int), "p": self.p, "q": self.p + move}
            frames.append(pd.DataFrame({**columns, "move": move, "move_label": own, "move_other": move - own}))
        return pd.concat(frames, ignore_index=True)


def first_and_last(frame: pd.DataFrame, top: int) -> pd.DataFrame:
    """The ``top`` most promoted and the ``top`` most demoted entries of every method, as far as they are moved at all.

    Args:
        frame: as of ``TokenView.vocabulary``: by method, most promoted first.
    """
    groups = frame.groupby("method", sort=False)
    promoted = frame[frame["move"] > 0].groupby("method", sort=False).head(top)
    demoted = frame[frame["move"] < 0].groupby("method", sort=False).tail(top)
    selected = pd.concat([promoted, demoted])
    order = {name: number for number, name in enumerate(groups.groups)}
    return selected.sort_values("method", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def vocabulary_text(frame: pd.DataFrame, top: int) -> str:
    """The most promoted and the most demoted entries of every method, as text."""
    blocks = []
    for method, entries in first_and_last(frame, top).groupby("method", sort=False):
        for title, chosen in (
            ("promotes most", entries[entries["move"] > 0]),
            ("demotes most", entries[entries["move"] < 0].iloc[::-1]),
        ):
            table = chosen.drop(columns=["method", "id"]).assign(token=chosen["token"].map(repr))
            blocks.append(f"{method} {title}:\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    legend = (
        "labels: tokens with that label; p, q: expected counts under student and target; move = q - p, over the tokens "
    )
    return "\n\n".join([*blocks, f"{legend}with that label (move_label) and the others (move_other)."])
