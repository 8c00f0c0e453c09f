"""QSFTTrainer: TRL's SFTTrainer with a qlens loss."""

from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from qlens.core.errors import InputError, brief
from qlens.data.model_folders import place_of, without_peft_warning
from qlens.training.datasets.columns import ColumnCollator, cut_and_packed, whole_rows, with_teacher_prompts
from qlens.training.datasets.pairs import PairCollator, check_takes_pairs, encoded_pairs, is_pairs
from qlens.training.datasets.rows import as_dataset, keys_of
from qlens.training.loss_mixin import QLossMixin


class QSFTTrainer(QLossMixin, SFTTrainer):
    """trl.SFTTrainer with a qlens loss; see ``QLossMixin`` for the loss, its other models and the logs.

    Everything that an SFTConfig says holds: chat templates, ``assistant_only_loss``, ``completion_only_loss``, packing,
    ``padding_free``, ``max_length``, checkpointing of activations, a model by name with ``model_init_kwargs``,
    ``peft_config`` and ``quantization_config``. The variants "sft" and "dft" are TRL's ``loss_type`` "nll" and "dft".

    Columns of the data that a method needs (``qlens.data.collator.COLUMNS``), one value per row or one per token, are cut
    and packed with the tokens. Rows of ``prompt``, ``chosen`` and ``rejected`` train a method of pairs ("dpo", "simpo",
    ...): they are encoded and padded as by trl.DPOTrainer, and batch sizes count pairs.

    TRL's metrics are logged beside qlens': ``num_tokens``, all tokens so far, and ``entropy`` and ``mean_token_accuracy``,
    over the supervised tokens of the logged step (TRL: the mean over the micro-batches since the last log).

    Args:
        model: a model, or a folder or name that TRL loads (in float32, unless ``args.model_init_kwargs`` says otherwise).
        args: an SFTConfig.
        train_dataset, eval_dataset: Datasets, or lists of rows.
        variant, teacher, reference, old_every, fused, log_every: see ``QLossMixin``.
        options: of trl.SFTTrainer.

    Raises:
        InputError: as QLossMixin; an option that competes with the variant (``loss_type``, ``label_smoothing_factor``,
            ``compute_loss_func``); images; pairs for another method, or packed; no model at that path.

    Example:
        >>> trainer = QSFTTrainer("path/to/model", SFTConfig("out", packing=True), variant="target_sft",
        ...                       teacher="path/to/teacher", train_dataset=dataset)              # doctest: +SKIP
        >>> trainer.train()                                                                      # doctest: +SKIP
    """

    _tag_names = ["qlens", "trl", "sft"]

    def __init__(
        self,
        model: Any = None,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ):
        _check_options(args)
        if {"image", "images"} & set(keys_of(train_dataset)):
            raise InputError("train_dataset has images, and qlens trains on text: drop the column")
        train_dataset = as_dataset(train_dataset)
        eval_dataset = (
            {key: as_dataset(each) for key, each in eval_dataset.items()}
            if isinstance(eval_dataset, dict)
            else as_dataset(eval_dataset)
        )
        try:
            with without_peft_warning():
                super().__init__(
                    model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
                    eval_dataset=eval_dataset, **options,
                )  # fmt: skip
        except OSError as error:
            raise InputError(f"model {brief(model)} cannot be read: {brief(str(error), 300)}") from error
        if is_pairs(self.train_dataset) and data_collator is None:
            pad, config = self.data_collator.pad_token_id, self.args
            self.data_collator = PairCollator(pad, config.max_length, config.truncation_mode, config.pad_to_multiple_of)
        elif type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = ColumnCollator.of(self.data_collator)

    def _opened(self, model: Any) -> Any:
        """The model; one that TRL loads stays a name or path, which is checked."""
        if not isinstance(model, str | Path):
            return super()._opened(model)
        place, _ = place_of(model, "model")
        return place

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """TRL's preparation; pairs are encoded as for DPO, and columns are cut and packed with the tokens."""
        self._check_dataset(dataset, packing or args.padding_free, dataset_name)
        if is_pairs(dataset):
            options = (args.max_length, args.truncation_mode, args.dataset_num_proc)
            prepared = encoded_pairs(dataset, processing_class, f"the {dataset_name} dataset", *options)
            prepared = prepared.shuffle(seed=args.seed) if args.shuffle_dataset else prepared
        else:
            plain = whole_rows(args)
            whole = super()._prepare_dataset(dataset, processing_class, plain, False, formatting_func, dataset_name)
            whole = with_teacher_prompts(whole, self._teacher_template, processing_class, self.chat_template)
            prepared = cut_and_packed(whole, args, packing, dataset_name)
        if not getattr(prepared, "num_rows", 1):
            raise InputError(
                f"no row of the {dataset_name} dataset is left: none has a supervised token within max_length="
                f"{args.max_length}; set SFTConfig(max_length=...) higher"
            )
        return prepared

    def _check_dataset(self, dataset: Any, packed: bool, name: str) -> None:
        """Check that a data set fits the method.

        Raises:
            InputError: it has pairs, and the method or the packing has no use for them.
        """
        if is_pairs(dataset):
            check_takes_pairs(self.variant, f"the {name} dataset")
            if packed:
                raise InputError(
                    "packing and padding_free join rows of one text, and a pair has two: set SFTConfig(packing=False, "
                    "padding_free=False)"
                )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """QLossMixin's loss; the tokens of the batch are counted as by TRL."""
        if self._trains(model):
            mask = inputs.get("attention_mask")
            own = inputs["input_ids"].numel() if mask is None else mask.sum()
            counts = torch.as_tensor(own, device=self.args.device)
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(counts).sum()) // (self._tp_size or 1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """QLossMixin's log, with the number of tokens so far."""
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, *args, **kwargs)


def _check_options(args: Any) -> None:
    """Check that no option competes with the variant.

    Raises:
        InputError: one does; what to write instead is named.
    """
    if (loss := getattr(args, "loss_type", "nll")) != "nll":
        raise InputError(
            f"SFTConfig(loss_type={loss!r}) competes with variant: give variant={loss!r} and leave loss_type out"
        )
    if getattr(args, "label_smoothing_factor", 0):
        raise InputError("label_smoothing_factor competes with variant: use variant='label_smoothing(epsilon=...)'")
    parallelism = getattr(args, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise InputError(
            "context and sequence parallelism cut texts up over devices, while qlens needs the labels of a text together: "
            "leave cp_size and sp_size of parallelism_config at 1"
        )
