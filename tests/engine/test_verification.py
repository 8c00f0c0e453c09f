"""Verification of user methods before the engine trains by their cards: inputs, row dependence, draws and pairs."""

import logging

import pytest
import torch
from cases import case
from tiny_models import llama, trainer_in
from tiny_models import rows as examples
from torch.testing import assert_close
from user_methods import compare, hidden_and_head, user_method

import qlens
from qlens import Target, Tokens, fused_loss
from qlens.core.errors import InputError


def mean_weighted(tokens):
    weight = tokens.label_probs.detach()
    return -tokens.label_log_probs * weight / weight.mean()


def by_rows(tokens):
    return -tokens.label_log_probs / len(tokens)


def hardest(logits, labels):
    rows = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return rows * (rows >= rows.detach().quantile(0.8))


def neighbours(tokens):
    return -tokens.label_log_probs * (1 + 0.5 * tokens.label_probs.detach().roll(1))


@pytest.mark.parametrize("loss", [mean_weighted, by_rows, hardest, neighbours])
def test_dependent_rows_are_not_chunked(loss, caplog):
    variant = user_method(loss=loss, name=loss.__name__, scope="token")
    with caplog.at_level(logging.WARNING, "qlens"):
        compare(variant, 5000, chunk=5)
        compare(variant, 5000, chunk=5)
    (line,) = caplog.messages
    assert "declare scope='batch'" in line and loss.__name__ in line


def test_row_dependence_within_a_sequence_is_found_in_long_batches(caplog):
    """However few rows are taken at a time, and although an earlier, shorter batch of the same method was cut."""

    def over_its_sequence(tokens):
        weight, index = tokens.label_probs.detach(), tokens.sequence
        sums = torch.zeros(int(index.max()) + 1, dtype=weight.dtype).index_add(0, index, weight)
        return -tokens.label_log_probs * weight / sums[index]

    def after_its_sequence_began(tokens):
        p, same = tokens.label_probs.detach(), tokens.sequence[1:] == tokens.sequence[:-1]
        return -tokens.label_log_probs * (1 + torch.cat([torch.zeros(1, dtype=p.dtype), p[:-1] * same]))

    for loss in (over_its_sequence, after_its_sequence_began):
        variant = user_method(loss=loss, scope="token")
        for n, chunk in ((200, 5), (200, 63), (1200, None)):
            compare(variant, 2000, n=n, chunk=chunk)
    assert len(caplog.messages) >= 2 and all("declare scope='batch' (or 'sequence'" in each for each in caplog.messages)


def test_a_declared_batch_statistic_uses_whole_logits_and_logs_it(caplog, tmp_path):
    """By the engine as by QTrainer, which say so in the same words, and train by the same gradient."""
    declared = user_method(loss=mean_weighted, name="declared", scope="batch")
    reason = "it weighs tokens by a statistic of whole distributions (scope 'batch')"
    for variant in (declared, qlens.get("mile")):
        with caplog.at_level(logging.WARNING, "qlens"):
            compare(variant, 5000, chunk=5)
            compare(variant, 5000, chunk=5)
            trainer_in(tmp_path, variant, model=llama(), eval_dataset=examples(4)).evaluate()
        assert caplog.messages == [
            f"qlens holds the logits of a batch whole for {variant.spec}: {reason}",
            f"qlens holds whole logits for {variant.spec}: {reason}",
        ]
        caplog.clear()


def test_a_reducing_loss_is_chunked_without_a_log_line(caplog):
    for reduction in ["mean", "sum", "none"]:
        with case(reduction):
            assert_cut_silently(reduction, caplog)


def assert_cut_silently(reduction, caplog):
    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)

    with caplog.at_level(logging.WARNING, "qlens"):
        compare(user_method(loss=loss, scope="token"), 5000, chunk=5)
    assert not caplog.messages


def test_a_loss_without_a_scope_uses_whole_logits(caplog):
    """Alone, whatever its first batches show: here no row depends on another before there are more than a thousand."""

    def hardest_thousand(tokens):
        losses, n = -tokens.label_log_probs, len(tokens)
        return losses if n <= 1000 else losses * (losses >= losses.detach().topk(1000).values[-1])

    variant = user_method(loss=hardest_thousand, name="hardest")
    for n in (600, 1600):
        compare(variant, 100, n=n, chunk=50)
    assert caplog.messages == [
        "qlens holds the logits of a batch whole for hardest: a loss of your own may look at all of them together; if it does "
        "not, register it with scope='token'"
    ]


def at_least_a_hundred(tokens):
    losses = tokens.label_log_probs.detach().neg()
    return (losses >= losses.topk(min(len(losses), max(100, len(losses) // 4))).values[-1]).double()


def over_its_mean(tokens):
    critical = tokens.critical.double() + 0.1
    return critical / critical.mean()


def normalised(tokens):
    a = tokens.advantage
    return (a - a.mean()) / (a.std() + 1e-6)


def test_row_dependence_not_visible_in_the_first_batch_is_found():
    for weight in [at_least_a_hundred, over_its_mean, normalised]:
        for form in ["target", "loss"]:
            with case(weight, form):
                assert_right_on_two_batches(weight, form)


def assert_right_on_two_batches(weight, form):
    """Rows are tried on random fields too, and more of them than most losses ask for: a verdict is not a first batch's luck."""

    def target(tokens):
        return Target.push(tokens, weight(tokens))

    def printed(tokens):
        return -weight(tokens) * tokens.label_log_probs

    alone = {"loss": printed, "scope": "token"}
    variant = user_method(target, printed) if form == "target" else user_method(**alone)
    draw = torch.Generator().manual_seed(0)
    mixed = {"critical": torch.rand(400, generator=draw) < 0.3, "advantage": torch.randn(400, generator=draw).double()}
    same = {"critical": torch.ones(400), "advantage": torch.zeros(400).double()}
    hidden, head, labels = hidden_and_head(50, 400)
    for fields in (same, mixed):
        value = fused_loss(variant, hidden, head, labels, chunk=50, **fields)
        tokens = Tokens(logits=hidden @ head.T, labels=labels, **fields)
        whole = printed(tokens).mean()
        assert_close(value, whole)
        for got, expected in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
            assert_close(got, expected)


def test_undeclared_fields_reach_a_method_of_any_structure():
    def advantaged(tokens):
        label = -tokens.label_log_probs
        return label if tokens.advantage is None else label * tokens.advantage

    hidden, head, labels = hidden_and_head(60, 20)
    advantage = torch.linspace(-1, 1, 20, dtype=torch.float64)
    tokens = Tokens(logits=(hidden @ head.T).detach(), labels=labels, advantage=advantage)
    for structure in ("dense", "label"):
        variant = user_method(loss=advantaged, structure=structure)
        value = fused_loss(variant, hidden, head, labels, advantage=advantage, chunk=7)
        assert_close(value.detach(), variant.loss(tokens).mean())


def test_a_chunk_whose_rows_are_all_skipped_has_no_gradient():
    def skipping(tokens):
        mask = tokens.label_probs.detach() > 0.05
        return -tokens.label_log_probs * mask if bool(mask.any()) else torch.zeros(len(tokens))

    compare(user_method(loss=skipping), 300, chunk=1)
    with pytest.raises(InputError, match="without a graph"):
        compare(user_method(loss=lambda tokens: -tokens.label_log_probs.detach()), 300)
    with pytest.raises(InputError, match="returns float"):
        compare(user_method(loss=lambda tokens: 0.0), 300)


def test_a_random_target_agrees_with_its_loss():
    def drawn_target(tokens):
        return Target.mix(tokens, 1.0, "student", scale=torch.rand(len(tokens), dtype=tokens.logits.dtype))

    def drawn_loss(tokens):
        return -tokens.label_log_probs * torch.rand(len(tokens), dtype=tokens.logits.dtype)

    for variant in (user_method(drawn_target), user_method(loss=drawn_loss, structure="label")):
        hidden, head, labels = hidden_and_head(50, 30)
        torch.manual_seed(3)
        whole = variant.loss(Tokens(logits=hidden @ head.T, labels=labels)).mean()
        torch.manual_seed(3)
        value = fused_loss(variant, hidden, head, labels)
        for got, expected in zip(*(torch.autograd.grad(v, (hidden, head)) for v in (value, whole)), strict=True):
            assert_close(got, expected)


def test_a_loss_of_pairs_is_verified_on_both_texts_of_a_pair():
    hidden, head, labels = hidden_and_head(50, 200)
    at = torch.arange(200)
    fields = {"pair": at // 10, "chosen": at % 10 < 5}
    printed = qlens.get("dpo").loss

    variant = user_method(
        loss=lambda tokens: printed(tokens), structure="label", scope="pair", needs=qlens.get("dpo").needs
    )
    fields["reference"] = torch.zeros(200, 50, dtype=torch.float64)
    values = [fused_loss(each, hidden, head, labels, **fields).detach() for each in (variant, "dpo")]
    assert_close(*values)


def test_a_loss_in_low_precision_is_verified():
    def products(tokens):
        return -torch.einsum("nv,nv->n", tokens.one_hot, tokens.log_probs)

    hidden, head, labels = (x.detach() for x in hidden_and_head(50, 20))
    leaves = hidden.float().requires_grad_(), head.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, sft = (fused_loss(m, *leaves, labels) for m in (user_method(loss=products, structure="label"), "sft"))
    assert_close(value.detach(), sft.detach())


def test_inference_mode_matches_no_grad(tmp_path):
    """fused_loss, an evaluation of QTrainer, targets and the lens: none of them needs the caller's mode."""

    def target(tokens):
        return Target.mix(tokens, tokens.label_probs, "student")

    def printed(tokens):
        return -tokens.label_log_probs * tokens.label_probs.detach()

    def rows(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)

    hidden, head, labels = (value.detach() for value in hidden_and_head(300, 20))
    of_tokens = {"target": target, "loss": lambda tokens: -tokens.label_log_probs}
    methods = {name: user_method(**{name: fn}, scope="token") for name, fn in of_tokens.items()}
    methods |= {"both": user_method(target, printed), "rows": user_method(loss=rows, scope="token"), "bare": rows}
    methods |= {"label": user_method(loss=of_tokens["loss"], structure="label"), "built-in": "dft"}
    for name, method in methods.items():
        values, nll = [], []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                values += [fused_loss(method, hidden * 1, head * 1, labels, chunk=chunk) for chunk in (None, 5)]
                if name in ("both", "bare", "built-in"):
                    trainer = trainer_in(tmp_path, method, model=llama(), eval_dataset=examples(4))
                    nll.append(trainer.evaluate()["eval_loss"])
        assert_close(torch.stack(values), values[-1].expand(4), msg=name)
        assert not nll or nll[0] == nll[1] != 0
    variant = methods["rows"]
    with torch.inference_mode():
        tokens = Tokens(logits=hidden @ head.T, labels=labels * 1)
        assert qlens.check(rows).ok and qlens.explain(rows, tokens).nearest[0].spec == "sft"
        inside = [variant.target(tokens).q, qlens.implied_target(rows, tokens).q, qlens.get("sft").target(tokens).q]
    for q in inside:
        assert_close(q, qlens.get("sft").target(tokens).q)
    assert_close(variant.loss(tokens).sum(), qlens.get("sft").loss(tokens).sum())


def test_row_dependence_only_in_large_batches_is_found(caplog, monkeypatch):
    """Over more rows than any sample has, also where an earlier, smaller batch was cut, and on a part of the vocabulary."""

    def normalised_where_many(tokens):
        weight = tokens.label_probs.detach()
        return -tokens.label_log_probs * (weight / weight.mean() if len(weight) > 1500 else 1.0)

    def after_many_rows(tokens):
        weight = tokens.label_probs.detach()
        return -tokens.label_log_probs * (1 + torch.cat([weight.new_zeros(1500), weight])[: len(weight)])

    def only_the_first(tokens):
        number = torch.arange(len(tokens), device=tokens.logits.device)
        return -tokens.label_log_probs * (1 - 0.5 * (number >= 1400))

    for loss, entries in ((normalised_where_many, 2**20), (after_many_rows, 2**16), (only_the_first, 2**16)):
        monkeypatch.setattr("qlens.engine.verification.row_dependence.BATCH_ENTRIES", entries)
        variant = user_method(loss=loss, scope="token")
        for n in (1400, 1800):
            compare(variant, 300, n=n, chunk=200)
    assert len(caplog.messages) == 3


def test_row_dependence_is_found_at_a_fixed_vocabulary(monkeypatch):
    def far_apart(tokens):
        assert tokens.logits.shape[1] == 300
        weight = tokens.label_probs.detach()
        return -tokens.label_log_probs * (1 + torch.cat([weight.new_zeros(700), weight])[: len(weight)])

    monkeypatch.setattr("qlens.engine.verification.row_dependence.BATCH_ENTRIES", 2**18)
    monkeypatch.setattr("qlens.engine.verification.row_dependence.TRIAL_ENTRIES", 2**16)
    compare(user_method(loss=far_apart, scope="token"), 300, n=1200, chunk=200)
