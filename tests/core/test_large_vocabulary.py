"""Targets at vocabularies of 32,000 to 250,000 entries, in float32 and bfloat16, against float64 of the same logits."""

import pytest
import torch
import torch.nn.functional as F
from real_model import smollm2
from tiny_models import llama, rows, steps_of, trainer_in
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlens
from qlens.analysis.plots.target_data import text_frame
from qlens.core.numerics import log_softmax
from qlens.core.supervised import IGNORE
from qlens.core.target import Target
from qlens.core.tokens import MODELS, Tokens
from qlens.training.metrics import MetricSums

V = 32_000
FIGURES = ("total", "negative_mass", "label_weight", "trust", "pull", "room", "reshape", "entropy", "kl", "q")
TOLERANCE = 2e-5  # of max(1, |figure|)
# A sign at ties of p and teacher; a trust within 1e-9 of 1; odds 1 / (1 - P), whose P is near 1.
WIDER = {"tvd": 1e-2, "gift": 1e-3, "asft_absolute": 5e-4, "orpo": 5e-4}
PROBS = (1e-12, 1 - 1e-7, 0.3, None, 1e-3, None, None, None)
SPREADS = (6.0, 2.0, 0.1, 4.0, 2.0, 0.1, 2.0, 6.0)


def world(dtype=torch.float32, size: int = V, hidden: bool = True, seed: int = 0) -> Tokens:
    """Flat and peaked rows with p_y from 1e-12 to 1 - 1e-7; ``hidden``: 200 entries at -1e30 and 100 at -inf."""
    draw, count = torch.Generator().manual_seed(seed), len(PROBS)
    base, other = (torch.randn(count, size, generator=draw) for _ in range(2))
    labels = torch.randint(size - 500, (count,), generator=draw)
    spreads = torch.tensor(SPREADS)[:, None]
    logits = {"logits": base * spreads}
    for number, p in enumerate(PROBS):
        if p is not None:
            row, y = logits["logits"][number], labels[number]
            rest = row.double().index_fill(0, y, -torch.inf).logsumexp(-1)
            row[y] = float(rest + torch.logit(torch.tensor(p, dtype=torch.float64)))
    for number, name in enumerate(MODELS):
        logits[name] = 0.7 * logits["logits"] + 0.7 * spreads * other.roll(number, 1)
    for name in logits if hidden else ():
        logits[name][:, -200:] = -1e30
        logits[name][:, -400:-300] = -torch.inf
    sequence = torch.arange(count) // 2
    fields = dict(
        sequence=sequence,
        pair=sequence // 2,
        chosen=sequence % 2 == 0,
        critical=torch.arange(count) % 3 > 0,
        hint=torch.arange(count) % 2 > 0,
        advantage=torch.linspace(-1, 2, count),
        negatives=(other < -3).scatter(1, labels[:, None], False),
    )
    return Tokens(labels=labels, **{name: value.to(dtype) for name, value in logits.items()}, **fields)


def double(tokens: Tokens) -> Tokens:
    """The same numbers in float64."""
    floating = {name: value.double() for name, value in tokens.fields().items() if value.is_floating_point()}
    return tokens.replace(**floating)


def distance(value, exact) -> float:
    """The largest difference, as a share of max(1, |exact|), where both are numbers and within reach of float32."""
    value, exact = value.double(), exact.double()
    comparable = exact.isfinite() & value.isfinite() & (exact.abs() < 1e6)
    return float(((value - exact).abs() / exact.abs().clamp(min=1))[comparable].max()) if comparable.any() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_all_metrics_of_every_method_are_those_of_float64(dtype):
    tokens = world(dtype)[:4] if dtype == torch.bfloat16 else world(dtype)
    exact_tokens = double(tokens)
    for name in qlens.names():
        actual, exact = (qlens.get(name).target(each).at("unit") for each in (tokens, exact_tokens))
        for figure in FIGURES:
            off = distance(getattr(actual, figure), getattr(exact, figure))
            assert off <= WIDER.get(name, TOLERANCE), f"{name}: {figure} is off by {off:.2g}"
        assert torch.equal(actual.shift_invariant, exact.shift_invariant), name
        clear = (exact.negative_mass == 0) | (exact.negative_mass > 1e-4)
        assert torch.equal(actual.in_simplex[clear], exact.in_simplex[clear]), name
        assert torch.equal(actual.entropy.isnan(), ~actual.in_simplex), name
        wider = max(WIDER.get(name, 0), 1e-3)
        assert_close(actual.at("natural").scale.double(), exact.at("natural").scale, rtol=wider, atol=1e-5, msg=name)
        assert bool((actual.at("natural").in_simplex | ~actual.shift_invariant).all()), name


def test_log_probabilities_sum_to_one_at_any_size():
    for size in (50_000, 250_000):
        logits = 4 * torch.randn(4, size, generator=torch.Generator().manual_seed(0))
        log_p = log_softmax(logits)
        assert float((log_p.double().exp().sum(-1) - 1).abs().max()) < 1e-6
        assert_close(log_p.double(), log_softmax(logits.double()), rtol=1e-6, atol=1e-6)
        assert bool((log_p <= 0).all())


def test_log_softmax_has_the_gradients_of_torch():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(15.0).view(3, 5)
    grads = [
        torch.autograd.grad((f(logits) * weights).sum(), logits)[0] for f in (log_softmax, lambda z: z.log_softmax(-1))
    ]
    assert_close(*grads)
    assert log_softmax(logits[0]).shape == (5,) and log_softmax(logits[:0]).shape == (0, 5)


def test_exact_metrics_have_no_rounding():
    tokens = world()
    nll = -qlens.get("sft").target(tokens).label_log_probs
    assert_close(nll.double(), -double(tokens).label_log_probs, rtol=2e-6, atol=0)
    one, zero = torch.ones(len(tokens)), torch.zeros(len(tokens))
    for target in (qlens.get("sft").target(tokens), Target.push(tokens, 1.0), Target.mix(tokens, 0.5, "student", 2.0)):
        target = target.at("unit")
        exact = dict(total=one, negative_mass=zero, entropy=zero, kl=nll, label_weight=one, reshape=zero)
        for figure, value in exact.items():
            assert torch.equal(getattr(target, figure), value), figure
        assert torch.equal(target.q, tokens.one_hot) and torch.equal(target.pull, target.room)
        assert bool(target.in_simplex.all() and target.shift_invariant.all())
    still = Target.push(tokens, 0.0)
    assert torch.equal(still.kl, zero) and torch.equal(still.pull, zero) and not bool(still.grad.any())
    assert torch.equal(qlens.get("dft").target(tokens).at("natural").q, tokens.one_hot)


def test_only_mixtures_of_distributions_are_in_the_simplex():
    tokens = world(hidden=False)
    residuals = (
        "student",
        "uniform",
        tokens.log_probs_of("teacher").exp(),
        tokens.log_probs_of("teacher").exp().bfloat16(),
    )
    for residual in residuals:
        for trust in (0.0, 0.3, 1.0):
            for scale in (0.25, 1.0):
                target = Target.mix(tokens, trust, residual, scale).at("unit")
                assert bool(target.in_simplex.all()) and not bool(target.negative_mass.any())
                assert bool(target.entropy.isfinite().all() and target.kl.isfinite().all())
        assert not bool(Target.mix(tokens, 1.01, residual).in_simplex.any())
    with pytest.raises(qlens.InputError, match="residual must be probabilities .* sums to 0.9"):
        Target.mix(tokens, 0.3, 0.9 * residuals[2])


def test_given_probabilities_are_checked_at_their_precision():
    tokens = world(hidden=False)
    teacher = tokens.log_probs_of("teacher").exp()
    for q in (teacher, teacher.bfloat16(), teacher.half(), teacher.double()):
        assert bool(Target.dense(tokens, q).in_simplex.all()), q.dtype
    assert not bool(Target.dense(tokens, 0.999 * teacher).in_simplex.any())
    least = tokens.logits.argmin(-1, keepdim=True)
    signed = Target.dense(tokens, teacher.scatter(1, least, -1e-7))
    assert_close(signed.negative_mass, torch.full((len(tokens),), 1e-7), rtol=1e-3, atol=0)
    assert not bool(signed.in_simplex.any()), "one entry 1e-7 below zero is no rounding"


def test_rounding_is_reported_neither_as_signed_nor_as_raw_logits():
    right = {
        "sft": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
        "half of sft": lambda logits, labels: 0.5 * F.cross_entropy(logits.float(), labels, reduction="none"),
        "dft": lambda logits, labels: -(p := logits.softmax(-1).gather(1, labels[:, None])[:, 0]).detach() * p.log(),
        "in bfloat16": lambda logits, labels: F.cross_entropy(logits.bfloat16(), labels, reduction="none").float(),
    }
    for size in (V, 250_000):
        half = world(torch.bfloat16, size=size, hidden=False)[[2, 3, 4, 6]]
        for name, loss in right.items():
            for tokens in (half, half.upcast(), double(half)):
                target = qlens.implied_target(loss, tokens)
                assert bool(target.shift_invariant.all()), f"{name}, {size}: raw logits"
                assert bool(target.in_simplex.all()), f"{name}, {size}: signed by {target.negative_mass.max():.1g}"


def test_signed_targets_and_raw_logits_are_reported_at_large_vocabularies():
    tokens = world(hidden=False)[[2, 3, 4, 5, 6]]

    def z_loss(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") + 1e-4 * logits.logsumexp(-1).square()

    assert not bool(qlens.implied_target(z_loss, tokens).shift_invariant.any())
    weighted = qlens.implied_target(
        lambda logits, labels: 1.01 * F.cross_entropy(logits, labels, reduction="none"), tokens
    )
    assert bool(weighted.shift_invariant.all()) and not bool(weighted.in_simplex.any())
    for name in ("gem", "reverse_kl", "sft_kl"):
        exact = qlens.get(name).target(double(tokens)).at("unit")
        assert bool((exact.negative_mass > 0).any()), name
        actual = qlens.get(name).target(tokens).at("unit")
        assert torch.equal(actual.in_simplex, exact.in_simplex), name


def test_logged_means_are_those_of_float64_over_batches_of_any_size():
    class Alone:
        num_processes = 1

    tokens = world()
    for name in ("sft", "dft", "target_sft", "kd", "label_smoothing", "gem", "psft"):
        variant, means = qlens.get(name), []
        fields = ("logits", "labels", *variant.needs)
        needed = Tokens(**{field: value for field, value in tokens.fields().items() if field in fields})
        for each, parts in ((needed, (slice(0, 3), slice(3, 8))), (double(needed), (slice(0, 8),))):
            tally = MetricSums()
            for part in parts:
                tally.add_tokens(variant, each[part], variant.loss(each[part]))
            means.append(tally.means(Alone()))
        actual, exact = means
        assert actual["signed_share"] == exact["signed_share"], name
        comparable = {key: value for key, value in exact.items() if abs(value) < 1e6}
        assert {key: actual[key] for key in comparable} == pytest.approx(comparable, rel=2e-5, abs=2e-5), name
        if name in ("sft", "psft"):
            assert (actual["trust"], actual["target_entropy"], actual["ess"]) == (1, 0, 1) if name == "sft" else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_and_watching_at_this_size_log_exact_values(dtype, tmp_path):
    model, teacher = (llama(seed, vocab=V).to(dtype) for seed in (0, 1))
    watch = qlens.Watch(["sft", "dft", "target_sft", "kd"], rows(4), teacher=teacher, every=1, tokens=6)
    trainer = trainer_in(tmp_path, "sft", model=model, steps=1, eval_dataset=rows(4))
    trainer.add_callback(watch)
    trainer.train()
    log, metrics = steps_of(trainer)[0], trainer.evaluate()
    for trust, entropy, ess, signed in (
        (log["trust"], log["target_entropy"], log["ess"], log["signed_share"]),
        (metrics["eval_trust"], metrics["eval_target_entropy"], metrics["eval_ess"], metrics["eval_signed_share"]),
    ):
        assert (trust, entropy, ess, signed) == (1, 0, 1, 0)
    assert log["kl_target"] == pytest.approx(log["nll"], rel=1e-6)
    frame = watch.frame
    assert frame.notna().all().all() and (frame["negative_mass"] == 0).all()
    sft = frame[frame["variant"] == "sft"]
    assert (sft["entropy"] == 0).all() and (sft["trust"] == 1).all() and (sft["drift_kl"] == 0).all()
    assert (frame[frame["step"] == 0]["drift_kl"] == 0).all()


def test_means_over_distributions_say_how_many_tokens_are_left_out(tmp_path):
    def doubled(logits, labels):
        """Twice the loss on even labels, whose targets are signed."""
        return (1 + (labels % 2 == 0).to(logits)) * F.cross_entropy(logits, labels, reduction="none")

    examples = rows(4)
    metrics = trainer_in(tmp_path, doubled, steps=1, eval_dataset=examples).evaluate()
    labels = torch.tensor([label for row in examples for label in row["labels"][1:] if label != IGNORE])
    assert metrics["eval_signed_share"] == pytest.approx(float((labels % 2 == 0).double().mean()))
    assert 0 < metrics["eval_signed_share"] < 1
    assert metrics["eval_target_entropy"] == pytest.approx(0, abs=1e-5) and metrics["eval_kl_target"] > 0


@pytest.mark.real
def test_targets_on_a_chat_model_are_drawn_without_false_signs():
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = (
        "How many clips are 48 and half of 48?",
        "Half of 48 is <<48/2=24>>24, so there are <<48+24=72>>72 clips.\n#### 72",
    )
    tokens = Tokens.from_text(model, tokenizer, [row])
    tokens = tokens.replace(teacher=tokens.logits.roll(1, 0))
    for in_precision in (tokens, tokens.replace(logits=tokens.logits.bfloat16(), teacher=tokens.teacher.bfloat16())):
        frame = text_frame(["sft", "dft", "target_sft", "kd", "label_smoothing", "gem"], in_precision)
        proper = frame[frame["method"] != "gem"]
        assert proper.notna().all().all() and (proper["negative_mass"] == 0).all()
        assert (frame[frame["method"] == "sft"]["entropy"] == 0).all()
        assert (frame[frame["method"] == "gem"]["negative_mass"] > 0).any()
        exact = text_frame(["dft", "target_sft", "gem"], double(in_precision))
        for name in ("entropy", "kl", "negative_mass", "label_weight", "reshape"):
            values = frame[frame["method"].isin(["dft", "target_sft", "gem"])][name]
            assert values.to_numpy() == pytest.approx(exact[name].to_numpy(), rel=1e-4, abs=1e-5, nan_ok=True), name
