"""The input that a parameter of a loss, or a column of its batch, takes, by usual names."""

import re
from collections.abc import Collection

# Usual names, by the input that they stand for.
NAMES: dict[str, tuple[str, ...]] = {
    "tokens": ("tokens",),
    "logits": (
        "logits", "student_logits", "lm_logits", "policy_logits", "model_logits", "shift_logits", "output_logits", "logit",
        "s_logits", "logits_s", "logits_student", "new_logits", "pred", "preds", "prediction", "predictions", "y_pred", "y_hat",
        "yhat", "scores", "input",
    ),
    "outputs": ("outputs", "output", "model_output", "model_outputs", "student_outputs", "student_output"),
    "model": ("model", "student_model", "student", "policy", "policy_model", "net", "unwrapped_model"),
    "batch": (
        "inputs", "batch", "features", "batch_data", "mini_batch", "micro_batch", "data", "sample", "no_model_batch",
        "model_batch", "batch_dict", "data_dict", "minibatch",
    ),
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
        "global_valid_toks", "num_valid_toks", "num_loss_tokens", "num_label_tokens", "loss_num", "num_target_tokens",
        "global_batch_tokens", "n_valid_tokens", "valid_tokens", "num_loss_counted_tokens", "batch_num_loss_counted_tokens",
    ),
    "texts": (
        "global_valid_seqs", "num_sequences", "num_seqs", "global_batch_size", "batch_size", "bsz", "n_sequences",
        "num_samples", "num_texts",
    ),
    "vocabulary": ("vocab_size", "vocab", "num_classes", "n_classes", "vocabulary_size", "padded_vocab_size"),
    "ignore": ("ignore_index", "ignore_id", "ignore_token_id", "label_pad_token_id", "pad_token_id", "pad_id", "padding_idx"),
    "temperature": ("temperature", "temp", "tau"),
    "return outputs": ("return_outputs",),
    "position ids": ("position_ids", "positions"),
}  # fmt: skip
ROLE = {name: role for role, names in NAMES.items() for name in names}

# Names of the parameters of a kernel that multiplies by the head itself.
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
    "sampling old": "old", "sampling old log probs": "old",
    "old log probs": "old", "reference log probs": "reference", "teacher log probs": "teacher", "teacher probs": "teacher",
    "chosen log probs": "pair", "rejected log probs": "pair", "reference chosen log probs": "reference",
    "reference rejected log probs": "reference",
}  # fmt: skip
"""The field of Tokens that an input is computed from, beside logits and labels."""

STUDENT = ("logits", "outputs", "model", "log probs", "probs", "chosen log probs", "tokens", "dict")
"""Inputs of the student, of which a loss has one."""


def role_of(name: str) -> str | None:
    """The input that a column of a batch stands for."""
    return ROLE.get(name.lower()) or role_by_words(name, ())


MODEL_WORDS = {
    "teacher": {"teacher", "t", "tea", "tch"}, "reference": {"ref", "reference"},
    "old": {"old", "behavior", "behaviour", "rollout", "prev", "proximal", "prox"},
    "student": {"student", "s", "stu", "policy", "new", "current", "curr"},
}  # fmt: skip
LOGIT_WORDS = {"logits", "logit", "scores", "preds", "pred", "y", "z"}
LOG_PROB_WORDS = {"logps", "logp", "logprobs", "logprob", "lprobs"}


def role_by_words(name: str, parameters: Collection[str]) -> str | None:
    """The input that a name of several words stands for: shifted_teacher_logits, answer_mask, y_t, ...

    Args:
        name: of the parameter.
        parameters: names of all parameters: a ``t`` beside an ``s`` is the teacher's logits.
    """
    if name in ("s", "t") and {"s", "t"} <= set(parameters):
        return "logits" if name == "s" else "teacher"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    word_set = set(words)
    if len(words) < 2:
        return None
    model = next((model for model, model_words in MODEL_WORDS.items() if model_words & word_set), "")
    if word_set & LOG_PROB_WORDS or ("log" in word_set and word_set & {"probs", "prob"}):
        return "log probs" if model in ("", "student") else f"{model} log probs"
    if word_set & {"outputs", "output", "out"} and model in ("student", "teacher", "reference"):
        return "outputs" if model == "student" else f"{model} outputs"
    if word_set & LOGIT_WORDS and (model or "logits" in word_set):
        return "logits" if model in ("", "student") else model
    if word_set & {"probs", "prob"} and model in ("student", "teacher"):
        return "probs" if model == "student" else "teacher probs"
    if "mask" in word_set and not model:
        return (
            None
            if word_set & {"causal", "vocab", "special", "inf"}
            else "attention mask"
            if "attn" in word_set
            else "mask"
        )
    if word_set & {"weights", "weight"} and word_set & {"token", "tokens", "sample", "label", "labels", "loss", "seq"}:
        return "weight"
    return "labels" if word_set & {"labels", "label", "targets"} and not model else None
