"""Style of figures: one colour and marker per method, legends that fit, and data beside every saved figure."""

import pandas as pd
import pytest

import qlens
from qlens import InputError
from qlens.analysis import plots
from qlens.analysis.compare.recipes import CONTROLS, DEFAULT
from qlens.analysis.plots.study_overview import method_keys
from qlens.analysis.plots.style import legend_below, look, new_figure, of_figure, styles
from qlens.analysis.plots.target_data import sweep_frame, sweep_tokens

SWEEP = pd.DataFrame(sweep_frame(("sft", "gem"), sweep_tokens([0.1, 0.5, 0.9])))


def test_styles_of_registered_methods_are_fixed():
    names = [name for name, m in qlens.registry.methods().items() if m.fn.__module__.startswith("qlens.variants")]
    together = styles([*names, "mine(x=1)", "other.py:f"])
    assert len(set(together.values())) == len(together)
    assert all(styles([name])[name] == together[name] for name in names)
    few = styles(["sft", "dft", "mine(x=1)", "other.py:f", "third.py:f"]).values()
    assert len({style.marker for style in few}) == 5, "user methods differ in their markers too"
    rows = [*DEFAULT, *CONTROLS]
    assert len({style.marker for style in styles(rows).values()}) == len(rows), "distinct in grey"
    assert len(set(styles([*plots.STYLES, *(f"mine(x={x})" for x in range(20))]).values())) == len(plots.STYLES) + 20


def test_the_panels_of_a_figure_share_their_styles():
    names = [f"mine(x={x})" for x in range(40)]
    alone = {name: look(pd.DataFrame({"method": [name]}))[name] for name in names}
    together = {name: look(of_figure(pd.DataFrame({"method": [name]}), names))[name] for name in names}
    assert len(set(together.values())) == 40 > len(set(alone.values()))


def test_a_figure_grows_by_its_legend():
    few, many = new_figure(3.3, 2), new_figure(3.3, 2)
    legend_below(few, method_keys(["sft", "dft"]))
    legend_below(many, method_keys(qlens.names()))
    assert 2 < few.get_figheight() < 2.5 < many.get_figheight()
    many.subplots()
    many.draw_without_rendering()
    box = many.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= many.bbox.x1


def test_a_figure_is_saved_with_its_data(tmp_path):
    figure = plots.figure_sweep(SWEEP)
    for kind in ("png", "svg", "pdf"):
        contents = [
            plots.save_figure(plots.figure_sweep(SWEEP), tmp_path / f"{n}.{kind}", SWEEP) for n in ("one", "two")
        ]
        assert (tmp_path / f"one.{kind}").read_bytes() == contents[0] == contents[1], (
            "the same bytes for the same figure"
        )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "one.csv"), SWEEP)
    plots.save_figure(figure, tmp_path / "three.png", {"": SWEEP, "ends": SWEEP})
    assert (tmp_path / "three.csv").is_file() and (tmp_path / "three-ends.csv").is_file()
    for path, message in (
        (tmp_path / "no" / "x.png", "there is no folder"),
        (tmp_path / "x.gif", "one of .png, .pdf, .svg"),
    ):
        with pytest.raises(InputError, match=message):
            plots.save_figure(figure, path, SWEEP)
    assert not list(tmp_path.glob("*.partial"))
