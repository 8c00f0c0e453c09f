"""Registering, naming and parameterising methods."""

import pytest
import torch
import torch.nn.functional as F

import qlens
from qlens.registry import params
from qlens.testing import random_tokens

pytestmark = pytest.mark.usefixtures("temporary_registry")


def test_names_are_sorted_and_hold_the_core_methods():
    names = qlens.names()
    assert list(names) == sorted(names)
    assert set(names) >= {"sft", "label_smoothing", "dft", "asft_anchored", "kd", "kd_hybrid", "target_sft"}


def test_three_forms_of_register():
    @qlens.register("mine_loss")
    def mine_loss(logits, labels, *, alpha=1.0):
        return alpha * F.cross_entropy(logits, labels)

    @qlens.register("mine_target", needs=("teacher",), title="Mine", paper="none")
    def mine_target(tokens, *, eta=0.5):
        return qlens.Target.mix(tokens, trust=1 - eta, residual=tokens.log_probs_of("teacher").exp())

    @qlens.register("mine_both", needs=("teacher",))
    def mine_both(tokens, *, eta=0.5):
        return mine_target(tokens, eta=eta)

    @mine_both.loss
    def mine_both_loss(tokens, *, eta):
        kl = F.kl_div(tokens.log_probs, tokens.log_probs_of("teacher"), reduction="none", log_target=True).sum(-1)
        return eta * kl - (1 - eta) * tokens.label_log_probs

    assert [qlens.get(n).derived for n in ("mine_loss", "mine_target", "mine_both")] == [True, False, False]
    tokens = random_tokens(6, 5)
    torch.testing.assert_close(
        qlens.get("mine_loss(alpha=0.5)").target(tokens).grad, 0.5 * (tokens.probs - tokens.one_hot)
    )
    hybrid = qlens.get("kd_hybrid").target(tokens)
    for name in ("mine_target", "mine_both"):
        torch.testing.assert_close(qlens.get(name).target(tokens).q, hybrid.q)
        torch.testing.assert_close(qlens.implied_target(name, tokens).q, hybrid.q)
    assert qlens.get("mine_target").title == "Mine"


def test_specs_round_trip():
    for spec in (
        "sft",
        "label_smoothing(epsilon=0.25)",
        "kd(temperature=2.0, square=True)",
        "asft_anchored(direction='reverse')",
    ):
        assert qlens.get(spec).spec == spec
    assert qlens.get("label_smoothing", epsilon=0.1).spec == "label_smoothing"
    assert qlens.get("label_smoothing(epsilon=0.3)", epsilon=0.2).params["epsilon"] == 0.2
    assert params.split_specs("a, b(x=1, y=(2, 3)),f.py:g(z='q,r')") == ["a", "b(x=1, y=(2, 3))", "f.py:g(z='q,r')"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("sftt", "Did you mean sft"),
        ("label_smoothing(eps=0.1)", r"no parameter 'eps' \(parameters: epsilon, over\)"),
        ("sft(x=1)", "it has none"),
        ("label_smoothing(epsilon=1.5)", r"epsilon = 1.5, but it must be in \[0, 1\]"),
        ("label_smoothing(epsilon=True)", "must be a finite number"),
        ("label_smoothing(epsilon='a')", "must be a finite number"),
        ("kd(temperature=0)", "must be in"),
        ("kd(square=1)", "must be a bool"),
        ("asft_anchored(direction='sideways')", "one of 'forward', 'reverse'"),
        ("kd(2.0)", "only name=value arguments"),
        ("kd(temperature=2.0", "does not read as"),
        ("kd(temperature=__import__('os'))", "does not read as"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("nowhere.py", "name the function in it, nowhere.py:FUNCTION"),
    ],
)
def test_bad_specs_are_refused(spec, says):
    with pytest.raises(qlens.InputError, match=says):
        qlens.get(spec)


def test_error_classes_derive_from_built_in_ones():
    with pytest.raises(KeyError):
        qlens.get("nope")
    with pytest.raises(TypeError):
        qlens.get("sft(x=1)")
    with pytest.raises(qlens.InputError, match="a spec is a string"):
        qlens.get(3)
    with pytest.raises(qlens.InputError, match="got int"):
        qlens.implied_target(3, random_tokens(2, 3))


def test_register_refuses_invalid_declarations():
    with pytest.raises(qlens.InputError, match="registered twice: .*dft.py.* and .*test_registry.py"):
        qlens.register("dft")(lambda tokens: tokens)
    with pytest.raises(qlens.InputError, match="must be an identifier"):
        qlens.register("my loss")
    with pytest.raises(qlens.InputError, match="unknown field 'tilte'"):
        qlens.register("x", tilte="")(lambda tokens: tokens)

    with pytest.raises(qlens.UnknownName, match="'techer'. Did you mean teacher"):
        qlens.register("x", needs=("techer",))(lambda tokens: tokens)

    @qlens.register("halves")
    def halves(tokens, *, a=1.0):
        return qlens.Target.mix(tokens, trust=a, residual="student")

    for other in (lambda tokens, *, b=1.0: tokens, lambda tokens, *, a=2.0: tokens, lambda tokens: tokens):
        with pytest.raises(qlens.InputError, match=r"different parameters.*def halves_loss\(tokens, \*, a\)"):
            halves.loss(other)


def test_loss_and_penalty_take_the_defaults_of_the_method():
    @qlens.register
    def powered(tokens, *, alpha=0.5, weight=2.0):
        return qlens.Target.push(tokens, weight * (alpha * tokens.label_log_probs.detach()).exp())

    @powered.loss
    def powered_loss(tokens, *, weight, alpha):
        return -weight * (alpha * tokens.label_log_probs).exp() / alpha

    @powered.penalty
    def powered_penalty(model, *, alpha, weight):
        return weight * next(model.parameters()).square().sum()

    tokens = random_tokens(5, 6)
    torch.testing.assert_close(powered_loss(tokens), powered_loss(tokens, alpha=0.5, weight=2.0))
    for spec in ("powered", "powered(alpha=1.5, weight=0.3)"):
        variant = qlens.get(spec)
        torch.testing.assert_close(qlens.implied_target(variant, tokens).q, variant.target(tokens).q)
    model = torch.nn.Linear(1, 1, bias=False)
    assert float(powered_penalty(model).detach()) == pytest.approx(2 * float(model.weight.detach().square()))


def test_missing_inputs_are_named():
    tokens = random_tokens(3, 4).replace(teacher=None)
    for ask in (qlens.get("target_sft").target, qlens.get("target_sft").loss):
        with pytest.raises(
            qlens.InputError,
            match=r"target_sft needs a teacher: give Tokens\(teacher=...\), on the command line --teacher",
        ):
            ask(tokens)


def test_functions_in_files(tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text(
        "def f(logits, labels, a=2.0):\n    return a * -logits.log_softmax(-1).gather(1, labels[:, None]).mean()\n"
    )
    variant = qlens.get(f"{file}:f(a=3.0)")
    assert variant.params == {"a": 3.0} and variant.spec == f"{file}:f(a=3.0)"
    tokens = random_tokens(4, 5)
    torch.testing.assert_close(variant.target(tokens).grad, 3 * (tokens.probs - tokens.one_hot))
    with pytest.raises(qlens.UnknownName, match="Did you mean f"):
        qlens.get(f"{file}:ff")
    file.write_text("import nonexistent_module_of_mine\n")
    with pytest.raises(qlens.InputError, match="my_loss.py could not be run: ModuleNotFoundError"):
        qlens.get(f"{file}:f")


def test_a_registered_method_in_a_file_can_be_read_again(tmp_path):
    file = tmp_path / "registers.py"
    text = (
        "import qlens\n\n@qlens.register('from_a_file')\ndef f(logits, labels):\n"
        "    return {}logits.log_softmax(-1).gather(1, labels[:, None]).mean()\n"
    )
    file.write_text(text.format("-"))
    assert qlens.get(f"{file}:f").name == "from_a_file"
    file.write_text(text.format("-2 * "))
    import os

    os.utime(file, ns=(1, 1))
    tokens = random_tokens(4, 5)
    torch.testing.assert_close(qlens.get(f"{file}:f").target(tokens).grad, 2 * (tokens.probs - tokens.one_hot))


def test_weights_multiply_loss_and_scale():
    tokens = random_tokens(3, 4)
    weight = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    variant = qlens.get("dft")
    weighted = tokens.replace(weight=weight)
    torch.testing.assert_close(variant.target(weighted).scale, weight)
    torch.testing.assert_close(variant.target(weighted).q, variant.target(tokens).q)
    torch.testing.assert_close(variant.loss(weighted), variant.loss(tokens) * weight)


def test_penalty_is_zero_unless_registered():
    model = torch.nn.Linear(2, 2)
    assert float(qlens.get("sft").penalty(model)) == 0.0

    @qlens.register("with_penalty")
    def with_penalty(logits, labels, *, weight=2.0):
        return F.cross_entropy(logits, labels)

    @with_penalty.penalty
    def squared(model, *, weight=2.0):
        return weight * sum(p.square().sum() for p in model.parameters())

    expected = 3 * sum(p.square().sum().item() for p in model.parameters())
    assert qlens.get("with_penalty(weight=3.0)").penalty(model).item() == pytest.approx(expected)


def test_a_scope_or_denominator_that_does_not_exist_is_refused():
    for card, says in (
        (
            {"scope": "tokens"},
            "scope must be 'token' or 'sequence' or 'pair' or 'batch' or 'parameters' .*, got 'tokens'",
        ),
        ({"denominator": "select"}, "denominator must be 'valid' or 'selected' .*, got 'select'"),
    ):
        with pytest.raises(qlens.InputError, match=says):
            qlens.register("misdeclared", **card)(lambda logits, labels: logits.sum())
    assert "misdeclared" not in qlens.names()


def test_every_field_of_a_card_is_checked_where_it_is_registered():
    """By type and value; and what a function of the parameters says, at their defaults."""
    wrong = [3, 3.5, b"x", (1,), {"a": 1}, object(), int, lambda: 3, lambda **_: 3, lambda **_: "misnamed", 1 + 2j]
    texts = ("title", "paper", "family", "trusted", "residual", "scale", "limits", "code", "where")
    functions = ("printed", "on_model", "on_start")
    chosen = ("scope", "denominator", "coupled", "structure", "simplex", "invariant")
    for field in (*texts, *functions, *chosen, "needs", "modes", "differences", "cites", "fn", "tilte"):
        for value in wrong if field not in functions else wrong[:6]:
            with pytest.raises(qlens.InputError, match=f"{field}|field of Tokens|references.bib"):
                qlens.register("misdeclared", **{field: value})(lambda tokens, *, a=1.0: tokens.label_log_probs)
    for card, says in (
        ({"structure": 3}, r"structure must be 'label', 'dense' or a GeometricMixture .*, got 3"),
        ({"needs": "teacher"}, r"needs must be names of fields of Tokens, like \('teacher',\) .*, got 'teacher'"),
        ({"simplex": 1}, "simplex must be True or False or None or a function of the parameters, got 1"),
        ({"structure": qlens.GeometricMixture("teacher")}, r"declare needs=\('teacher',\)"),
        (
            {"scope": lambda b: "token"},
            r"scope as a function raises TypeError: .*called with all parameters by name \(a\)",
        ),
    ):
        with pytest.raises(qlens.InputError, match=says):
            qlens.register("misdeclared", **card)(lambda tokens, *, a=1.0: tokens.label_log_probs)
    with pytest.raises(qlens.InputError, match="structure must be .* got 'lable'"):
        qlens.register("misdeclared", structure="lable")  # at once, before there is a function
    assert "misdeclared" not in qlens.names()


def test_a_function_of_the_parameters_is_checked_at_other_parameters_too():
    method = qlens.registry.registry._method(
        "at_two", lambda tokens, *, a=1: tokens.logits, scope=lambda a: ("", "token", 7)[a]
    )
    assert method.variant(a=1).scope == "token"
    with pytest.raises(qlens.InputError, match=r"register\('at_two'\): scope must be .*, got 7"):
        method.variant(a=2).scope  # noqa: B018


def test_decorators_refuse_what_is_no_function():
    method = qlens.registry.registry._method("decorated", lambda tokens: tokens.label_log_probs)
    for decorate in (qlens.register("misdeclared"), method.loss, method.penalty, method.start):
        for value in (3, None, "x"):
            with pytest.raises(qlens.InputError, match=f"decorates a function, got {value!r}"):
                decorate(value)
    with pytest.raises(qlens.InputError, match=r"write @qlens.register\('my_loss'\) above its def"):
        qlens.register(lambda tokens: tokens.label_log_probs)
    for exponent in ("half", None, float("nan")):
        with pytest.raises(qlens.InputError, match="GeometricMixture: own must be a finite number"):
            qlens.GeometricMixture("teacher", own=exponent)
