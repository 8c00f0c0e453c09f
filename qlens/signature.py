"""Signatures: the parameters of a loss, and by their names the input that each one asks for."""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from qlens.errors import InputError

CALLERS = ("num_items_in_batch", "return_outputs")  # what a Trainer fills in, no parameters of the loss

# Names of the field, by the input they stand for: the first name that fits decides.
NAMES: dict[str, tuple[str, ...]] = {
    "tokens": ("tokens",),
    "logits": (
        "logits", "student_logits", "lm_logits", "policy_logits", "model_logits", "shift_logits", "output_logits", "logit",
        "s_logits", "logits_s", "logits_student", "new_logits", "pred", "preds", "prediction", "predictions", "y_pred", "y_hat",
        "yhat", "scores", "input",
    ),
    "outputs": ("outputs", "output", "model_output", "model_outputs", "student_outputs", "student_output"),
    "model": ("model", "student_model", "student", "policy", "policy_model", "net", "unwrapped_model"),
    "batch": ("inputs", "batch", "features", "batch_data", "mini_batch", "micro_batch"),
    "labels": (
        "labels", "label", "target", "targets", "y", "y_true", "true_labels", "lm_labels", "shift_labels", "target_ids", "gold",
        "golds", "label_ids", "target_labels", "gt", "ground_truth", "response_ids", "responses", "completion_ids", "token_ids",
        "ids",
    ),
    "input ids": ("input_ids",),
    "teacher": ("teacher", "teacher_logits", "t_logits", "logits_t", "logits_teacher", "target_logits", "shift_teacher_logits"),
    "reference": ("reference", "ref", "ref_logits", "reference_logits", "base_logits", "reference_model_logits"),
    "old": ("old", "old_logits", "old_policy_logits", "behavior_logits", "rollout_logits"),
    "second": ("second", "second_logits", "logits2", "logits_2"),
    "teacher model": ("teacher_model", "teacher_net", "frozen_teacher"),
    "reference model": ("ref_model", "reference_model", "base_model", "sft_model", "initial_model"),
    "teacher outputs": ("teacher_outputs", "teacher_output", "outputs_teacher"),
    "reference outputs": ("ref_outputs", "ref_output", "reference_outputs", "reference_output"),
    "log probs": (
        "log_probs", "log_prob", "logprobs", "logprob", "logps", "logp", "lprobs", "per_token_logps", "policy_logps",
        "policy_log_probs", "new_logprobs", "new_log_probs", "new_logps", "student_logprobs", "student_log_probs",
        "action_log_probs", "token_log_probs", "student_logps", "curr_logprobs", "current_logprobs",
    ),
    "old log probs": (
        "old_log_probs", "old_log_prob", "old_logprobs", "old_logps", "old_per_token_logps", "old_action_log_probs",
        "old_token_log_probs", "rollout_log_probs", "sampling_per_token_logps", "behavior_log_probs", "prev_logprobs",
    ),
    "reference log probs": (
        "ref_log_probs", "ref_log_prob", "ref_logprobs", "ref_logps", "ref_per_token_logps", "reference_logps",
        "reference_logprobs", "reference_log_probs", "base_action_log_probs", "log_probs_base", "ref_logp", "log_probs_ref",
        "reference_policy_logprobs",
    ),
    "teacher log probs": ("teacher_log_probs", "teacher_logprobs", "teacher_logps", "teacher_log_prob", "t_logprobs"),
    "probs": ("probs", "probabilities", "student_probs", "prob"),
    "teacher probs": ("teacher_probs", "target_probs", "teacher_probabilities", "soft_targets", "soft_labels", "target_dist"),
    "attention mask": ("attention_mask", "attn_mask", "input_mask"),
    "mask": (
        "mask", "loss_mask", "response_mask", "completion_mask", "action_mask", "label_mask", "labels_mask", "target_mask",
        "valid_mask", "token_mask", "padding_mask", "eos_mask", "masks", "loss_masks", "assistant_mask", "assistant_masks",
        "output_mask", "prediction_mask", "pad_mask",
    ),
    "weight": (
        "weight", "weights", "sample_weight", "sample_weights", "token_weight", "token_weights", "loss_weight", "loss_weights",
        "loss_scale", "label_weights", "importance_weights", "per_token_weights", "tok_weights",
    ),
    "advantage": ("advantage", "advantages", "reward", "rewards", "adv", "returns", "token_rewards", "scores_adv"),
    "critical": ("critical", "critical_mask"),
    "hint": ("hint", "hint_mask"),
    "sequence": ("sequence", "sequence_ids", "seq_ids", "document_ids"),
    "chosen": ("chosen",),
    "pair": ("pair",),
    "negatives": ("negatives",),
    "chosen log probs": ("policy_chosen_logps", "chosen_logps", "chosen_logprobs", "policy_chosen_log_probs", "pi_chosen",
                         "chosen_log_probs"),
    "rejected log probs": ("policy_rejected_logps", "rejected_logps", "reject_logps", "rejected_logprobs", "pi_rejected",
                           "policy_rejected_log_probs", "rejected_log_probs"),
    "reference chosen log probs": ("reference_chosen_logps", "ref_chosen_logps", "ref_chosen_logprobs", "ref_pi_chosen",
                                   "reference_chosen_log_probs", "ref_chosen_log_probs"),
    "reference rejected log probs": ("reference_rejected_logps", "ref_rejected_logps", "ref_reject_logps", "ref_pi_rejected",
                                     "ref_rejected_logprobs", "reference_rejected_log_probs", "ref_rejected_log_probs"),
    "count": (
        "num_items_in_batch", "num_items", "n_items", "batch_num_tokens", "num_tokens", "global_valid_tokens", "n_tokens",
        "num_valid_tokens", "total_tokens", "loss_denominator", "token_count", "normalizer", "denominator",
    ),
    "vocabulary": ("vocab_size", "vocab", "num_classes", "n_classes", "vocabulary_size", "padded_vocab_size"),
    "ignore": ("ignore_index", "ignore_id", "ignore_token_id", "label_pad_token_id", "pad_token_id", "pad_id", "padding_idx"),
    "temperature": ("temperature", "temp", "tau"),
    "return outputs": ("return_outputs",),
    "position ids": ("position_ids", "positions"),
}  # fmt: skip
ROLE = {name: role for role, names in NAMES.items() for name in names}

# A kernel that multiplies by the head itself takes hidden states, a head and labels, in some order, by some of these names.
KERNEL: dict[str, tuple[str, ...]] = {
    "logits": ("hidden", "hidden_states", "input", "_input", "x", "e", "student_hidden", "student_input"),
    "head": ("head", "weight", "lin_weight", "linear_weight", "lm_head_weight", "c", "student_head", "student_weight"),
    "labels": ("labels", "target", "targets", "true_labels"),
    "teacher": ("teacher_hidden", "teacher_input"),
    "reference": ("reference_hidden", "ref_hidden", "ref_input"),
    "teacher head": ("teacher_head", "teacher_weight"),
    "reference head": ("reference_head", "ref_weight"),
}

FIELD = {
    "teacher": "teacher", "reference": "reference", "old": "old", "second": "second", "weight": "weight",
    "advantage": "advantage", "critical": "critical", "hint": "hint", "sequence": "sequence", "chosen": "chosen",
    "pair": "pair", "negatives": "negatives",
    "teacher model": "teacher",
    "reference model": "reference", "teacher outputs": "teacher", "reference outputs": "reference",
    "old log probs": "old", "reference log probs": "reference", "teacher log probs": "teacher", "teacher probs": "teacher",
    "chosen log probs": "pair", "rejected log probs": "pair", "reference chosen log probs": "reference",
    "reference rejected log probs": "reference",
}  # fmt: skip
"""The field of Tokens that an input is made from, beside logits and labels."""

STUDENT = ("logits", "outputs", "model", "log probs", "probs", "chosen log probs", "tokens")
"""Inputs that carry the student's gradient: a loss has one of them."""


class Memo:
    """Values by callable, held as long as the callable lives, and keeping none alive."""

    def __init__(self):
        self._held: dict[tuple, tuple[weakref.ref, Any]] = {}

    def get(
        self, fn: Callable, name: Any, make: Callable[[], Any], lasting: Callable[[Any], bool] = lambda value: True
    ) -> Any:
        """The value under ``name``, made at the first call, and held if it is ``lasting``."""
        owner, part = _owner(fn)
        key = (id(owner), part, name)
        if key not in self._held:
            value = make()
            if not lasting(value):
                return value
            try:
                self._held[key] = (weakref.ref(owner, lambda _: self._held.pop(key, None)), value)
            except TypeError:  # a callable that takes no weak reference: nothing is held
                return value
        return self._held[key][1]


_SIGNATURES = Memo()


def signature(fn: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name; of a module, those of its forward."""
    return _SIGNATURES.get(fn, "signature", lambda: _signature(fn))


def _signature(fn: Callable) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        given = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters
    except (ValueError, TypeError) as error:
        raise InputError(f"{name_of(fn)}: its parameters cannot be read ({error}): wrap it in a function") from error
    found = {name: p for name, p in given.items() if p.kind not in variadic}
    if not found and given:  # f(*args): logits and labels, in this order
        kind = inspect.Parameter.POSITIONAL_ONLY
        return {name: inspect.Parameter(name, kind) for name in ("logits", "labels")}
    return found


class Inputs(NamedTuple):
    """What each parameter of a loss is filled with: ``required`` and ``optional`` by parameter, and the ``missing`` ones."""

    kind: str
    required: dict[str, str]
    optional: dict[str, str]
    missing: tuple[str, ...]


def inputs(fn: Callable) -> Inputs:
    """The input that each parameter asks for, by its name, or by its place where the name says nothing.

    Raises:
        InputError: there is no parameter that logits could be given to.
    """
    return _SIGNATURES.get(fn, "inputs", lambda: _inputs(fn))


def _inputs(fn: Callable) -> Inputs:
    params = signature(fn)
    bare = [name for name, p in params.items() if p.default is p.empty]
    kernel = {name: role for name in bare if (role := _kernel_role(name))}
    if {"logits", "head"} <= set(kernel.values()):
        return Inputs("hidden", kernel, {}, tuple(name for name in bare if name not in kernel))
    roles = {name: ROLE[name.lower().lstrip("_")] for name in params if name.lower().lstrip("_") in ROLE}
    if "reduction" in params:  # as in torch's own losses: a weight for each class, no weights of tokens
        roles = {name: role for name, role in roles.items() if role != "weight" or params[name].default is not None}
    _by_place(params, bare, roles)
    if "labels" not in roles.values():  # f(logits, input_ids): a text is its own labels
        roles |= {name: "labels" for name, role in roles.items() if role == "input ids"}
    students = [roles[name] for name in params if roles.get(name) in STUDENT]
    if not students:
        raise InputError(
            f"{name_of(fn)} takes no argument that logits can be given to: a loss takes tokens, logits and labels, outputs "
            "and labels, model and inputs, or hidden, head and labels"
        )
    kind = {"tokens": "tokens", "outputs": "outputs", "model": "model"}.get(students[0], "logits")
    if kind == "model":  # beside a model, a teacher is one too
        roles = {name: f"{role} model" if role in ("teacher", "reference") else role for name, role in roles.items()}
    if kind == "tokens":
        roles = {name: "tokens" if roles.get(name) == "tokens" else FIELD.get(roles.get(name, "")) for name in bare}
        roles = {name: role for name, role in roles.items() if role}
    needed = (*STUDENT, "labels", "batch")  # a default of None is no way to call a loss without these
    required = {name: roles[name] for name in bare if name in roles}
    for name, role in roles.items():
        if role in needed and params[name].default is None and role not in required.values():
            required[name] = role
    optional = {}
    for name, p in params.items():
        if name in roles and name not in required and p.default is None and roles[name] not in _LEFT:
            optional[name] = roles[name]
    if "labels" in required.values():  # a second name for labels is another way to give the same
        optional = {name: role for name, role in optional.items() if role != "labels"}
    return Inputs(kind, required, optional, tuple(name for name in bare if name not in roles))


_LEFT = (
    "vocabulary", "ignore", "temperature", "return outputs", "logits", "outputs", "model", "batch", "tokens",
    "position ids", "input ids",
)  # fmt: skip
"""Inputs that keep their default where they have one: it is the way that a loss is called without a Trainer."""


def _by_place(params: Mapping[str, inspect.Parameter], bare: list[str], roles: dict[str, str]) -> None:
    """Roles by place: what carries the student first, then labels, or the inputs of a model."""
    places = [name for name in bare if params[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    unknown = [name for name in places if name not in roles]
    if not any(roles.get(name) in STUDENT for name in params):
        second = roles.get(places[1]) if len(places) > 1 else None
        first = unknown[0] if unknown else None
        if first is None and places and roles[places[0]] in ("batch", "labels"):  # f(inputs, targets), f(x, y)
            first = places[0] if len(places) > 1 else None
        if first is None:
            return
        roles[first] = "model" if second == "batch" and first == places[0] else "logits"
        unknown = [name for name in unknown if name != first]
    student = next(name for name in params if roles.get(name) in STUDENT)
    if roles[student] == "model":
        if "batch" not in roles.values() and unknown:
            roles[unknown[0]] = "batch"
    elif roles[student] in ("logits", "outputs", "log probs", "probs") and "labels" not in roles.values():
        if unknown and places.index(unknown[0]) == 1:
            roles[unknown[0]] = "labels"


def _kernel_role(name: str) -> str | None:
    return next((role for role, names in KERNEL.items() if name in names), None)


def settings_of(fn: Any) -> tuple:
    """The strings and flags that a callable holds or refers to, such as "mean" or True: what may change what it does.

    Of a function its closure, defaults and the globals it names; of an object, or a bound method's object, its attributes;
    lists and dicts among them one level deep.
    """
    held: list[Any] = []
    if isinstance(fn, functools.partial):
        held += [*fn.args, fn.keywords, *settings_of(fn.func)]
    owner = fn.__self__ if inspect.ismethod(fn) else fn
    if not inspect.isfunction(owner):
        held.append(dict(getattr(owner, "__dict__", {})))
    code = inspect.unwrap(fn.__func__ if inspect.ismethod(fn) else fn)
    if inspect.isfunction(code):
        held += [*(code.__defaults__ or ()), code.__kwdefaults__ or {}]
        held += [code.__globals__[name] for name in code.__code__.co_names if name in code.__globals__]
        for cell in code.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
    found: list[Any] = []
    for value in held:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        found += [each for each in list(inner) if isinstance(each, str | bool) or each is None]
    return tuple(found)


def name_of(fn: Any) -> str:
    """What a callable is called in messages."""
    if isinstance(fn, functools.partial):
        return name_of(fn.func)
    return fn.__name__ if inspect.isroutine(fn) or inspect.isclass(fn) else type(fn).__name__


def _owner(fn: Callable) -> tuple[Any, str]:
    """What a callable lives in, and the part of it that is called: of a bound method its object."""
    if inspect.ismethod(fn):
        return fn.__self__, fn.__func__.__name__
    return fn, "forward" if isinstance(fn, nn.Module) else ""
