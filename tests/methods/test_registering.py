"""Registering without parentheses, registering again, and the reprs of methods."""

import importlib
import runpy
import types

import pytest
import torch
import torch.nn.functional as F

import qlens
from qlens.testing import random_tokens

pytestmark = pytest.mark.usefixtures("temporary_registry")


def test_register_without_brackets_takes_the_functions_name():
    @qlens.register
    def bare(logits, labels, *, alpha=1.0):
        return alpha * F.cross_entropy(logits, labels)

    @qlens.register(title="With a title")
    def titled(logits, labels):
        return F.cross_entropy(logits, labels)

    assert qlens.get("bare(alpha=2.0)").params == {"alpha": 2.0} and qlens.get("titled").title == "With a title"
    assert isinstance(bare, qlens.registry.Method)
    with pytest.raises(qlens.InputError, match=r"got .*lambda.*: write @qlens.register\('my_loss'\) above its def"):
        qlens.register()(lambda logits, labels: logits.sum())


CELL = """
import qlens
@qlens.register("from_a_cell")
def {name}(logits, labels):
    return {factor} * -logits.log_softmax(-1).gather(1, labels[:, None]).mean()
"""


def test_rerunning_a_cell_replaces_the_method_with_a_notice(tmp_path, caplog):
    cell, tokens = tmp_path / "cell.py", random_tokens(4, 5)
    for factor in (1.0, 3.0):
        cell.write_text(CELL.format(name="scaled", factor=factor))
        runpy.run_path(str(cell), run_name="a_notebook")
        grad = qlens.get("from_a_cell").target(tokens).grad
        torch.testing.assert_close(grad, factor * (tokens.probs - tokens.one_hot))
    (record,) = caplog.records
    assert f"'from_a_cell' replaces the method registered at {cell}:3" in record.getMessage()
    cell.write_text(CELL.format(name="another", factor=1.0))
    with pytest.raises(qlens.InputError, match="registered twice"):
        runpy.run_path(str(cell), run_name="a_notebook")


def test_at_a_prompt_any_function_replaces_a_method(monkeypatch):
    code = (lambda logits, labels: logits.sum()).__code__
    first, second = (types.FunctionType(code, {"__name__": "__main__"}, name) for name in ("first", "second"))
    second.__qualname__ = "second"
    monkeypatch.setattr("__main__.__file__", "script.py", raising=False)
    qlens.register("at_a_prompt")(first)
    with pytest.raises(qlens.InputError, match="registered twice"):
        qlens.register("at_a_prompt")(second)  # in a script it is a mistake
    monkeypatch.delattr("__main__.__file__")
    assert qlens.register("at_a_prompt")(second) is qlens.registry.methods()["at_a_prompt"]


def test_a_module_that_is_reloaded_registers_again(tmp_path, monkeypatch, caplog):
    (tmp_path / "my_methods.py").write_text(CELL.format(name="mine", factor=1.0))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_methods")
    importlib.reload(module)
    assert len(caplog.records) == 1 and qlens.registry.methods()["from_a_cell"] is module.mine


def test_the_reprs_of_methods_and_variants():
    variant = qlens.get("kd(temperature=2.0)")
    assert repr(variant) == "<Variant kd(temperature=2.0)>"
    assert repr(variant.method) == "<Method kd: Knowledge distillation>"
    html = qlens.get("asft_anchored")._repr_html_()
    assert "<th>trust</th><td>p_y / (p_y + weight)</td>" in html
    assert "p_y &lt;= " not in html and "&gt;= threshold" in qlens.get("profit").method._repr_html_()  # escaped
