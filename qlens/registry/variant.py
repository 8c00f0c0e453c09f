"""Variant: a method at chosen parameters, with its target and its loss as functions of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.core.display import table_html
from qlens.core.errors import InputError
from qlens.core.numerics import expectation, precision
from qlens.core.segments import Groups, Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens
from qlens.losses import calling
from qlens.losses.layout import layout_search, pairing, trial
from qlens.losses.layout.signature import Memo
from qlens.losses.reduction import unreduced
from qlens.losses.replay import Replay
from qlens.losses.user_code import user_errors
from qlens.registry import params
from qlens.registry.declarations import OF_PARAMETERS, declared
from qlens.registry.structure import Structure, check_structure

if TYPE_CHECKING:
    from qlens.losses.notes.account import Account
    from qlens.registry.method import Method

TRIED = (32, 1000)  # vocabularies on which a function of tokens is called to see whether it returns a target
_KINDS = Memo()  # whether a function of tokens returns a target, by function and parameters
_MODELS = {"teacher": "a teacher", "reference": "a reference", "old": "an old policy", "second": "a second pass"}
ALONE = ("token", "parameters")  # scopes of methods whose gradient at a token needs no other token


@dataclass(frozen=True, eq=False)
class Variant:
    """A method at chosen parameters.

    Args:
        method: the registered method.
        params: the value of every parameter.

    Example:
        >>> import torch, qlens
        >>> tokens = qlens.Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))
        >>> qlens.get("dft").target(tokens).q
        tensor([[0.7500, 0.2500]])
    """

    method: "Method"
    params: dict[str, Any] = field(default_factory=dict)

    name = property(lambda self: self.method.name, doc="The registered name.")

    @property
    def spec(self) -> str:
        """The string that ``get`` turns into this variant again."""
        return params.show(self.name, self.params, params.defaults(self.method.fn))

    title = property(lambda self: self.method.title, doc="One line for people.")
    paper = property(lambda self: self.method.paper, doc="Where the method comes from.")
    family = property(lambda self: self.method.family, doc="The group it is listed under.")
    loss_fn = property(lambda self: self.method.printed or self.method.fn, doc="The function that is trained.")

    @property
    def scope(self) -> str:
        """What a token's gradient depends on: "token" (also if undeclared), "sequence", "pair", "batch" or "parameters"."""
        return self._declared("scope") or "token"

    @property
    def alone(self) -> bool:
        """Whether an explicit target is declared to be per-token, so that tokens can be read without the others of their text."""
        declared = self.built_in or bool(self.method.scope)
        return self.scope in ALONE and declared and not self.derived

    needs = property(lambda self: self._declared("needs"), doc="Fields of Tokens needed beside logits and labels.")

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss compares chosen with rejected texts, as declared or as its layout of batches shows."""
        return "pair" in self.needs or bool(self.derived and pairing.pairing(self.method.fn, self.params))

    @property
    def structure(self) -> Structure:
        """What the logit gradient is a function of: "label", a ``GeometricMixture`` or "dense"."""
        return check_structure(self.name, self._declared("structure"), self.needs)

    @property
    def built_in(self) -> bool:
        """Whether it is one of qlens' own methods, whose cards are tested."""
        return calling.is_built_in(self.method.fn)

    denominator = property(
        lambda self: self._declared("denominator"),
        doc="What a mean divides by: 'valid' tokens, or only the 'selected' ones.",
    )
    simplex = property(
        lambda self: self._declared("simplex"),
        doc="Whether Q, at the method's own scale, is always a distribution; None where it is not declared.",
    )
    invariant = property(
        lambda self: self._declared("invariant"),
        doc="Whether adding a constant to the logits changes nothing, so that sum(Q) = 1.",
    )

    @cached_property
    def derived(self) -> bool:
        """Whether there is no explicit target, so that it is derived from the gradient of the loss."""
        from qlens.core.probes import probes

        error: InputError | None = None
        for vocabulary in TRIED if self.may_return_target else TRIED[:1]:
            try:
                return self.is_loss_alone(probes(vocabulary=vocabulary)[:4])
            except InputError as raised:  # some losses run on one vocabulary only
                error = raised
        assert error is not None
        raise error

    @property
    def may_return_target(self) -> bool:
        """Whether only a call shows if the function returns a target or a loss."""
        return self.method.printed is None and calling.kind(self.method.fn) == "tokens"

    def replay(self, device: torch.device) -> Replay:
        """The random and mutable state of target and loss, so that they can be called again with the same draws."""
        functions = () if self.built_in else (self.method.fn, self.method.printed)
        return Replay(device, *(fn for fn in functions if fn is not None))

    def is_loss_alone(self, tokens: Tokens) -> bool:
        """Whether the function returns losses rather than a target, found by one call on at least one row."""
        if not self.may_return_target:
            return self.method.printed is None
        return not _KINDS.get(self.method.fn, repr(sorted(self.params.items())), lambda: self._returns_target(tokens))

    def _returns_target(self, tokens: Tokens) -> bool:
        """Whether the function returns a ``Target`` on a copy of a few rows; random state is restored."""
        sample = trial.sample(self.method.fn, tokens)
        with torch.no_grad(), self.replay(tokens.logits.device).again(), user_errors(self.spec):
            return isinstance(self.method.fn(self.shown(sample).copied(), **self.params), Target)

    @cached_property
    def unreduced(self) -> unreduced.Unreduced:
        """The loss without its reduction."""
        name = self.spec if self.method.printed is None else f"the loss of {self.spec}"
        return unreduced.Unreduced(self.loss_fn, self.params, name)

    def weighs(self, tokens: Tokens) -> bool:
        """Whether the loss applies ``tokens.weight`` itself, so that it must not be multiplied in again."""
        if tokens.weight is None:
            return False
        if self.method.printed is not None or calling.kind(self.method.fn) == "tokens":
            return "weight" in self.needs and calling.kind(self.method.fn) == "tokens"
        loss_inputs = calling.inputs(self.method.fn)
        if "weight" in loss_inputs.required.values():
            return True
        return (
            "weight" in loss_inputs.optional.values()
            and layout_search.style_of(self.method.fn, self.params, tokens).optional
        )

    def shown(self, tokens: Tokens) -> Tokens:
        """The tokens as the function gets them: without weights, unless it applies them itself; ones if there are none."""
        if tokens.weight is None and "weight" in self.needs:
            ones = torch.ones_like(tokens.logits[:, 0].detach(), dtype=precision(tokens.logits.dtype))
            return Tokens.unchecked(**tokens.fields(), weight=ones)
        return tokens if self.weighs(tokens) else tokens.unweighted()

    def target(self, tokens: Tokens) -> Target:
        """The target distribution of every token, detached.

        Args:
            tokens: N tokens with the fields that the method needs; ``tokens.weight`` multiplies the scale.

        Returns:
            Q (N, V) and the scale s (N,) in g = s (p - Q).

        Raises:
            InputError: a needed field is missing.
        """
        self._check(tokens)
        if calling.kind(self.method.fn) == "tokens" and not (self.may_return_target and self.is_loss_alone(tokens)):
            with user_errors(self.spec):
                target = self.method.fn(calling.protected(self.method.fn, self.shown(tokens)), **self.params)
            if isinstance(target, Target):
                weight = None if self.weighs(tokens) else tokens.weight
                return target if weight is None else target.weighted(weight.to(target.scale))
        from qlens.core.autograd import gradient

        return Target.from_grad(tokens, gradient(self.loss, tokens))

    def loss(self, tokens: Tokens) -> Float[Tensor, " N"]:
        """The unreduced loss of every token, as the paper prints it.

        Args:
            tokens: N tokens with the fields that the method needs; ``tokens.weight`` multiplies the loss.

        Returns:
            (N,) losses, in nats where the loss is a log-likelihood or divergence, differentiable in ``tokens.logits``.
            Of a method that is a target alone: s CE(Q, p), with Q and s detached.

        Raises:
            InputError: a needed field is missing.
        """
        self._check(tokens)
        unweighted = self.shown(tokens).upcast()  # printed losses take the softmax in the logits' own dtype
        weight = None if self.weighs(tokens) else tokens.weight
        rows = self.unreduced.rows(unweighted, weight)
        if not isinstance(rows, Target):
            return rows
        rows = -rows.scale * expectation(rows.q, unweighted.log_probs)
        return rows if weight is None else rows * weight

    def total(self, tokens: Tokens) -> Tensor:
        """The sum of ``loss``, a scalar; a loss that reduces itself is not taken apart into rows first."""
        no_weights_left = tokens.weight is None or self.weighs(tokens)
        if self.method.printed is None and no_weights_left and calling.kind(self.method.fn) != "tokens":
            self._check(tokens)
            return self.unreduced(tokens.upcast()).sum()
        return self.loss(tokens).sum()

    def account(self, tokens: Tokens) -> "Account":
        """How the loss is called on these tokens, with notes on its side effects."""
        from qlens.losses.notes.account import account

        return account(self.method.fn, self.params, tokens)

    def penalty(self, model: nn.Module) -> Tensor:
        """The method's term on a model's parameters, a scalar; zero for methods that have none."""
        if self.method.on_model is None:
            return torch.zeros((), device=next(model.parameters()).device)
        return self.method.on_model(model, **self.params)

    def start(self, model: nn.Module, saved: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Set the point that ``penalty`` is measured from, at the beginning of a run.

        Args:
            model: the model to train, whose weights now are the start.
            saved: the start of an earlier run, from its checkpoint, in place of these weights.

        Returns:
            The start as named tensors, for a checkpoint; empty for a method whose penalty has no start.

        Raises:
            InputError: ``saved`` belongs to another model or method.
        """
        return {} if self.method.on_start is None else self.method.on_start(model, saved, **self.params)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle built-in variants by spec: the name of a decorated function leads to its Method."""
        from qlens.registry.registry import get, methods

        registered = methods().get(self.name) is self.method and self.built_in
        return (get, (self.spec,)) if registered else (Variant, (self.method, self.params))

    def _declared(self, name: str) -> Any:
        """A field of the card at these parameters."""
        value = getattr(self.method, name)
        if not callable(value) or isinstance(value, type):
            return value
        return declared(self.name, name, value, self.params)

    def check_declared(self) -> None:
        """Check the card's fields that are functions of the parameters, and the structure against the needs.

        Raises:
            InputError: a field has a value of the wrong kind.
        """
        for name in OF_PARAMETERS:
            self._declared(name)
        check_structure(self.name, self._declared("structure"), self.needs)

    def _check(self, tokens: Tokens) -> None:
        for name in self.needs:
            if getattr(tokens, name) is None and name != "weight":
                option = f", on the command line --{name}" if name in ("teacher", "reference") else ""
                raise InputError(f"{self.name} needs {_MODELS.get(name, name)}: give Tokens({name}=...){option}")
        group = self._declared("coupled")
        if group and tokens.weight is not None:
            groups = Groups(tokens.require(group))
            if not torch.allclose(groups.mean(tokens.weight)[groups.index], tokens.weight):
                raise InputError(f"weight: {self.spec} has one loss per {group}: give all its tokens the same weight")
        if "pair" in self.needs and "chosen" in self.needs:
            Pairs.of(tokens)  # refuses a pair without its chosen or its rejected text

    def __repr__(self) -> str:
        return f"<Variant {self.spec}>"

    def _repr_html_(self) -> str:
        return table_html(f"{self.spec}: {self.title}" if self.title else self.spec, self.method.card_fields())
