"""A stub model whose logits are a free table, for the logit gradient of losses that take a whole model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qlens.core.errors import InputError
from qlens.losses.leaves import StubParameter

WIDEST = 2**29  # bytes of the largest identity matrix


class StubConfig(PretrainedConfig):
    """Sizes of the stub: its hidden states are as wide as its vocabulary."""

    model_type = "qlens_stub"


class StubDecoder(nn.Module):
    """A decoder that returns a table of hidden states.

    Args:
        table: the hidden states, (B, T, V).
        ids: token ids of the texts, (B, T), by which texts in another number, order or length are recognised.
    """

    def __init__(self, table: Tensor, ids: Tensor | None = None):
        super().__init__()
        self.table, self.ids = table, ids

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """The table.

        Raises:
            InputError: its input holds unknown texts.
        """
        hidden: Any = self._hidden_states(input_ids)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _hidden_states(self, ids: Tensor | None) -> Tensor:
        if ids is None or ids.shape == self.table.shape[:2]:
            return self.table
        if self.ids is not None and ids.ndim == 2 and ids.shape[1] <= self.ids.shape[1]:
            is_prefix = (ids[:, None] == self.ids[None, :, : ids.shape[1]]).all(-1)
            if bool(is_prefix.any(1).all()):
                return self.table[is_prefix.long().argmax(1), : ids.shape[1]]
        raise InputError(
            f"the loss runs the model on {tuple(ids.shape)} tokens, but it was given {tuple(self.table.shape[:2])}: "
            "a loss that rearranges its batch cannot be read"
        )


class IdentityHead(nn.Linear):
    """A linear head whose weight is ``scale`` times the identity, (V, V), built only when it is read."""

    def __init__(self, size: int, like: Tensor, scale: float = 1.0):
        nn.Module.__init__(self)
        self.in_features = self.out_features = size
        self.scale = scale
        self.like = StubParameter(
            like.detach().new_zeros(())
        )  # a trainer asks a model's parameters for dtype and device
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The matrix."""
        return self.scale * identity_head(self.in_features, self.like)

    def forward(self, input: Tensor) -> Tensor:
        """The input times ``scale``."""
        return input if self.scale == 1 else self.scale * input


def identity_head(size: int, like: Tensor) -> Tensor:
    """The identity as a head's weight, (size, size), in the dtype and on the device of another tensor.

    Raises:
        InputError: it would take more than half a gigabyte.
    """
    if size * size * like.element_size() > WIDEST:
        raise InputError(
            f"the loss multiplies by a head, which here is the identity of {size} x {size} entries: try it on a vocabulary of "
            "at most 8,000"
        )
    return torch.eye(size, dtype=like.dtype, device=like.device)


class StubModel(PreTrainedModel):
    """A causal model: hidden states from a free table, a head that is the identity, logits that are the table.

    Args:
        table: the logits, (B, T, V); gradients flow back into it, through the head or through a fused kernel.
        ids: the token ids of the texts, (B, T).
        other: the logits (B, T, V) of another model on the same texts, by the name of its field in Tokens.
        scale: the diagonal of the head; hidden states are that much smaller.

    Example:
        >>> StubModel(torch.zeros(1, 3, 5))(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.shape
        torch.Size([1, 3, 5])
    """

    config_class = StubConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True

    def __init__(
        self, table: Tensor, ids: Tensor | None = None, other: Callable[[str], Tensor] | None = None, scale: float = 1.0
    ):
        size = table.shape[-1]
        super().__init__(StubConfig(vocab_size=size, hidden_size=size, tie_word_embeddings=False))
        self.model = StubDecoder(table / scale if scale != 1 else table, ids)
        self.lm_head = IdentityHead(size, table, scale)
        self.loss_type, self.other, self.adapted = "ForCausalLM", other, True

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the logits are the reference's, as those of a PEFT model without its adapter.

        Raises:
            InputError: the tokens have no reference.
        """
        self.adapted = False
        try:
            yield
        finally:
            self.adapted = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the loss that transformers' causal models compute."""
        if self.adapted or self.other is None:
            hidden = self.model(input_ids).last_hidden_state
        else:
            hidden = self.other("reference") / self.lm_head.scale
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            options = {name: kwargs[name] for name in ("ignore_index", "shift_labels") if name in kwargs}
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, size, num_items_in_batch=num_items_in_batch, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(hidden,))


StubModel.__name__ = (
    "LlamaForCausalLM"  # a Trainer shifts labels for models of a name that transformers knows as causal
)
