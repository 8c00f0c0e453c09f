"""Rule on inputs: every input that a loss takes has an effect."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlens.conformance.harness import Reading, Specimen
from qlens.conformance.rules.rule import Failed, NotApplicable, Remark, rule
from qlens.conformance.synthetic_batches import count
from qlens.conformance.wrappers import Around, altering, as_it_is, each_tensor
from qlens.core.errors import InputError
from qlens.core.supervised import IGNORE
from qlens.core.tokens import MODELS, Tokens
from qlens.losses.layout.names import STUDENT

FORCED = ("labels", "count")  # roles that a caller may pass to a loss that does not use them
LEFT = (
    "batch", "head", "return outputs", "vocabulary", "ignore", "temperature", "position ids", "input ids", "texts", *STUDENT,
)  # fmt: skip


@rule("the input is ignored: training is the same without it")
def inputs_have_effect(loss: Specimen) -> str:
    """Every input that the loss takes changes its gradient."""
    effects = _of_fields(loss) if loss.kind == "tokens" else _of_arguments(loss)
    if not effects:
        raise NotApplicable("it takes no input beside the logits")
    ineffective = [name for name, effect in effects.items() if not effect]
    bare = [name for name in ineffective if loss.roles.get(name) not in FORCED]
    settled = {name: words for name in bare if (words := _at_other_settings(loss, name))}
    bare = [name for name in bare if name not in settled]
    if bare:
        raise Failed(f"no effect: {', '.join(bare)}: changing {_it(bare)} changes neither value nor gradient")
    remarks = [f"{name}: no effect on value or gradient{settled.get(name, '')}" for name in ineffective]
    remarks += [f"{name}: changes the value, not the gradient" for name, effect in effects.items() if effect == "value"]
    if remarks:
        raise Remark("; ".join(remarks))
    return f"each changes the gradient: {', '.join(effects)}"


def _of_fields(loss: Specimen) -> dict[str, str]:
    """The effect of every field of Tokens that a method needs."""
    tokens = loss.tokens()
    base = loss.read(tokens)
    effects = {}
    for name in loss.fields:
        readings = (lambda changed=changed: loss.read(changed) for changed in _with_other(tokens, name))
        effects[name] = _effect(readings, base)
    return effects


def _at_other_settings(loss: Specimen, name: str) -> str:
    """The value of a numeric setting at which an input has an effect, in words; "" where it has none at any."""
    if loss.kind == "tokens":
        return ""
    parameters = inspect.signature(loss.fn.forward if isinstance(loss.fn, nn.Module) else loss.fn).parameters
    for setting, p in parameters.items():
        value = loss.params.get(setting, p.default)
        if setting in loss.roles or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for other in (value + 1, value / 2):
            try:
                effects = _of_arguments(loss, {setting: other})
            except InputError:  # it is called with its own settings only
                continue
            if effects.get(name):
                return f" at {setting}={value:g}, an effect at {setting}={other:g}"
    return ""


def _of_arguments(loss: Specimen, settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The effect of every argument of a function, and of every column that it takes out of a model's inputs.

    Args:
        loss: the loss.
        settings: values of parameters that are no inputs, by name; their defaults where there are none.
    """
    passed: dict[str, Any] = {}
    settings = settings or {}
    columns = [name for name, role in loss.roles.items() if role == "batch"]

    def read(around: Around = as_it_is) -> Reading:
        if not loss.laid_out:
            return loss.read(loss.tokens(), around)
        texts = loss.unequal()
        return loss.read_batch(texts, count(texts), around=around)

    def note(arguments: dict[str, Any]) -> None:
        batch = {
            name: dict(value) for name, value in arguments.items() if isinstance(value, Mapping) and name in columns
        }
        passed.update(arguments | batch)  # a loss may take entries out of its batch

    base = read(altering(lambda arguments: (arguments.update(settings), note(arguments))))
    batch = next((name for name in passed if loss.roles.get(name) == "batch"), "")
    names = {name: None for name in passed if name in loss.roles and loss.roles[name] not in LEFT}
    names |= {name: batch for name in loss.style.columns if batch}
    effects = {}
    for name, inside in names.items():
        value = passed[inside][name] if inside else passed[name]
        readings = (
            lambda other=other, name=name, inside=inside: read(altering(_putting(name, other, inside, settings)))
            for other in _other_values(value, loss.vocabulary)
        )
        if value is not None:
            effects[name] = _effect(readings, base)
    return effects


def _putting(name: str, value: Any, inside: str | None, settings: Mapping[str, Any]) -> Any:
    """A change of arguments by name: one of them, or one entry of the mapping ``inside``, and the settings."""

    def change(arguments: dict[str, Any]) -> None:
        arguments.update(settings)
        if inside:
            arguments[inside] = {**arguments[inside], name: value}
        else:
            arguments[name] = value

    return change


def _effect(readings: Iterator, base: Reading) -> str:
    """Whether any other values of an input change the "gradient", or only the "value", or nothing."""
    effect = ""
    for read in readings:
        try:
            reading = read()
        except Exception:  # it looks at the input, if only to refuse it
            return "gradient"
        if not torch.equal(reading.grad.nan_to_num(7.0), base.grad):
            return "gradient"
        effect = "value" if not torch.equal(reading.value, base.value) else effect
    return effect


def _other_values(value: Any, vocabulary: int) -> Iterator[Any]:
    """Other values of an argument: a tensor, a mapping of tensors, or another model."""
    if isinstance(value, Mapping | list | tuple):
        yield each_tensor(value, lambda tensor: next(_other_values(tensor, vocabulary)))
    if isinstance(value, nn.Module):
        from qlens.losses.stubs.trainers import Companion

        if isinstance(value, Companion) and value.logits is not None:
            yield from (Companion(value.field, other) for other in _other_values(value.logits, vocabulary))
    if not isinstance(value, Tensor):
        return
    draw = torch.Generator().manual_seed(17)
    random = torch.rand(value.shape, generator=draw, dtype=torch.float64)
    if value.dtype == torch.bool:
        yield from (~value, random < 0.5, torch.zeros_like(value), torch.ones_like(value))
    elif value.is_floating_point():
        yield from (value * (0.5 + 2.5 * random).to(value), -value, torch.zeros_like(value))
    elif not value.ndim:
        yield 3 * value
    elif bool(((value == 0) | (value == 1)).all()):
        yield from (1 - value, (random < 0.5).to(value), torch.zeros_like(value))
    else:
        yield torch.where(value == IGNORE, value, (value + 7) % vocabulary)
        yield torch.where(random < 0.5, IGNORE, value)


def _with_other(tokens: Tokens, name: str) -> Iterator[Tokens]:
    """The tokens with other values of one field."""
    value = getattr(tokens, name)
    vocabulary = tokens.logits.shape[1]
    if name in ("sequence", "pair"):
        alternatives = iter((torch.zeros_like(value), torch.arange(len(value)), value // 2))
    elif name == "negatives":
        alternatives = (other.scatter(1, tokens.labels[:, None], False) for other in _other_values(value, vocabulary))
    elif name in MODELS:
        alternatives = iter((value.flip(0) + value.roll(1, 1),))
    else:
        alternatives = _other_values(value, vocabulary)
    for other in alternatives:
        try:
            yield tokens.replace(**{name: other})
        except Exception:  # no such tokens: half a pair, say
            continue


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"
