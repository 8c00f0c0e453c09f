"""Watch: a callback that records the targets of methods on fixed tokens during training."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from qlens.core.errors import InputError, brief
from qlens.core.files import write_text, written
from qlens.core.numerics import row_blocks, spread
from qlens.core.supervised import IGNORE
from qlens.core.target import Target
from qlens.data.examples import encode
from qlens.data.from_text import ENTRIES, supervised_tokens, token_batches
from qlens.data.models import loaded_once
from qlens.data.vocabularies import Vocabularies
from qlens.registry import Variant, resolve
from qlens.training.fitting import isolated
from qlens.training.step.inputs import ARGUMENTS, DERIVED

INTEGERS = ("step", "token", "label")
NUMBERS = ("p_y", "label_weight", "trust", "reshape", "entropy", "kl", "negative_mass", "drift", "drift_kl")
SEED = 0  # of a variant that draws numbers, at every record


class Watch(TrainerCallback):
    r"""Records the targets of methods on fixed probe tokens in a run of any transformers Trainer.

    Records are made at the start, every ``every`` steps and at the end. They do not change the run: random states and the mode
    of every module are restored.

    ``frame`` has a row per record, variant and token: step, variant, token (its number), label (its id), text (with a
    tokenizer), p_y, label_weight (also as trust), reshape, entropy H(Q), kl KL(Q || p), negative_mass, drift
    1/2 sum_k |Q_k - Q0_k| since the first record, drift_kl KL(Q || Q0); unit scale, nats; NaN where Q is signed. It is saved
    as NAME.csv in the run's folder, and Q0 as NAME.safetensors: a run resumed from a checkpoint continues with the records
    up to there, and a new run starts anew.

    Args:
        variants: specs, Variants or loss functions; the trainer's own loss need not be among them.
        examples: rows of text as ``qlens.data.encode`` takes them (with ``tokenizer``), or encoded ones.
        tokenizer: of the model.
        teacher, reference: other models over the same tokenizer, or their paths, for variants that need them.
        every: optimizer steps between records.
        tokens: number of supervised tokens that are recorded, evenly spread; logits and Q are computed at them alone where
            every variant is declared to be per-token, else at whole rows.
        batch_size: rows per forward pass.
        name: of the files; a second Watch in one run needs another.

    Raises:
        InputError: no examples, a number below 1, a variant that needs a missing input, or, as training begins, a model of
            another vocabulary, or records of another Watch in the folder of a resumed run.

    Source: the targets are those of Xie et al. 2026 (arXiv 2606.11189).

    Example:
        >>> watch = Watch(["dft", "target_sft"], rows, tokenizer=tokenizer, teacher=teacher, every=20)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[watch]).train()                         # doctest: +SKIP
        >>> watch.frame.groupby(["variant", "step"]).drift.mean()                                       # doctest: +SKIP
    """

    def __init__(
        self,
        variants: Variant | str | Callable | Iterable[Variant | str | Callable],
        examples: Sequence[Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: nn.Module | str | Path | None = None,
        reference: nn.Module | str | Path | None = None,
        every: int = 50,
        tokens: int = 64,
        batch_size: int = 8,
        name: str = "watch",
    ):
        for key, value in {"every": every, "tokens": tokens, "batch_size": batch_size}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{key} must be a whole number of at least 1, got {value!r}")
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise InputError(f"name must be a file name without a folder, such as 'watch', got {brief(name)}")
        single = isinstance(variants, str | Variant) or not isinstance(variants, Iterable)
        resolved = [resolve(each) for each in ([variants] if single else variants)]
        self.variants = {variant.spec: variant for variant in resolved}
        if len(self.variants) < len(resolved):
            raise InputError(f"variants has a name twice: {', '.join(variant.spec for variant in resolved)}")
        self.other_models = loaded_once({"teacher": teacher, "reference": reference})
        _check_needs(resolved, self.other_models)
        self.examples = _encoded(examples, tokenizer)
        if not any(label != IGNORE for example in self.examples for label in example["labels"][1:]):
            raise InputError(
                "examples have no supervised token: give rows with labels other than -100 after their first"
            )
        self.tokenizer, self.every, self.tokens, self.batch_size, self.name = tokenizer, every, tokens, batch_size, name
        self.vocabularies = Vocabularies()
        self._records: list[pd.DataFrame] = []
        self._first: dict[str, Float[Tensor, "N V"]] = {}
        self._first_inside: dict[str, Bool[Tensor, " N"]] = {}

    @property
    def frame(self) -> pd.DataFrame:
        """All records so far, a row per step, variant and token."""
        return pd.concat(self._records, ignore_index=True) if self._records else pd.DataFrame()

    def plot(self) -> Any:
        """A matplotlib figure: label weight against p_y at the first and last record; negative mass and drift of Q by step."""
        from qlens.analysis.plots.watch_axes import figure_watch

        return figure_watch(self.frame)

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Load the records of a resumed run, or make the first."""
        for name, other in self.other_models.items():
            if other is model:
                raise InputError(f"{name} is the model being trained: give a copy of it")
            self.vocabularies.check(model, other, name, self.tokenizer)
        self._records, self._first, self._first_inside = [], {}, {}
        if state.global_step:
            self._load(Path(args.output_dir), state.global_step)
        if not self._records:
            self.record(model, state.global_step)
            self._save(args, state)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record every ``every`` steps and at the last."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last or state.global_step % self.every == 0:
            self.record(model, state.global_step)
            self._save(args, state)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record the end of a run that stopped between records, unless its best model has been loaded instead."""
        if state.global_step > self._last and not args.load_best_model_at_end:
            self.record(model, state.global_step)
            self._save(args, state)

    @property
    def _last(self) -> int:
        return int(self._records[-1]["step"].iloc[0]) if self._records else -1

    def record(self, model: nn.Module, step: int) -> None:
        """Record the variants' targets on the probe tokens; once per step."""
        if step <= self._last:
            return
        with isolated(SEED, threads=None):
            self._records += [
                pd.DataFrame(self._columns(step, name, target)) for name, target in self._read(model).items()
            ]

    def _read(self, model: nn.Module) -> dict[str, Target]:
        """Every variant's target in unit scale, at the probe tokens alone, on the CPU.

        Logits are computed at these tokens alone where every variant is declared to be per-token, else at whole rows.
        """
        needs = sorted({need for variant in self.variants.values() for need in variant.needs})
        index, start = spread(supervised_tokens(self.examples), self.tokens), 0
        alone = all(variant.alone for variant in self.variants.values())
        parts: dict[str, list[Target]] = {name: [] for name in self.variants}
        batches = token_batches(
            model, self.examples, self.batch_size, needs, ENTRIES if alone else None,
            chosen=index if alone else None, vocabularies=self.vocabularies, **self.other_models,
        )  # fmt: skip
        with closing(batches):
            for tokens in batches:
                rows = torch.arange(len(tokens))
                if not alone:
                    rows = index[(index >= start) & (index < start + len(tokens))] - start
                    start += len(tokens)
                for name, variant in self.variants.items():
                    target = variant.target(tokens)
                    parts[name].append(target[rows.to(target.labels.device)].cpu().at("unit"))
        return {name: Target.join(targets) for name, targets in parts.items()}

    def _columns(self, step: int, name: str, target: Target) -> dict[str, Any]:
        first, labels = self._first.setdefault(name, target.q), target.labels
        inside = self._first_inside.setdefault(name, target.in_simplex)
        texts = {"text": [self.tokenizer.decode([int(y)]) for y in labels]} if self.tokenizer is not None else {}
        values = {
            "p_y": target.label_probs,
            "label_weight": target.label_weight,
            "trust": target.label_weight,  # the old name
            "reshape": target.reshape,
            "entropy": target.entropy,
            "kl": target.kl,
            "negative_mass": target.negative_mass,
        }
        both = target.in_simplex & inside
        drift, divergence = torch.zeros_like(target.scale), torch.full_like(target.scale, torch.nan)
        for rows in row_blocks(*first.shape):
            q, q0 = target.q_rows(rows), first[rows]
            drift[rows] = (q - q0).abs().sum(1) / 2
            divergence[rows] = torch.where(both[rows], _divergence(q, q0), torch.nan)
        values |= {"drift": drift, "drift_kl": divergence}
        place = {"step": step, "variant": name, "token": range(len(labels)), "label": labels.tolist()}
        return place | texts | {key: value.double().tolist() for key, value in values.items()}

    def _save(self, args: TrainingArguments, state: Any) -> None:
        """Write the records and, with the first of them, the first targets."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if len(self._records) == len(self.variants):
            with written(folder / f"{self.name}.safetensors") as partial:
                tensors = {str(number): q.contiguous() for number, q in enumerate(self._first.values())}
                save_file(tensors, partial, metadata={"of": self._identity})
        write_text(folder / f"{self.name}.csv", self.frame.to_csv(index=False))

    def _load(self, folder: Path, step: int) -> None:
        """Load the records up to a step, and the first targets, where there are any."""
        table, tensors = (folder / f"{self.name}.{kind}" for kind in ("csv", "safetensors"))
        if not (table.is_file() and tensors.is_file()):
            return
        with safe_open(tensors, "pt") as file:
            if (file.metadata() or {}).get("of") != self._identity:
                raise InputError(
                    f"{table} is of other variants or examples: give Watch(name=...) another than {self.name!r}"
                )
            self._first = {name: file.get_tensor(str(number)) for number, name in enumerate(self.variants)}
        frame = pd.read_csv(table, dtype=str, keep_default_na=False)  # as text, so that no digit is lost
        frame = frame.assign(label_weight=frame.get("label_weight", frame["trust"]))  # a file of an older qlens
        kinds = dict.fromkeys(INTEGERS, int) | {name: lambda text: float(text or "nan") for name in NUMBERS}
        frame = frame.assign(**{name: frame[name].map(kind) for name, kind in kinds.items()})
        self._records = [rows for _, rows in frame[frame["step"] <= step].groupby(["step", "variant"], sort=False)]
        for rows in self._records[: len(self.variants)]:  # the entropy of Q0 is NaN where Q0 is signed
            self._first_inside[rows["variant"].iloc[0]] = torch.tensor(rows["entropy"].notna().to_numpy())

    @property
    def _identity(self) -> str:
        """An identifier of variants, examples and tokens."""
        return json.dumps([list(self.variants), [list(e["labels"]) for e in self.examples], self.tokens])


def _divergence(q: Float[Tensor, "n V"], first: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(Q || Q0) in nats, of rows that are distributions."""
    q = q.clamp(min=0)
    return torch.where(q > 0, q * (q.log() - first.clamp(min=0).log()), 0.0).sum(-1).clamp(min=0)


def _check_needs(variants: Sequence[Variant], other_models: Mapping[str, nn.Module]) -> None:
    if not variants:
        raise InputError("variants is empty: name at least one, like Watch('dft', ...)")
    for variant in variants:
        for need in variant.needs:
            if need in ARGUMENTS and need not in other_models:
                raise InputError(f"{variant.name} needs a {need}: give Watch({need}=...)")
            if need not in (*DERIVED, *ARGUMENTS):
                raise InputError(f"{variant.name} needs {need!r}, which Watch has no source for")


def _encoded(examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> list[Any]:
    if isinstance(examples, str) or not len(examples):
        raise InputError("examples must be a non-empty list of rows to watch the targets on")
    if all(isinstance(each, Mapping) and {"input_ids", "labels"} <= set(each) for each in examples):
        return [{name: list(each[name]) for name in ("input_ids", "labels")} for each in examples]
    if tokenizer is None:
        raise InputError("examples are rows of text: give Watch(tokenizer=...), or encode them")
    return encode(examples, tokenizer).examples
