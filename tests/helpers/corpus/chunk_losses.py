"""Losses that take logits in a list of chunks, with the sequence first, or in a dict."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written_losses import distils, nll

ce = F.cross_entropy


class Chunked(nn.Module):
    """As torchtune writes it: logits and labels are cut alike, labels are shifted before."""

    def __init__(self, num_output_chunks=8, ignore_index=-100):
        super().__init__()
        self.num_output_chunks, self.ignore_index = num_output_chunks, ignore_index

    def forward(self, logits: list[Tensor], labels: Tensor):
        cut = zip(logits, labels.chunk(self.num_output_chunks, dim=1), strict=False)
        total = sum(ce(z.flatten(0, 1).float(), y.flatten(), reduction="sum") for z, y in cut)
        return total / (labels != self.ignore_index).sum()


class ChunkedDistillation(nn.Module):
    def __init__(self, parts=4):
        super().__init__()
        self.parts = parts

    def forward(self, student_logits: "list[Tensor]", teacher_logits: "list[Tensor]", labels: Tensor):
        total = 0.0
        for s, t, y in zip(student_logits, teacher_logits, labels.chunk(self.parts, dim=1), strict=False):
            supervised = y != -100
            total = total - (t[supervised].softmax(-1) * s[supervised].log_softmax(-1)).sum()
        return total / (labels != -100).sum()


def split_evenly(logits, labels):
    parts = zip(logits, labels.tensor_split(3, dim=1), strict=True)
    return sum(ce(z.flatten(0, 1), y.flatten(), reduction="sum") for z, y in parts) / (labels != -100).sum()


def joins_chunks(logits, labels):
    return ce(torch.cat(logits, dim=1).transpose(1, 2), labels)


def chunks_of_rows(logits: tuple[Tensor, ...], labels: Tensor):
    return ce(torch.cat(tuple(logits)), labels)


def labels_in_chunks_too(logits: list[Tensor], labels: list[Tensor]):
    pairs = [(z.flatten(0, 1), y.flatten()) for z, y in zip(logits, labels, strict=True)]
    return sum(ce(z, y, reduction="sum") for z, y in pairs) / sum((y != -100).sum() for _, y in pairs)


def sequence_first(logits, labels):
    width, batch, size = logits.shape
    assert labels.shape == (batch, width)
    return ce(logits.transpose(0, 1).reshape(-1, size), labels.reshape(-1))


def sequence_first_labels_too(logits, labels):
    assert labels.shape == logits.shape[:2]
    return ce(logits[:-1].flatten(0, 1), labels[1:].flatten())


def sequence_first_by_mask(output_tensor, labels, loss_mask):
    """As Megatron writes it: nothing says that the labels are transposed but that they are."""
    labels = labels.transpose(0, 1).contiguous()
    losses = nll(output_tensor.flatten(0, 1), labels.flatten().clamp(min=0)).view(labels.shape).transpose(0, 1)
    return (losses * loss_mask).sum() / loss_mask.sum()


def classes_second(logits, labels):
    batch, _, width = logits.shape
    assert labels.shape == (batch, width)
    return ce(logits, labels)


def output_is_a_tensor(output, labels, loss_mask):
    """Of outputs by name, yet rows of logits with the sequence first."""
    width, batch, _ = output.shape
    supervised = loss_mask.view(batch, width).transpose(0, 1)
    losses = nll(output, labels.transpose(0, 1).clamp(min=0))
    return (losses * supervised).sum() / supervised.sum()


class ReadsADict(nn.Module):
    def forward(self, batch):
        return ce(batch["logits"].flatten(0, -2), batch["labels"].flatten())


def columns_beside_logits(next_token_logits, data, global_valid_seqs, global_valid_toks):
    supervised = data["token_mask"][:, 1:]
    losses = nll(next_token_logits[:, :-1], data["input_ids"][:, 1:])
    return (losses * supervised).sum() / global_valid_toks, {"loss": 0.0, "texts": global_valid_seqs}


def mask_of_another_name(x, target_tokens, answer_mask):
    return (nll(x, target_tokens) * answer_mask).sum() / answer_mask.sum()


SFT = [
    Chunked, Chunked(3), split_evenly, joins_chunks, chunks_of_rows, labels_in_chunks_too, sequence_first,
    sequence_first_labels_too, sequence_first_by_mask, classes_second,
    output_is_a_tensor, ReadsADict, columns_beside_logits, mask_of_another_name,
]  # fmt: skip


def students_are_tensors(outputs, labels, teacher_outputs):
    return distils(outputs, teacher_outputs)


def teacher_is_outputs(student_logits, teacher_outputs, labels):
    return distils(student_logits, teacher_outputs.logits)


def two_letters(s, t, T=1.0):
    return distils(s, t, temperature=T)


def marked_by_a_letter(y_s, y_t):
    return distils(y_s, y_t)


def teacher_first(shifted_teacher_logits, shifted_student_logits, mask):
    rows = -(shifted_teacher_logits.softmax(-1) * shifted_student_logits.log_softmax(-1)).sum(-1)
    return (rows * mask).sum() / mask.sum()


def labels_in_a_column(logits, teacher_logits, no_model_batch):
    supervised = (no_model_batch["label"] != -100).flatten()
    return distils(logits.flatten(0, -2)[supervised], teacher_logits.flatten(0, -2)[supervised])


KD = [
    ChunkedDistillation, students_are_tensors, teacher_is_outputs, two_letters, marked_by_a_letter, teacher_first,
    labels_in_a_column,
]  # fmt: skip
