"""Method: a registered name with its target, its printed loss and its card."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlens.core.display import table_html
from qlens.core.errors import InputError
from qlens.registry import params
from qlens.registry.citations import citation
from qlens.registry.declarations import check_function
from qlens.registry.structure import Structure
from qlens.registry.variant import Variant


@dataclass(eq=False, kw_only=True, repr=False)
class Method:
    """A registered name: its target or loss as a function of tokens, and the fields of its card.

    ``scope``, ``needs``, ``simplex``, ``invariant``, ``coupled``, ``structure`` and ``denominator`` may be functions of the
    parameters.

    Args:
        name: the registered name.
        fn: the decorated function, a target or a loss.
        title: one line for people.
        paper: authors, year and arXiv id.
        family: the group it is listed under.
        scope: what a token's gradient depends on: "token", "sequence", "pair", "batch" or "parameters".
        needs: fields of Tokens it needs beside logits and labels.
        trusted: formula of the label's coefficient in Q = trust d + (1 - trust) residual, at the default parameters; what
            follows a semicolon describes other parameters.
        residual: name or formula of the residual, in the same way; "Q = ..." where Q is no such mixture.
        scale: formula of s in g = s (p - Q), in the same way.
        simplex: whether Q is always a distribution; None where nobody has declared it.
        invariant: False where the loss also sees raw logits, so that sum(Q) is not 1.
        coupled: "sequence" or "pair" where the rows of such a group share one gradient, so that they must weigh alike.
        structure: what the logit gradient is a function of: "label" (g = a (p - d) with a a function of label probabilities
            and per-token fields), a ``GeometricMixture`` of label and one other model, or "dense" (anything). The engine
            chooses its path by it, and ``check_variant`` proves it.
        denominator: what a mean divides by: "valid" tokens or only the "selected" ones.
        limits: what it becomes at special parameters or probabilities.
        modes: named points of the parameters (presets), above all those of released code (``get("eaft@axolotl")``).
        differences: where paper, released code and the authors' table disagree, a sentence each.
        code: the released code.
        cites: keys of ``variants/references.bib``, or BibTeX entries written out.
        where: file and line of the function.
        printed, on_model, on_start: set by the decorators ``loss``, ``penalty`` and ``start``.
    """

    name: str
    fn: Callable
    title: str = ""
    paper: str = ""
    family: str = "user"
    scope: str | Callable[..., str] = ""
    needs: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
    trusted: str = ""
    residual: str = ""
    scale: str = "1"
    simplex: bool | None | Callable[..., bool] = None
    invariant: bool | Callable[..., bool] = True
    coupled: str | Callable[..., str] = ""
    structure: Structure | Callable[..., Structure] = "dense"
    denominator: str | Callable[..., str] = "valid"
    limits: str = ""
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    code: str = ""
    cites: tuple[str, ...] = ()
    where: str = ""
    printed: Callable | None = None
    on_model: Callable | None = None
    on_start: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    @property
    def bibtex(self) -> str:
        """The BibTeX entries of its sources; empty where the card cites none."""
        return "\n\n".join(citation(key) for key in self.cites)

    def loss(self, fn: Callable) -> Callable:
        """Decorator for the loss as the paper prints it, written independently of the target.

        Args:
            fn: ``fn(tokens, *, ...) -> (N,)`` with the method's parameters by name. They take the method's defaults: write
                ``def my_loss(tokens, *, alpha)``.

        Raises:
            InputError: no function, other parameters, or other defaults.

        Example:
            >>> import qlens
            >>> @qlens.register
            ... def scaled_example(tokens, *, factor=2.0):
            ...     return qlens.Target.mix(tokens, trust=1.0, residual="student", scale=factor)
            >>> @scaled_example.loss
            ... def scaled_example_loss(tokens, *, factor):
            ...     return -factor * tokens.label_log_probs
        """
        check_function(f"@{self.name}.loss", fn)
        self._fill_defaults(fn)
        own, other = params.defaults(self.fn), params.defaults(fn)
        if other != own:
            names = ", ".join(own)
            raise InputError(
                f"{self.name}: target and loss declare different parameters or defaults: the target has "
                f"{own or 'none'}, the loss {other or 'none'}; write "
                f"def {self.name}_loss(tokens{f', *, {names}' if names else ''})"
            )
        self.printed = fn
        return fn

    def penalty(self, fn: Callable) -> Callable:
        """Decorator for a term on the model's parameters, ``fn(model, *, ...) -> scalar``."""
        check_function(f"@{self.name}.penalty", fn)
        self._fill_defaults(fn)
        self.on_model = fn
        return fn

    def start(self, fn: Callable) -> Callable:
        """Decorator for the point a penalty is measured from, ``fn(model, saved, *, ...) -> {name: tensor}``.

        See ``Variant.start``.
        """
        check_function(f"@{self.name}.start", fn)
        self._fill_defaults(fn)
        self.on_start = fn
        return fn

    def variant(self, **parameters: Any) -> Variant:
        """The method at checked values of its parameters."""
        return Variant(self, params.bind(self.name, self.fn, parameters))

    def _fill_defaults(self, fn: Callable) -> None:
        """Give a function's keyword-only parameters without a default those of the method, in place."""
        if not inspect.isfunction(fn):
            return
        own = params.defaults(self.fn)
        filled = {
            name: own[name]
            for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and name in own
        }
        if filled:
            fn.__kwdefaults__ = {**(fn.__kwdefaults__ or {}), **filled}

    def __repr__(self) -> str:
        return f"<Method {self.name}: {self.title}>" if self.title else f"<Method {self.name}>"

    def _repr_html_(self) -> str:
        return table_html(f"{self.name}: {self.title}" if self.title else self.name, self.card_fields())

    def card_fields(self) -> dict[str, str]:
        """The formulas of the card that are filled in, and the source, for a short table."""
        fields = {"trust": self.trusted, "residual": self.residual, "scale": self.scale, "source": self.paper}
        return {name: value for name, value in fields.items() if value}
