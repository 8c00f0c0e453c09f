"""Bodies: a causal language model as hidden states and a linear head, so that its logits need never be whole."""

import logging
import threading
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from qlens.errors import InputError
from qlens.heads import Head
from qlens.packing import uncached
from qlens.sources import evaluating, model_logits
from qlens.tokens import precision

logger = logging.getLogger(__name__)
TRIED = 8  # tokens on which a head is proved
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()  # pyright: ignore
_LOCKING = threading.Lock()


def _lock_of(head: nn.Module) -> Any:
    """What lets one thread at a time have a head pass its input on."""
    with _LOCKING:
        return _LOCKS.setdefault(head, threading.RLock())


class NoBody(InputError):
    """Why a model's logits are not a linear head's of its hidden states."""


class Body:
    """A causal language model whose logits are those of a linear ``Head``, proved on a few tokens.

    Soft-cap and logit scale are looked up in the model's configuration under the names in use (Gemma's
    ``final_logit_softcapping``, Cohere's ``logit_scale``, Granite's ``logits_scaling``), never believed: the head's logits
    must be the model's own.

    Args:
        model: the model itself, or with adapters.
        features: a batch of its inputs, (B, T) each; the first tokens of its first row are used.

    Raises:
        NoBody: no linear output embedding, a head that is cut up or adapted, or logits that come about otherwise.
    """

    def __init__(self, model: nn.Module, features: Mapping[str, Any]):
        self.model, self.head = model, _linear_head(model)
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", None) or 1.0
        self.logit_scale: float = (getattr(config, "logit_scale", None) or 1.0) / divisor
        try:
            self._prove(_few(features))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, NoBody):
                raise
            raise NoBody(f"it cannot be tried on a few tokens: {type(error).__name__}: {str(error)[:200]}") from error

    def hidden(self, features: Mapping[str, Any]) -> Float[Tensor, "B T H"]:
        """What the head is given on a batch, differentiable."""
        return self.run(features, self.model)[0]

    def run(self, features: Mapping[str, Any], model: nn.Module) -> tuple[Float[Tensor, "B T H"], Any]:
        """What the head is given on a batch, and the outputs of the model beside its logits.

        Args:
            features: the model's inputs.
            model: the model, or what it is wrapped in.
        """
        with self._passing() as caught:
            outputs = model(**features, **uncached(self.model))
        if len(caught) != 1:
            raise NoBody(f"its head ran {len(caught)} times in one pass")
        return caught[0], outputs

    def of(self, hidden: Float[Tensor, "N H"]) -> Head:
        """The head at some hidden states, without gradient."""
        weight, bias = self.head.weight.detach(), self.head.bias
        bias = None if bias is None else bias.detach()
        return Head(hidden.detach().to(weight.dtype), weight, bias, self.softcap, self.logit_scale)

    @contextmanager
    def _passing(self):
        """The head lets one entry through, and its input is kept: everything else of the model runs as it always does."""
        caught: list[Tensor] = []
        thread = threading.get_ident()

        def forward(hidden: Tensor) -> Tensor:
            if threading.get_ident() != thread:  # another thread runs the same model as it is
                return plain(hidden)
            caught.append(hidden)
            return hidden[..., :1]

        with _lock_of(self.head):
            plain, before = self.head.forward, self.head.__dict__.get("forward")
            self.head.forward = forward
            try:
                yield caught
            finally:
                if before is None:
                    del self.head.forward
                else:
                    self.head.forward = before

    def _prove(self, features: dict[str, Any]) -> None:
        with evaluating(self.model):
            logits = model_logits(self.model, features)
            hidden = self.hidden(features)
            made = self.of(hidden.flatten(0, -2)).logits(slice(None))
        theirs = logits.to(made.dtype).flatten(0, -2)
        if theirs.shape != made.shape:
            shapes = f"{tuple(theirs.shape)}, its head's {tuple(made.shape)}"
            raise NoBody(f"its logits have shape {shapes}")
        rough = 0.05 if precision(logits.dtype) != logits.dtype or hidden.dtype.itemsize < 4 else 1e-4
        off = float((made - theirs).abs().amax()) if made.numel() else 0.0
        if not off <= rough * max(1.0, float(theirs.abs().amax())):
            raise NoBody(f"its logits are not its head's: they differ by {off:.3g}")


def _linear_head(model: nn.Module) -> nn.Linear:
    """The output embedding, if it is a whole linear layer."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(found) is not nn.Linear:
        what = "none" if found is None else f"a {type(found).__name__}"
        raise NoBody(f"it has no plain linear head: its output embedding is {what}")
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
    """The bodies of the models of a run, each proved once; where there is none, a log line says why.

    Args:
        wanted: None for a body wherever there can be one, True to insist, False for none.
    """

    def __init__(self, wanted: bool | None):
        self.wanted = wanted
        self.known: dict[nn.Module, Body | None] = {}
        self.reasons: set[str] = set()

    def of(self, model: nn.Module, features: Mapping[str, Any], name: str = "model") -> Body | None:
        """The body of a model, or None where its logits have to be whole.

        Raises:
            NoBody: there is none, and one was insisted on.
        """
        if self.wanted is False:
            return None
        if model not in self.known:
            try:
                self.known[model] = Body(model, features)
            except NoBody as reason:
                self.known[model] = self.refuse(f"of the {name}: {reason}")
        return self.known[model]

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
