"""Descriptions of a style: how a loss was called, in a sentence."""

from typing import Any

from qlens.losses.layout.layouts import Style

CONTAINERS = {
    ("one-hot", ""): ", the labels as one-hot distributions over the vocabulary",
    ("pair", ""): ", the labels in a tuple (labels, mask of the supervised ones)",
    ("pair", "model"): " as a tuple (input ids, labels)",
    ("dict", ""): ", the labels in a dict of labels, input_ids, attention_mask and the columns it reads",
    ("outputs", ""): ", the logits in a tuple (logits, 0)",
}
"""Descriptions of containers, by container and kind of loss."""

PAIRS = {
    "halves": "a batch of pairs: the chosen texts are its first half, the rejected ones its second, in the same order",
    "alternate": "a batch of pairs: each chosen text is followed by its rejected one",
    "rejected halves": "a batch of pairs: the rejected texts, which it lowers, are its first half, the chosen ones its second",
    "rejected alternate": "a batch of pairs: each rejected text, which it lowers, is followed by its chosen one",
}
"""Descriptions of the order of the texts in a batch of pairs."""


def described(style: Style, kind: str, arguments: dict[str, Any]) -> str:
    """The description of a call.

    Args:
        style: how the loss was called.
        kind: the form of the student's input, as of ``student_input``.
        arguments: descriptions of the other arguments, by name.
    """
    shapes = {
        "rows": "logits (N, V) and labels (N,), each row with its own label",
        "batch": "logits (B, T, V) and labels (B, T) with -100, unshifted: it has to shift them itself",
        "aligned": "logits (B, T, V) and labels (B, T) that are shifted already",
    }
    first = {
        "tokens": "tokens, N supervised rows",
        "hidden": "hidden states, a head that is the identity, and labels, as rows",
        "model": "a model whose logits (B, T, V) are a free table, and inputs with unshifted labels (B, T)",
    }.get(kind, shapes[style.shape])
    if kind == "dict":
        first = f"a dict of {shapes[style.shape]}"
    elif kind == "sums":
        first = "log-probabilities summed over the chosen and the rejected sequence of each pair, (P,)"
    elif kind == "log probs":
        first = f"log-probabilities of the labels, {'(B, T)' if style.laid_out else '(N,)'}"
        if style.pairs and not style.laid_out:
            first = "log-probabilities summed over each text, (2P,)"
    first = first.replace("logits", "outputs.logits", 1) if style.boxed else first
    if style.order == "classes":
        first = first.replace("(B, T, V)", "(B, V, T)")
    elif style.order != "texts":
        first = first.replace("(B, T, V)", "(T, B, V), sequence first,")
        first = first.replace("(B, T)", "(T, B)") if style.order == "positions" else first
    if style.chunks:
        cut = first.replace(
            ", V)", f", V), in a list of {style.chunks} chunks along the tokens (torch.{style.cut}),", 1
        )
        first = (
            cut.replace("(B, T, V)", "(B, T / n, V)")
            .replace("(N, V)", "(N / n, V)")
            .replace(" n,", f" {style.chunks},")
        )
    first = first.replace(" with -100", "") if style.clean else first
    first += CONTAINERS.get((style.container, kind), CONTAINERS.get((style.container, ""), ""))
    if style.pairs:
        first += f", {PAIRS[style.pairs]}"
    if style.ids:
        first += ", which it takes from input_ids"
    more = "; ".join(f"{name}: {what}" for name, what in arguments.items())
    return first + (f"; {more}" if more else "")
