"""A stub model whose logits are a free table: its gradient is the logit gradient of any loss that wants a whole model."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from qlens.errors import InputError


class StubConfig(PretrainedConfig):
    """Sizes of the stub: its hidden states are as wide as its vocabulary."""

    model_type = "qlens_stub"


class StubDecoder(nn.Module):
    """Hands out a table of hidden states, (B, T, V), whatever tokens it is shown."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """The table.

        Raises:
            InputError: it is shown a batch of another shape.
        """
        if input_ids is not None and input_ids.shape != self.table.shape[:2]:
            raise InputError(
                f"the loss runs the model on {tuple(input_ids.shape)} tokens, but it was given {tuple(self.table.shape[:2])}: "
                "a loss that rearranges its batch cannot be read"
            )
        return BaseModelOutputWithPast(last_hidden_state=self.table)  # pyright: ignore[reportArgumentType]


class StubModel(PreTrainedModel):
    """A causal model: hidden states from a free table, a head that is the identity, logits that are the table.

    Args:
        table: the logits, (B, T, V); gradients flow back into it, through the head or through a fused kernel.

    Example:
        >>> StubModel(torch.zeros(1, 3, 5))(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.shape
        torch.Size([1, 3, 5])
    """

    config_class = StubConfig
    base_model_prefix = "model"

    def __init__(self, table: Tensor):
        size = table.shape[-1]
        super().__init__(StubConfig(vocab_size=size, hidden_size=size, tie_word_embeddings=False))
        self.model = StubDecoder(table)
        self.lm_head = nn.Linear(size, size, bias=False, dtype=table.dtype, device=table.device)
        self.lm_head.weight.data = torch.eye(size, dtype=table.dtype, device=table.device)
        self.loss_type = "ForCausalLM"

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the loss that transformers' causal models compute."""
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(hidden,))


def trained_by(trainer: type) -> Callable:
    """compute_loss of a Trainer's class, built around a stub model.

    Raises:
        InputError: it cannot be built from a model and arguments alone.
    """
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True)
        try:
            built = trainer(model=StubModel(torch.zeros(1, 2, 4)), args=args)
        except Exception as error:  # a user's class may raise anything
            raise InputError(
                f"{trainer.__name__} could not be built from a model and its arguments ({type(error).__name__}: {error}): "
                "give the compute_loss of an instance"
            ) from error
    return built.compute_loss
