"""Bodies: a causal language model as hidden states and a linear head, so that its logits need never be whole."""

import logging
import math
import threading
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qlens.core.errors import InputError
from qlens.core.numerics import precision
from qlens.engine.forward import evaluating, model_logits
from qlens.engine.heads import Head, capped_
from qlens.engine.packing import uncached
from qlens.losses.leaves import leaves

logger = logging.getLogger(__name__)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
TRIED = 8  # tokens on which a head is proved
PROBES = (32.0, -256.0, 2048.0, -0.5, 4.0, -32.0, 256.0, -2048.0)  # outputs of a head; soft-caps in use are 15 to 50
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()  # pyright: ignore
_LOCKING = threading.Lock()


def _lock_of(head: nn.Module) -> Any:
    """What lets one thread at a time have a head pass its input on."""
    with _LOCKING:
        return _LOCKS.setdefault(head, threading.RLock())


class NoBody(InputError):
    """Why a model's logits are not a linear head's of its hidden states."""


class DamagedModel(InputError):
    """A model whose logits are NaN at every token."""


class Body:
    """A causal language model whose logits are those of a linear ``Head``, proved on a few tokens and again in every pass.

    Soft-cap and logit scale are looked up in the model's configuration under the names in use (``SOFTCAPS``, Cohere's
    ``logit_scale``, Granite's ``logits_scaling``), never believed: the model's own logits
    must be those of the head, at the few tokens and for outputs of the head up to 2048. In every later pass the head
    returns such outputs for one entry of the vocabulary, and the model's logits there are compared again.

    Args:
        model: the model itself, or with adapters.
        features: a batch of its inputs, (B, T) each; the first tokens of its first row are used.

    Raises:
        NoBody: no linear output embedding, a head that is cut up or adapted, or logits that come about otherwise.
        DamagedModel: all of its logits are NaN.
    """

    def __init__(self, model: nn.Module, features: Mapping[str, Any]):
        self.model = model
        try:
            self._prove(_few(features))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, NoBody | DamagedModel):
                raise
            raise NoBody(f"it cannot be tried on a few tokens: {type(error).__name__}: {str(error)[:200]}") from error

    @property
    def head(self) -> nn.Linear:
        """The output embedding as it is now."""
        return _linear_head(self.model)

    @property
    def _config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def softcap(self) -> float | None:
        """The soft-cap that the configuration names, or None."""
        return next((cap for name in SOFTCAPS if (cap := getattr(self._config, name, None)) is not None), None)

    @property
    def logit_scale(self) -> float:
        """What the head's outputs are multiplied by, as the configuration says."""
        divisor = getattr(self._config, "logits_scaling", None) or 1.0
        return (getattr(self._config, "logit_scale", None) or 1.0) / divisor

    def hidden(self, features: Mapping[str, Any]) -> Float[Tensor, "B T H"]:
        """What the head is given on a batch, differentiable."""
        return self.run(features, self.model)[0]

    def run(self, features: Mapping[str, Any], model: nn.Module) -> tuple[Float[Tensor, "B T H"], Any]:
        """What the head is given on a batch, and the outputs of the model beside its logits.

        Args:
            features: the model's inputs.
            model: the model, or what it is wrapped in.

        Raises:
            NoBody: what the model does with the outputs of its head is no longer what its configuration says.
        """
        with self._passing(1) as caught:
            outputs = model(**features, **uncached(self.model))
        if len(caught) != 1:
            raise NoBody(f"its head ran {len(caught)} times in one pass")
        hidden, probe = caught[0]
        self._compare(outputs["logits"].detach(), probe, _rough(hidden.dtype))
        return hidden, outputs

    def of(self, hidden: Float[Tensor, "N H"]) -> Head:
        """The head at some hidden states of ``run``, in their precision and without gradient."""
        weight, bias = self.head.weight.detach(), self.head.bias
        bias = None if bias is None else bias.detach().to(hidden.dtype)
        return Head(hidden.detach(), weight.to(hidden.dtype), bias, self.softcap, self.logit_scale)

    @contextmanager
    def _passing(self, width: int, record: bool = False):
        """The head returns probes of so many entries; what it is given is kept, in the precision of its product.

        Everything else of the model runs as it always does; with ``record``, what follows the head is recorded by autograd.
        """
        caught: list[tuple[Tensor, Tensor]] = []
        thread, head = threading.get_ident(), self.head

        def forward(hidden: Tensor) -> Tensor:
            if threading.get_ident() != thread:  # another thread runs the same model as it is
                return plain(hidden)
            kind = hidden.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            size = (*hidden.shape[:-1], width)
            probe = hidden.new_tensor(PROBES, dtype=dtype).repeat(math.ceil(math.prod(size) / len(PROBES)))
            probe = probe[: math.prod(size)].reshape(size)
            if record:  # until whoever switched it off leaves
                torch.set_grad_enabled(True)
                probe.requires_grad_()
            caught.append((hidden.to(dtype), probe))
            return probe

        with _lock_of(head):
            plain, before = head.forward, head.__dict__.get("forward")
            head.forward = forward
            try:
                yield caught
            finally:
                if before is None:
                    del head.forward
                else:
                    head.forward = before

    def _prove(self, features: dict[str, Any]) -> None:
        """Compare logits with the head's at the features, and at probes of the whole vocabulary instead of its outputs."""
        with evaluating(self.model):
            logits = model_logits(self.model, features)
            hidden = self.hidden(features)
            made = self.of(hidden.flatten(0, -2)).logits(slice(None))
        theirs, rough = logits.to(made.dtype).flatten(0, -2), _rough(hidden.dtype)
        if theirs.shape != made.shape:
            shapes = f"{tuple(theirs.shape)}, its head's {tuple(made.shape)}"
            raise NoBody(f"its logits have shape {shapes}")
        wrong = theirs.isnan().any(-1)  # at padding, some models attend to nothing
        if len(theirs) and bool(wrong.all()):
            name = type(self.model).__name__
            raise DamagedModel(f"the logits of {name} are NaN at every token: its weights are damaged, load others")
        made, theirs = made[~wrong | made.isfinite().all(-1)], theirs[~wrong | made.isfinite().all(-1)]
        off = float((made - theirs).abs().amax()) if made.numel() else 0.0
        if not off <= rough * max(1.0, float(theirs.abs().amax())):
            raise NoBody(f"its logits are not its head's: they differ by {off:.3g}")
        with evaluating(self.model), self._passing(logits.shape[-1], record=True) as caught:
            logits = self.model(**features, use_cache=False)["logits"]
        probe = caught[0][1]
        self._compare(logits.detach(), probe, rough)
        names = {id(value): name for name, value in self.model.named_parameters()}
        if others := [leaf for leaf in leaves(logits) if leaf is not probe]:
            shown = names.get(id(others[0]), f"a tensor of shape {tuple(others[0].shape)}")
            raise NoBody(f"its logits depend on more than its head's output: on {shown}")

    def _compare(self, logits: Tensor, probe: Tensor, rough: float) -> None:
        """Whether the model made of its head's outputs what softcap and logit scale say.

        Raises:
            NoBody: it did not; how far they are apart is named.
        """
        made = capped_(probe.detach().to(precision(probe.dtype), copy=True), self.softcap, self.logit_scale)
        if logits.shape != made.shape:
            raise NoBody(
                f"its logits are not its head's: of outputs {tuple(made.shape)} it makes {tuple(logits.shape)}"
            )
        off = (logits.to(made.dtype) - made).abs()
        wrong = ~(off <= rough * made.abs())
        if bool(wrong.any()):
            at = int(wrong.flatten().int().argmax())
            given, got, expected = (float(x.detach().flatten()[at]) for x in (probe, logits, made))
            raise NoBody(
                f"its logits are not its head's: they differ by {abs(got - expected):.3g} where the head's output is {given:g} "
                f"(the configuration says {expected:.4g}, the model makes {got:.4g})"
            )


def _rough(dtype: torch.dtype) -> float:
    """What counts as rounding, as a share of the logits, where the head's product is made in this dtype."""
    return 0.03 if dtype.itemsize < 4 else 1e-4


def _linear_head(model: nn.Module) -> nn.Linear:
    """The output embedding, if it is a whole linear layer."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(found) is not nn.Linear:
        what = "none" if found is None else f"a {type(found).__name__} of {type(found).__module__}"
        adapted = ", an adapted one" if hasattr(found, "base_layer") or hasattr(found, "parametrizations") else ""
        raise NoBody(f"it has no plain linear head: its output embedding is {what}{adapted}")
    if found.weight.ndim != 2 or type(found.weight.detach()) is not Tensor:
        raise NoBody("its head is cut up over devices")
    return found


def _few(features: Mapping[str, Any]) -> dict[str, Any]:
    """The first real tokens of a batch's first row."""
    mask = features.get("attention_mask")
    start = int(mask[0].argmax()) if isinstance(mask, Tensor) and mask.ndim == 2 else 0
    part = (slice(0, 1), slice(start, start + TRIED))
    return {k: v[part] if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in features.items()}


class Bodies:
    """The bodies of the models of a run, proved anew when a head or its hooks change; where there is none, a log line says why.

    Args:
        wanted: None for a body wherever there can be one, True to insist, False for none.
    """

    def __init__(self, wanted: bool | None):
        self.wanted = wanted
        self.known: dict[nn.Module, tuple[tuple, Body | None]] = {}
        self.reasons: set[str] = set()

    def of(self, model: nn.Module, features: Mapping[str, Any], name: str = "model") -> Body | None:
        """The body of a model, or None where its logits have to be whole.

        Raises:
            NoBody: there is none, and one was insisted on.
        """
        if self.wanted is False:
            return None
        seen = _fingerprint(model)
        if model not in self.known or self.known[model][0] != seen:
            try:
                self.known[model] = seen, Body(model, features)
            except NoBody as reason:
                self.known[model] = seen, self.refuse(f"of the {name}: {reason}")
        return self.known[model][1]

    def give_up(self, model: nn.Module, name: str, reason: NoBody) -> None:
        """Hold whole logits of a model from now on, until its head changes.

        Raises:
            NoBody: a body was insisted on.
        """
        self.known[model] = _fingerprint(model), self.refuse(f"of the {name}: {reason}")

    def states(self, model: nn.Module, features: Mapping[str, Any], name: str) -> tuple[Body, Tensor] | None:
        """The body of a model and what its head is given on a batch; None where its logits have to be whole.

        Raises:
            NoBody: they have to be, and a body was insisted on.
        """
        body = self.of(model, features, name)
        if body is None:
            return None
        try:
            return body, body.hidden(features)
        except NoBody as reason:
            return self.give_up(model, name, reason)

    def refuse(self, reason: str) -> None:
        """Say why logits are whole, once.

        Raises:
            NoBody: a body was insisted on.
        """
        if self.wanted:
            raise NoBody(f"fused=True, but there are only whole logits {reason}")
        if self.wanted is None and reason not in self.reasons:
            self.reasons.add(reason)
            logger.warning("qlens holds whole logits %s", reason)


def _fingerprint(model: nn.Module) -> tuple:
    """What a proof stands on and a user may change between steps: the head, its shape, hooks, what runs in its place."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parts: list[Any] = []
    for module in (model, head):
        if module is not None:
            hooks = (*module._forward_hooks, *module._forward_pre_hooks)
            parts += [id(module), id(type(module)), id(module.__dict__.get("forward")), hooks]
    for value in (getattr(head, "weight", None), getattr(head, "bias", None)):
        parts.append((tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None)
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    plain = {
        name: value
        for name, value in (vars(config) if config is not None else {}).items()
        if isinstance(value, int | float | str)
    }
    return (*parts, *sorted(plain.items()))
