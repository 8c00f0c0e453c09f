"""One call per picture: variants at one token, along a text, and on the plane of label weight and reshape."""

from typing import Any

from matplotlib.figure import Figure

from qlens.analysis.plots.target_data import Decode, Variants, plane_frame, text_frame, token_frame
from qlens.analysis.plots.target_figures import figure_plane, figure_sequence, figure_token
from qlens.core.tokens import Tokens


def plot_token(variants: Variants, tokens: Tokens, i: int = 0, *, token_text: Decode = str, top: int = 8) -> Figure:
    """Targets of variants at one token, side by side: p, the update of the logits Q - p, and Q.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: N tokens; the whole batch, for variants that use other tokens.
        i: row of the token.
        token_text: a tokenizer, or a function from a token id to its text; by default the ids are shown.
        top: number of vocabulary entries shown; the others are summed.

    Returns:
        a matplotlib figure, which a notebook shows; ``figure.savefig("token.pdf")`` writes it. Its data:
        ``qlens.analysis.plots.token_frame``.

    Raises:
        InputError: ``i`` is out of range, or a variant needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> figure = qlens.plot_token(["sft", "dft", "gem"], qlens.probes(), 0)
        >>> len(figure.axes)
        3
    """
    return figure_token(token_frame(variants, tokens, i, token_text=token_text, top=top))


def plot_text(variants: Variants, tokens: Tokens, *, token_text: Decode = str, show: Any = None) -> Figure:
    """Targets of variants along a text as heat maps, a column per token and a row per variant.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: the N tokens of the text, in order.
        token_text: a tokenizer, or a function from a token id to its text; by default the ids are shown.
        show: names of metrics: "label_weight" (-g_y / (1 - p_y)), "entropy" (H(Q), nats), "kl" (KL(Q || p), nats),
            "negative_mass", "reshape"; by default the first four.

    Returns:
        a matplotlib figure. Its data: ``qlens.analysis.plots.text_frame``.

    Raises:
        InputError: an unknown metric, or a variant needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> figure = qlens.plot_text(["sft", "dft"], qlens.probes()[:12], show=["label_weight"])
    """
    data = text_frame(variants, tokens, token_text=token_text)
    return figure_sequence(data) if show is None else figure_sequence(data, show)


def plot_plane(variants: Variants, tokens: Tokens) -> Figure:
    """Variants by label weight, sum(-g_y) / sum(1 - p_y), and reshape, the mean change among the alternatives.

    Args:
        variants: specs, Variants or callables; or a dict of these by the names to print.
        tokens: N real tokens, for example of ``Tokens.from_text``.

    Returns:
        a matplotlib figure. Its data: ``qlens.analysis.plots.plane_frame``.

    Raises:
        InputError: a variant needs a field that the tokens lack.

    Example:
        >>> import qlens
        >>> figure = qlens.plot_plane(["sft", "dft", "kd"], qlens.probes())
    """
    return figure_plane(plane_frame(variants, tokens))
