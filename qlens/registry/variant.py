"""Method and Variant: a name with its target, its printed loss and its card; and the same at chosen parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.segments import Groups, Pairs
from qlens.core.target import Target
from qlens.core.tokens import Tokens, expectation, precision
from qlens.losses import calling
from qlens.losses.layout import layout_search, pairing, trial
from qlens.losses.layout.signature import Memo
from qlens.losses.reduction import unreduced
from qlens.losses.replay import Replay
from qlens.losses.user_code import blamed
from qlens.registry import params
from qlens.registry.declarations import OF_PARAMETERS, check_function, declared
from qlens.registry.structure import Structure, check_structure

if TYPE_CHECKING:
    from qlens.losses.notes.account import Account

TRIED = (32, 1000)  # vocabularies on which a function of tokens is tried for what it returns
_KINDS = Memo()  # whether a function of tokens returns a target, by function and parameters
ALONE = ("token", "parameters")  # scopes of methods whose gradient at a token needs no other token


@dataclass(eq=False, kw_only=True)
class Method:
    """A registered name: its target or loss as a function of tokens, and the fields of its card.

    ``trusted``, ``residual`` and ``scale`` say what the label is trusted by, where the rest goes and how hard the pull is;
    ``simplex`` is True, False, or None where nobody has declared it; ``invariant`` is False where the loss also sees raw
    logits, so that sum(Q) is not 1. ``scope`` is what a token's gradient depends on: "token", "sequence", "pair", "batch" or
    "parameters". ``modes`` names points of the parameters, above all those of released code
    (``get("eaft@axolotl")``); ``differences`` says where paper, code and the authors' table disagree, a sentence each.
    ``coupled`` is "sequence" or "pair" where the rows of such a group have one gradient between them, so that they must weigh
    alike. ``structure`` declares what the logit gradient is a function of: "label", where loss and gradient are functions of
    label probabilities (and per-token fields) alone, g = a (p - d); a ``GeometricMixture`` of label and one other model; or
    "dense", anything. The engine chooses its path by it, and ``check_variant`` proves it. ``scope``, ``needs``, ``simplex``,
    ``invariant``, ``coupled``, ``structure`` and ``denominator`` may be functions of the parameters.
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
    bibtex: str = ""
    where: str = ""
    printed: Callable | None = None
    on_model: Callable | None = None
    on_start: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def loss(self, fn: Callable) -> Callable:
        """Decorator: the loss as the paper prints it, ``fn(tokens, *, ...) -> (N,)``, written independently of the target."""
        check_function(f"@{self.name}.loss", fn)
        if params.defaults(fn) != params.defaults(self.fn):
            raise InputError(f"{self.name}: target and loss declare different parameters or defaults")
        self.printed = fn
        return fn

    def penalty(self, fn: Callable) -> Callable:
        """Decorator: a term on the model's parameters, ``fn(model, *, ...) -> scalar``."""
        check_function(f"@{self.name}.penalty", fn)
        self.on_model = fn
        return fn

    def start(self, fn: Callable) -> Callable:
        """Decorator: where a penalty is measured from, ``fn(model, saved, *, ...) -> {name: tensor}``, see ``Variant.start``."""
        check_function(f"@{self.name}.start", fn)
        self.on_start = fn
        return fn

    def variant(self, **given: Any) -> "Variant":
        """The method at a point of its parameters, checked."""
        return Variant(self, params.bind(self.name, self.fn, given))


@dataclass(frozen=True, eq=False)
class Variant:
    """A method at chosen parameters: its target and its loss, as functions of tokens.

    Example:
        >>> import torch, qlens
        >>> tokens = qlens.Tokens(logits=torch.zeros(1, 2), labels=torch.tensor([0]))
        >>> qlens.get("dft").target(tokens).q
        tensor([[0.7500, 0.2500]])
    """

    method: Method
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
        """What one token's gradient depends on: token (also where nothing is declared), sequence, batch, pair or parameters."""
        return self._declared("scope") or "token"

    needs = property(lambda self: self._declared("needs"), doc="Fields of Tokens it needs beside logits and labels.")

    @property
    def compares_pairs(self) -> bool:
        """Whether it compares the chosen text of a pair with the rejected one: as declared, or seen in how it takes batches."""
        return "pair" in self.needs or bool(self.derived and pairing.pairing(self.method.fn, self.params))

    @property
    def structure(self) -> Structure:
        """What its logit gradient is a function of: "label", a ``GeometricMixture`` or "dense"."""
        return check_structure(self.name, self._declared("structure"), self.needs)

    @property
    def built_in(self) -> bool:
        """Whether it is one of qlens' own methods, whose card the tests prove."""
        return calling.is_built_in(self.method.fn)

    denominator = property(
        lambda self: self._declared("denominator"),
        doc="What a mean divides by: 'valid' tokens, or only the 'selected' ones.",
    )
    simplex = property(
        lambda self: self._declared("simplex"),
        doc="Whether Q, at the method's own scale, is always a distribution; None where nobody has said.",
    )
    invariant = property(
        lambda self: self._declared("invariant"),
        doc="Whether adding a constant to the logits changes nothing, so that sum(Q) = 1.",
    )

    @cached_property
    def derived(self) -> bool:
        """Whether the target is read out of the loss by the lens, so that the identity holds by construction."""
        from qlens.core.probes import probes

        error: InputError | None = None
        for vocabulary in TRIED if self.may_return_target else TRIED[:1]:
            try:
                return self.is_loss_alone(probes(vocabulary=vocabulary)[:4])
            except InputError as raised:  # a loss may be written for more entries, or for one vocabulary
                error = raised
        assert error is not None
        raise error

    @property
    def may_return_target(self) -> bool:
        """Whether only a call shows if it returns a target or a loss."""
        return self.method.printed is None and calling.kind(self.method.fn) == "tokens"

    def replay(self, device: torch.device) -> Replay:
        """What it takes to call target and loss once more, with the same draws and from the same state, and to change nothing."""
        functions = () if self.built_in else (self.method.fn, self.method.printed)
        return Replay(device, *(fn for fn in functions if fn is not None))

    def is_loss_alone(self, tokens: Tokens) -> bool:
        """Whether it has no target of its own, seen once by what it returns on some tokens (a row at least)."""
        if not self.may_return_target:
            return self.method.printed is None
        return not _KINDS.get(self.method.fn, repr(sorted(self.params.items())), lambda: self._returns_target(tokens))

    def _returns_target(self, tokens: Tokens) -> bool:
        """Whether the function returns a ``Target``, seen on a copy of a few rows; draws and gradients are left alone."""
        few = trial.few(tokens)
        with torch.no_grad(), self.replay(tokens.logits.device).again(), blamed(self.spec):
            return isinstance(self.method.fn(self.shown(few).copied(), **self.params), Target)

    @cached_property
    def unreduced(self) -> unreduced.Unreduced:
        """The loss with its reduction undone."""
        name = self.spec if self.method.printed is None else f"the loss of {self.spec}"
        return unreduced.Unreduced(self.loss_fn, self.params, name)

    def weighs(self, tokens: Tokens) -> bool:
        """Whether the loss takes the tokens' weights itself, so that they are not multiplied in again."""
        if tokens.weight is None:
            return False
        if self.method.printed is not None or calling.kind(self.method.fn) == "tokens":
            return "weight" in self.needs and calling.kind(self.method.fn) == "tokens"
        wanted = calling.inputs(self.method.fn)
        if "weight" in wanted.required.values():
            return True
        return (
            "weight" in wanted.optional.values()
            and layout_search.style_of(self.method.fn, self.params, tokens).optional
        )

    def shown(self, tokens: Tokens) -> Tokens:
        """What the function is shown of weights: none, unless it needs and takes them itself; ones where none are given."""
        if tokens.weight is None and "weight" in self.needs:
            ones = torch.ones_like(tokens.logits[:, 0].detach(), dtype=precision(tokens.logits.dtype))
            return Tokens.unchecked(**tokens.fields(), weight=ones)
        return tokens if self.weighs(tokens) else tokens.unweighted()

    def target(self, tokens: Tokens) -> Target:
        """Q and s at every token, detached; ``tokens.weight`` multiplies the scale.

        Raises:
            InputError: a field that the method needs is missing.
        """
        self._check(tokens)
        if calling.kind(self.method.fn) == "tokens" and not (self.may_return_target and self.is_loss_alone(tokens)):
            with blamed(self.spec):
                made = self.method.fn(calling.protected(self.method.fn, self.shown(tokens)), **self.params)
            if isinstance(made, Target):
                weight = None if self.weighs(tokens) else tokens.weight
                return made if weight is None else made.weighted(weight.to(made.scale))
        from qlens.core.autograd import gradient

        return Target.from_grad(tokens, gradient(self.loss, tokens))

    def loss(self, tokens: Tokens) -> Float[Tensor, " N"]:
        """The printed loss of every token in nats, (N,), differentiable; s CE(sg Q, p) of a method that is its target alone.

        Raises:
            InputError: a field that the method needs is missing.
        """
        self._check(tokens)
        bare = self.shown(tokens).upcast()  # printed losses softmax for themselves, in the logits' own dtype
        weight = None if self.weighs(tokens) else tokens.weight
        rows = self.unreduced.rows(bare, weight)
        if not isinstance(rows, Target):
            return rows
        rows = -rows.scale * expectation(rows.q, bare.log_probs)
        return rows if weight is None else rows * weight

    def total(self, tokens: Tokens) -> Tensor:
        """The sum of ``loss``, a scalar; for a loss that reduces itself without the detour over rows."""
        alone = tokens.weight is None or self.weighs(tokens)
        if self.method.printed is None and alone and calling.kind(self.method.fn) != "tokens":
            self._check(tokens)
            return self.unreduced(tokens.upcast()).sum()
        return self.loss(tokens).sum()

    def account(self, tokens: Tokens) -> "Account":
        """How the loss is called on such tokens, and sentences about what else it does (another model run, say)."""
        from qlens.losses.notes.account import account

        return account(self.method.fn, self.params, tokens)

    def penalty(self, model: nn.Module) -> Tensor:
        """The term on the model's parameters, a scalar; zero for methods that have none."""
        if self.method.on_model is None:
            return torch.zeros((), device=next(model.parameters()).device)
        return self.method.on_model(model, **self.params)

    def start(self, model: nn.Module, saved: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Begin a run: ``penalty`` is measured from the model's present weights on, or from a ``saved`` start of such a run.

        Returns the start as named tensors, for a checkpoint; empty for a method whose penalty has no start.

        Raises:
            InputError: ``saved`` is not the start of such a model and method.
        """
        return {} if self.method.on_start is None else self.method.on_start(model, saved, **self.params)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """To other processes a built-in variant goes by its spec: its function hides behind the name of its Method."""
        from qlens.registry.registry import get, methods

        registered = methods().get(self.name) is self.method and self.built_in
        return (get, (self.spec,)) if registered else (Variant, (self.method, self.params))

    def _declared(self, name: str) -> Any:
        """A field of the card, at these parameters."""
        value = getattr(self.method, name)
        if not callable(value) or isinstance(value, type):
            return value
        return declared(self.name, name, value, self.params)

    def check_declared(self) -> None:
        """Whether the fields that are functions of the parameters hold what they may, and the structure goes with the needs.

        Raises:
            InputError: one does not.
        """
        for name in OF_PARAMETERS:
            self._declared(name)
        check_structure(self.name, self._declared("structure"), self.needs)

    def _check(self, tokens: Tokens) -> None:
        for name in self.needs:
            if getattr(tokens, name) is None and name != "weight":
                raise InputError(f"{self.name} needs a {name}: give Tokens({name}=...), on the command line --{name}")
        group = self._declared("coupled")
        if group and tokens.weight is not None:
            groups = Groups(tokens.require(group))
            if not torch.allclose(groups.mean(tokens.weight)[groups.index], tokens.weight):
                raise InputError(f"weight: {self.spec} has one loss per {group}, so that its tokens must weigh alike")
        if "pair" in self.needs and "chosen" in self.needs:
            Pairs.of(tokens)  # half a pair is refused here, for the loss as for the target

    def __repr__(self) -> str:
        return f"<Variant {self.spec}>"
