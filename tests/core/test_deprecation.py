"""Deprecation: old names work, and the warning names the new one and the line that uses the old one."""

import importlib
import sys

import pandas as pd
import pytest

import qlens
from qlens.core.deprecation import MODULES, renamed_arguments, renamed_attributes
from qlens.core.deprecation.columns import renamed_columns


@pytest.mark.parametrize("old", MODULES)
def test_a_module_is_imported_by_its_old_name(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=MODULES[old]) as caught:
        __import__(old)
    assert caught[0].filename == __file__
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


def test_an_old_attribute_warns_and_unknown_ones_do_not_exist():
    get = renamed_attributes("qlens.lab", {"LOOK": "qlens.core.errors.InputError"})
    with pytest.warns(DeprecationWarning, match=r"qlens\.core\.errors\.InputError"):
        assert get("LOOK") is qlens.InputError
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        get("other")


def test_an_old_column_warns_and_slices_are_plain_frames():
    frame = renamed_columns(pd.DataFrame({"label_weight": [0.5, 1.0], "p_y": [0.1, 0.2]}), trust="label_weight")
    with pytest.warns(DeprecationWarning, match="label_weight"):
        assert frame["trust"].tolist() == [0.5, 1.0]
    assert list(frame.columns) == ["label_weight", "p_y"] and frame["p_y"].sum() == pytest.approx(0.3)
    assert type(frame[frame["p_y"] > 0.1]) is pd.DataFrame
    with pytest.raises(KeyError):
        frame["other"]
