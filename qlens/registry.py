"""The registry: a name, what it trains toward, the loss its paper prints, and its card."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens import adapters, params, userfiles
from qlens.errors import InputError, UnknownName
from qlens.target import Target
from qlens.tokens import Tokens, expectation

_METHODS: dict[str, "Method"] = {}


@dataclass(eq=False, kw_only=True)
class Method:
    """A registered name: its target or loss as a function of tokens, and the fields of its card.

    ``trusted``, ``residual`` and ``scale`` say what the label is trusted by, where the rest goes and how hard the pull is;
    ``simplex`` is True, False, a function of the parameters, or None where nobody has declared it.
    """

    name: str
    fn: Callable
    title: str = ""
    paper: str = ""
    family: str = "user"
    scope: str = "token"
    needs: tuple[str, ...] = ()
    trusted: str = ""
    residual: str = ""
    scale: str = "1"
    simplex: bool | None | Callable[..., bool] = None
    denominator: str = "valid"
    limits: str = ""
    bibtex: str = ""
    where: str = ""
    printed: Callable | None = None
    on_model: Callable | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def loss(self, fn: Callable) -> Callable:
        """Decorator: the loss as the paper prints it, ``fn(tokens, *, ...) -> (N,)``, written independently of the target."""
        if params.defaults(fn) != params.defaults(self.fn):
            raise InputError(f"{self.name}: target and loss declare different parameters or defaults")
        self.printed = fn
        return fn

    def penalty(self, fn: Callable) -> Callable:
        """Decorator: a term on the model's parameters, ``fn(model, *, ...) -> scalar``."""
        self.on_model = fn
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

    @property
    def name(self) -> str:
        """The registered name."""
        return self.method.name

    @property
    def spec(self) -> str:
        """The string that ``get`` turns into this variant again."""
        return params.show(self.name, self.params, params.defaults(self.method.fn))

    @property
    def title(self) -> str:
        """One line for people."""
        return self.method.title

    @property
    def paper(self) -> str:
        """Where the method comes from."""
        return self.method.paper

    @property
    def family(self) -> str:
        """The group it is listed under."""
        return self.method.family

    @property
    def scope(self) -> str:
        """What one token's gradient depends on: token, sequence, batch, pair or parameters."""
        return self.method.scope

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of Tokens it cannot do without, beside logits and labels."""
        return self.method.needs

    @property
    def denominator(self) -> str:
        """What a mean divides by: 'valid' tokens, or only the 'selected' ones."""
        return self.method.denominator

    @property
    def simplex(self) -> bool | None:
        """Whether Q, at the method's own scale, is always a distribution; None where nobody has said."""
        declared = self.method.simplex
        return declared(**self.params) if callable(declared) else declared

    @cached_property
    def derived(self) -> bool:
        """Whether the target is read out of the loss by the lens, so that the identity holds by construction."""
        if self.method.printed is not None:
            return False
        if adapters.kind(self.method.fn) != "tokens":
            return True
        from qlens.probes import probes

        return not isinstance(self.method.fn(probes()[:4], **self.params), Target)

    @cached_property
    def _rows(self) -> Callable[[Tokens], Tensor]:
        return adapters.rows(self.method.fn, self.params, self.spec)

    def target(self, tokens: Tokens) -> Target:
        """Q and s at every token, detached; ``tokens.weight`` multiplies the scale.

        Raises:
            InputError: a field that the method needs is missing.
        """
        self._check(tokens)
        if adapters.kind(self.method.fn) == "tokens":
            made = self.method.fn(tokens.unweighted(), **self.params)
            if isinstance(made, Target):
                return made if tokens.weight is None else made.weighted(tokens.weight.to(made.scale))
        from qlens.lens import gradient

        return Target.from_grad(tokens, gradient(self.loss, tokens))

    def loss(self, tokens: Tokens) -> Float[Tensor, " N"]:
        """The printed loss of every token in nats, (N,), differentiable in ``tokens.logits``.

        A method registered by its target alone has the loss s CE(sg Q, p), whose gradient is s (p - Q).

        Raises:
            InputError: a field that the method needs is missing.
        """
        self._check(tokens)
        bare = tokens.unweighted().upcast()  # printed losses softmax for themselves, in the logits' own dtype
        if self.method.printed is not None:
            rows = self.method.printed(bare, **self.params)
        else:
            rows = self._rows(bare)
            if isinstance(rows, Target):
                rows = -rows.scale * expectation(rows.q, bare.log_probs)
        return rows if tokens.weight is None else rows * tokens.weight

    def penalty(self, model: nn.Module) -> Tensor:
        """The term on the model's parameters, a scalar; zero for methods that have none."""
        if self.method.on_model is None:
            return torch.zeros((), device=next(model.parameters()).device)
        return self.method.on_model(model, **self.params)

    def _check(self, tokens: Tokens) -> None:
        for name in self.needs:
            if getattr(tokens, name) is None:
                raise InputError(f"{self.name} needs a {name}: give Tokens({name}=...), on the command line --{name}")

    def __repr__(self) -> str:
        return f"<Variant {self.spec}>"


def register(name: str, **card: Any) -> Callable[[Callable], Method]:
    """Decorator: register a target ``f(tokens) -> Target``, a loss ``f(tokens) -> (N,)`` or a loss ``f(logits, labels)``.

    Keyword-only arguments of the function are the method's parameters. ``card`` takes the fields of
    :class:`Method`: title, paper, family, scope, needs, simplex, ...

    Raises:
        InputError: the name is taken (both places are named), not an identifier, or a field of the card is unknown.

    Example:
        >>> import qlens
        >>> @qlens.register("half_nll_example")
        ... def half_nll_example(logits, labels, *, factor=0.5):
        ...     import torch.nn.functional as F
        ...     return factor * F.cross_entropy(logits, labels)
        >>> qlens.get("half_nll_example").derived
        True
    """
    if not name.isidentifier():
        raise InputError(f"a method's name must be an identifier like 'my_loss', got {name!r}")

    def add(fn: Callable) -> Method:
        method = _method(name, fn, **card)
        if name in _METHODS and not _redefined(_METHODS[name].fn, fn):
            raise InputError(f"method {name!r} is registered twice: {_METHODS[name].where} and {method.where}")
        _METHODS[name] = method
        return method

    return add


def names() -> tuple[str, ...]:
    """All registered names, sorted.

    Example:
        >>> import qlens
        >>> "target_sft" in qlens.names()
        True
    """
    return tuple(sorted(_METHODS))


def get(spec: str, **given: Any) -> Variant:
    """A variant by name, by spec string, or by FILE.py:FUNCTION, with parameters.

    Raises:
        UnknownName: no such method (near names are suggested), file or function.
        ParameterError: a parameter is unknown, of the wrong type or out of range.

    Example:
        >>> import qlens
        >>> qlens.get("label_smoothing(epsilon=0.2)").params
        {'epsilon': 0.2}
    """
    if not isinstance(spec, str):
        raise InputError(f"a spec is a string like 'dft' or 'kd(temperature=2.0)', got {type(spec).__name__}")
    name, parsed = params.parse(spec)
    given = {**parsed, **given}
    if ".py:" in name:
        return _from_file(name).variant(**given)
    if name.endswith(".py"):
        raise InputError(f"{spec} is a file: name the function in it, {name}:FUNCTION")
    if name not in _METHODS:
        raise UnknownName.among("method", name, names())
    return _METHODS[name].variant(**given)


def resolve(thing: "Variant | str | Callable") -> Variant:
    """A Variant from a Variant, a spec, a registered method or a callable; anything else raises InputError."""
    if isinstance(thing, Variant):
        return thing
    if isinstance(thing, str):
        return get(thing)
    if isinstance(thing, Method):
        return thing.variant()
    if callable(thing):
        return _method(getattr(thing, "__name__", type(thing).__name__), thing).variant()
    raise InputError(f"a loss is a Variant, a spec string or a callable, got {type(thing).__name__}")


def _method(name: str, fn: Callable, **card: Any) -> Method:
    unknown = sorted(set(card) - set(Method.__dataclass_fields__))
    if unknown:
        raise InputError(f"register({name!r}): unknown field {unknown[0]!r} of the card")
    asked = adapters.extra_inputs(fn)
    if strange := [need for need in card.get("needs", ()) if need not in Tokens.__dataclass_fields__]:
        raise UnknownName.among("field of Tokens in needs", strange[0], Tokens.__dataclass_fields__)
    code = getattr(inspect.unwrap(fn), "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)
    card.setdefault("title", (inspect.getdoc(fn) or "").partition("\n")[0])
    card["needs"] = tuple(card.get("needs", ())) + tuple(n for n in asked if n not in card.get("needs", ()))
    return Method(name=name, fn=fn, where=where, **card)


def _redefined(old: Callable, new: Callable) -> bool:
    """Whether a notebook cell or a user's file was run again: the same function, defined anew."""
    place = [(getattr(fn, "__module__", ""), getattr(fn, "__qualname__", "")) for fn in (old, new)]
    return place[0] == place[1] and place[0][0].startswith(("__main__", "qlens_user_"))


def _from_file(name: str) -> Method:
    """The method that FILE.py:FUNCTION names: registered there, or a plain loss."""
    found = userfiles.function(name)
    return found if isinstance(found, Method) else _method(name, found)


def methods() -> Mapping[str, Method]:
    """The registered methods by name, sorted."""
    return {name: _METHODS[name] for name in names()}
