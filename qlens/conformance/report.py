"""Check: the conformance report on the implementation of a loss."""

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from qlens.conformance import (
    RULES,
    Failed,
    IncompleteGroup,
    NotApplicable,
    Remark,
    Rule,
    Specimen,
    sees_no_batches,
    specimen,
)
from qlens.conformance.synthetic_batches import VOCABULARY
from qlens.core.display import Result, frame_html
from qlens.core.errors import InputError
from qlens.losses import user_code
from qlens.losses.user_code import first_line
from qlens.registry import resolve
from qlens.registry.variant import Variant

if TYPE_CHECKING:
    import pandas as pd

State = Literal["passed", "failed", "remark", "not applicable"]
STATES: tuple[State, ...] = ("failed", "remark", "passed", "not applicable")  # in the order of the printout
BY_LENGTH = ("accumulation", "evaluation", "padding_side", "padding_amount")  # rules on the divisor of the reduction
WIDTH, EVIDENCE = max(map(len, RULES)), 100  # columns


@dataclass(frozen=True)
class Item:
    """The outcome of one rule.

    Args:
        id: name of the rule.
        state: "passed", "failed", "not applicable", or "remark": worth knowing for training, but no fault of the code.
        evidence: what was measured.
        consequence: effect of a failure on training.
    """

    id: str
    state: State
    evidence: str
    consequence: str = ""


@dataclass(frozen=True, repr=False)
class CheckReport(Result):
    """The conformance of a loss: print it, or read ``ok``, ``failures`` and ``items``.

    Args:
        spec: the loss.
        kind: its call signature: tokens, logits, outputs, hidden or model.
        items: one per rule, in a fixed order; ``report["padding_side"]`` is the one of that id.
        vocabulary: number of columns of the logits that it was called with.
        refused: the error at a vocabulary of 24, where it needs a wider one.
        called_as: how it was called, in words.
        notes: remarks on other effects: another model that it runs, an input without effect, ...

    Example:
        >>> report = check("dft")
        >>> report.ok, report["shift"].evidence
        (True, 'row t learns its own label: 24 labels changed one at a time')
    """

    spec: str
    kind: str
    items: tuple[Item, ...]
    vocabulary: int = VOCABULARY
    refused: str = ""
    called_as: str = ""
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[Item, ...]:
        """The items that are worth knowing and no faults of the code."""
        return tuple(item for item in self.items if item.state == "remark")

    @property
    def failures(self) -> tuple[Item, ...]:
        """The items that failed."""
        return tuple(item for item in self.items if item.state == "failed")

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __getitem__(self, name: str) -> Item:
        """The item of that id."""
        return next(item for item in self.items if item.id == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything printable, for JSON."""
        return {
            "loss": self.spec,
            "kind": self.kind,
            "vocabulary": self.vocabulary,
            "ok": self.ok,
            "items": [asdict(item) for item in self.items],
            "called_as": self.called_as,
            "notes": list(self.notes),
        }

    def to_frame(self) -> "pd.DataFrame":
        """A row per rule: id, state, evidence, consequence."""
        import pandas as pd

        return pd.DataFrame([asdict(item) for item in self.items])

    def plot(self) -> Any:
        """The figure: a coloured row per rule (matplotlib)."""
        from qlens.analysis.plots.report_figures import figure_check

        return figure_check(self)

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        return frame_html(frame[frame["state"] != "not applicable"], f"{self.spec}: {self._counts()}")

    def _counts(self) -> str:
        counts = {state: sum(item.state == state for item in self.items) for state in STATES}
        order = ("passed", "failed", "remark", "not applicable")
        return ", ".join(f"{counts[state]} {state}" for state in order if counts[state] or state != "remark")

    def __repr__(self) -> str:
        return f"CheckReport({self.spec}: {self._counts()})"

    def __str__(self) -> str:
        by_state = {state: [item for item in self.items if item.state == state] for state in STATES}
        lines = [f"{self.spec}: conformance of its implementation (called with {self.kind})", ""]
        for item in (*by_state["failed"], *by_state["remark"], *by_state["passed"]):
            lines += _entry(item.state, item.id.replace("_", " "), item.evidence)
            lines += _entry("", "", f"consequence: {item.consequence}") if item.consequence else []
        for reason in dict.fromkeys(item.evidence for item in by_state["not applicable"]):
            names = ", ".join(
                item.id.replace("_", " ") for item in by_state["not applicable"] if item.evidence == reason
            )
            lines += _entry(
                "not applicable",
                names if "," not in names else "",
                reason if "," not in names else f"{names}: {reason}",
            )
        called = [f"Called with {self.called_as}{self._width()}."] if self.called_as else []
        notes = [line for note in (*called, *self.notes) for line in textwrap.wrap(note, 110, break_on_hyphens=False)]
        return "\n".join([*lines, "", *notes, self._counts()])

    def _width(self) -> str:
        if self.vocabulary == VOCABULARY:
            return ""
        return f", a vocabulary of {self.vocabulary}: with {VOCABULARY} columns {self.refused}"


@user_code.quiet()
@torch.inference_mode(False)
def check(loss: Variant | str | Callable) -> CheckReport:
    """Check the implementation of a loss: accumulation, evaluation, padding, packing, masks, shift, precision, limits, inputs.

    Args:
        loss: a Variant, a spec, FILE.py:FUNCTION, a callable or a trainer's class (see ``implied_target``).

    Gradients count as equal when they differ by at most 1e-5 of the largest entry (0.05 for a loss in bfloat16). A loss
    that needs a vocabulary above 24 is called with a wider one, ``report.vocabulary``. A remark is worth knowing but no fault
    of the code, and leaves the report ``ok``.

    Returns:
        A CheckReport: printable, with ``ok``, ``failures``, ``items`` and exports.

    Raises:
        InputError: the loss cannot be called on ordinary input, or its gradient there is not finite or zero up to rounding.

    Example:
        >>> import torch.nn.functional as F
        >>> check(F.cross_entropy).ok
        True
        >>> [item.id for item in check(lambda logits, labels: F.cross_entropy(logits.exp().log(), labels)).failures]
        ['impossible', 'extremes']
    """
    with torch.random.fork_rng(devices=[]):
        variant = resolve(loss)
        tested, refused = specimen(variant)
        items = {name: _item(name, rule, tested) for name, rule in RULES.items() if not rule.compares}
        random = items["deterministic"].state == "failed"
        for name, rule in RULES.items():
            if rule.compares:
                reason = "two calls on the same input differ, so that calls cannot be compared"
                items[name] = Item(name, "not applicable", reason) if random else _item(name, rule, tested)
        called_as, notes = variant.account(tested.tokens())
    in_order = tuple(items[name] for name in RULES)
    return CheckReport(variant.spec, tested.kind, in_order, tested.vocabulary, refused, called_as, notes)


def _item(name: str, rule: Rule, tested: Specimen) -> Item:
    if rule.laid_out and (reason := sees_no_batches(tested)):
        return Item(name, "not applicable", reason)
    try:
        return Item(name, "passed", rule.run(tested))
    except NotApplicable as reason:
        return Item(name, "not applicable", str(reason))
    except Remark as remark:
        return Item(name, "remark", str(remark))
    except Failed as failure:
        if tested.attends and name in BY_LENGTH and (without_prompts := _remark_without_prompts(rule, tested)):
            return Item(name, "remark", f"{failure}; {without_prompts}")
        return Item(name, "failed", str(failure), failure.consequence or rule.consequence)
    except IncompleteGroup as reason:
        return Item(name, "not applicable", str(reason))
    except InputError as error:
        return Item(name, "failed", str(error), rule.raising)
    except Exception as error:
        return Item(name, "failed", f"raises {type(error).__name__}: {first_line(error)}", rule.raising)


def _remark_without_prompts(rule: Rule, tested: Specimen) -> str:
    """A remark if a loss that may use the attention mask keeps the rule on texts without prompts; else ""."""
    try:
        rule.run(tested.without_prompts())
    except (Failed, NotApplicable, InputError):
        return ""
    except Remark as remark:
        return f"where nothing is a prompt: {remark}"
    return "not so where nothing is a prompt: it uses the attention mask, prompts included"


def _entry(state: str, name: str, text: str) -> list[str]:
    """A row of the printed table, wrapped."""
    start = f"{state:<{len(STATES[-1])}}  {name:<{WIDTH}}  "
    wrapped = textwrap.wrap(text, EVIDENCE, break_on_hyphens=False)
    return [(start if not i else " " * len(start)) + part for i, part in enumerate(wrapped)]
