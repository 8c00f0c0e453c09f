"""Deprecation: old names work, and the warning names the new one and the line that uses the old one."""

import importlib
import sys

import pandas as pd
import pytest
import torch
from example_view import example_view

import qlens
from qlens.core.deprecation import MODULES, renamed_arguments, renamed_attributes, renamed_value, without_effect
from qlens.core.deprecation.columns import current_columns, renamed_columns
from qlens.testing import random_tokens


@pytest.mark.parametrize("old", MODULES)
def test_a_module_is_imported_by_its_old_name(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MODULES[old]) as warnings:
        __import__(old)
    assert warnings[0].filename == __file__
    names = {name: value for name, value in vars(importlib.import_module(MODULES[old])).items() if name[0] != "_"}
    assert names and all(getattr(sys.modules[old], name) is value for name, value in names.items())


def test_public_names_are_still_those_of_qlens():
    assert callable(qlens.probes) and callable(qlens.explain) and callable(qlens.destination)


def test_an_old_argument_warns_and_both_are_refused():
    @renamed_arguments(losses="variants")
    def draw(variants):
        return variants

    with pytest.warns(DeprecationWarning, match="variants="):
        assert draw(losses=["sft"]) == ["sft"]
    assert draw(["dft"]) == ["dft"]
    with pytest.raises(TypeError, match="not both"):
        draw(losses=["sft"], variants=["sft"])


def test_old_arguments_of_a_target_and_the_old_order_of_a_ranking_warn():
    tokens = random_tokens(3, 5)
    with pytest.warns(DeprecationWarning, match="push.push=. is deprecated; write label_weight="):
        old = qlens.Target.push(tokens, push=0.5)
    assert torch.equal(old.q, qlens.Target.push(tokens, 0.5).q)
    with pytest.warns(DeprecationWarning, match="slope.push=. is deprecated; write label_weight=") as warnings:
        old = qlens.Target.slope(tokens, tokens.probs, push=0.5)
    assert torch.equal(old.q, qlens.Target.slope(tokens, tokens.probs, label_weight=0.5).q)
    assert warnings[0].filename == __file__
    ranking = example_view().rank()
    with pytest.warns(DeprecationWarning, match="by='suspicion' is deprecated; write by='negative_margin'") as warnings:
        assert ranking.alike("suspicion") == ranking.alike("negative_margin")
    assert warnings[0].filename == __file__


def test_an_argument_without_effect_warns_and_is_left_out():
    @without_effect("colors")
    def draw(variants):
        return variants

    with pytest.warns(DeprecationWarning, match="draw.colors=. has no effect any more") as warnings:
        assert draw(["sft"], colors=3) == ["sft"]
    assert warnings[0].filename == __file__


def test_an_old_value_warns_at_the_line_that_uses_it():
    def draw(show):
        return renamed_value("show", show, {"trust": "label_weight"})

    with pytest.warns(DeprecationWarning, match="show='trust' is deprecated; write show='label_weight'") as warnings:
        assert draw("trust") == "label_weight"
    assert warnings[0].filename == __file__ and draw("kl") == "kl"


def test_an_old_attribute_warns_and_unknown_ones_do_not_exist():
    get = renamed_attributes("qlens.lab", {"LOOK": "qlens.core.errors.InputError"})
    with pytest.warns(DeprecationWarning, match=r"qlens\.core\.errors\.InputError"):
        assert get("LOOK") is qlens.InputError
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        get("other")


def test_an_old_column_warns_and_slices_are_plain_frames():
    frame = renamed_columns(pd.DataFrame({"label_weight": [0.5, 1.0], "p_y": [0.1, 0.2]}))
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert frame["trust"].tolist() == [0.5, 1.0]
    assert list(frame.columns) == ["label_weight", "p_y"] and frame["p_y"].sum() == pytest.approx(0.3)
    assert type(frame[frame["p_y"] > 0.1]) is pd.DataFrame
    with pytest.raises(KeyError):
        frame["other"]


def test_a_current_name_that_is_also_an_old_one_stays():
    ranks = pd.DataFrame({"worst": [3], "negative_margin_max": [0.5]})
    assert renamed_columns(ranks)["worst"].tolist() == [3] and current_columns(ranks) is ranks
    assert list(current_columns(pd.DataFrame({"q_rest": [0.5], "p_y": [0.1]}))) == ["q_runner_up", "p_y"]
