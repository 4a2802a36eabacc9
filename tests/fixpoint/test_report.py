from __future__ import annotations

import base64
import json
import re

import matplotlib.image
import numpy as np
import pytest
import torch

from fixpoint import bench
from fixpoint.bench import report


def results(*studies, failures=()):
    """What a run would give, through JSON, so that nothing else can reach the page."""
    data = {
        "format": 1,
        "date": "2030-01-02T03:04:05+00:00",
        "seconds": 12.3,
        "quick": True,
        "machine": {"platform": "Some System", "cpus": 2},
        "versions": {"torch": "9.9"},
        "commit": "abc123",
        "studies": [study.to_json() for study in studies],
        "failures": list(failures),
    }
    return json.loads(json.dumps(data))


TABLE = bench.Table("Costs", ("solver", "evaluations"), (("Picard & <co>", 85), ("Anderson", None)), "How to read it.")
BARS = bench.Bars("Time", {"slow": 2.5, "fast": 1.0, "none": None}, "seconds", reference="slow")
LINES = bench.Lines("Residual", {"one": ([1, 2], [1.0, 0.1]), "dot": ([2], [0.5])}, "evaluations", "residual")


def images(*shape, **labels):
    return bench.Images.of("Grid", torch.zeros(*shape), **labels)


def test_the_page_is_self_contained_and_embeds_the_very_pictures_it_wrote(tmp_path):
    grid = images(2, 3, 8, 8, row_labels=["a", "b"], column_labels=["x", "y", "z"])
    page = report.render(results(bench.Study("s", "Study", (TABLE, LINES, grid))), tmp_path).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"https?:|url\(|<script|<link", page)
    embedded = [base64.b64decode(source.partition(",")[2]) for source in sources if source.startswith("data:")]
    assert embedded == [(tmp_path / name).read_bytes() for name in ("s-residual.png", "s-grid.png")]


def test_the_page_tells_machine_versions_commit_captions_and_anchors(tmp_path):
    study = bench.Study("my study", "Study", (TABLE,), summary="What was asked.")
    page = report.render(results(study), tmp_path).read_text()
    for text in ("Some System", "torch 9.9", "abc123", "12 s (quick)", "How to read it.", "What was asked."):
        assert text in page
    assert 'href="#my-study"' in page
    assert 'id="my-study"' in page


def test_text_from_results_is_escaped(tmp_path):
    failure = {"name": "x", "error": "ValueError: <b>&"}
    page = report.render(results(bench.Study("s", "<i>$title</i>", (TABLE,)), failures=[failure]), tmp_path).read_text()
    for text in ("&lt;i&gt;$title&lt;/i&gt;", "Picard &amp; &lt;co&gt;", "ValueError: &lt;b&gt;&amp;"):
        assert text in page


def test_pictures_of_the_same_title_do_not_overwrite_each_other(tmp_path):
    report.render(results(bench.Study("s", "S", (LINES, LINES)), bench.Study("s", "S", (LINES,))), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "s-residual-2.png",
        "s-residual-3.png",
        "s-residual.png",
    ]


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_what_is_drawn(tmp_path):
    name = "package.module:MySolver:memory=10:ridge=1e-3, rtol 1e-05 (fails)"
    lines = bench.Lines("Residual", {f"{name} {i}": ([1, 2], [1.0, 0.1]) for i in range(4)}, "x", "y")
    report.render(results(bench.Study("s", "S", (lines, bench.Bars("Time", {name: 1.0}, "seconds")))), tmp_path)
    # Nothing is cut off: no text touches the edge of its picture.
    for picture in map(matplotlib.image.imread, tmp_path.glob("*.png")):
        alpha = picture[..., 3]
        assert not max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max())


@pytest.mark.parametrize("size", [8, 32, 100])
def test_images_are_enlarged_by_whole_pixels_without_smoothing(size, tmp_path):
    picture = torch.zeros(1, 2, 3, size, size)
    picture[0, 1, :, size // 2, 1] = torch.tensor([1.0, 0.2, 0.0])
    grid = bench.Images.of("Grid", picture, low=0, high=1, row_labels=["row"], column_labels=["left", "right"])
    report.render(results(bench.Study("s", "S", (grid,))), tmp_path)
    drawn = (matplotlib.image.imread(tmp_path / "s-grid.png")[..., :3] * 255).round().astype(int)
    zoom = next(z for z in range(1, 100) if z * size >= 56)
    places = np.argwhere((drawn == [255, 51, 0]).all(axis=-1))
    assert len(places) == zoom**2
    assert (np.ptp(places, axis=0) == zoom - 1).all()
    assert (drawn == 0).all(axis=-1).sum() >= (2 * size**2 - 1) * zoom**2


@pytest.mark.parametrize(
    "block",
    [
        bench.Lines("L", {}, "x", "y"),
        bench.Lines("L", {"gap": ([1, 2, 3], [1.0, None, 0.0])}, "x", "y"),
        bench.Lines("L", {"nothing": ([1, 2], [None, None])}, "x", "y"),
        bench.Lines("L", {f"series {i}": ([1, 2], [i, 1]) for i in range(12)}, "x", "y", log_y=False),
        bench.Lines("L", {"one": ([1, 900], [1.0, 0.1])}, "x", "y", log_x=True, marks={"end": 50.0}),
        BARS,
        bench.Bars("B", {}, "seconds"),
        images(1, 1, 8, 8),
        images(1, 3, 3, 4, 6, column_labels=["a long label", "b", "c"]),
        bench.Table("T", ("a",), ()),
    ],
)
def test_blocks_at_the_edge_are_drawn_without_a_warning(block, tmp_path, recwarn):
    report.render(results(bench.Study("s", "S", (block,))), tmp_path)
    assert not [str(w.message) for w in recwarn]


def colours(path):
    """The opaque colours of a picture that cover more than one pixel in two hundred."""
    drawn = (matplotlib.image.imread(path) * 255).round().astype(int)
    opaque = drawn[drawn[..., 3] == 255][:, :3]
    found, counts = np.unique(opaque, axis=0, return_counts=True)
    return {tuple(colour) for colour in found[counts > drawn.shape[0] * drawn.shape[1] / 200].tolist()}


def test_bars_have_their_own_colours_and_the_reference_is_grey(tmp_path):
    values = {"sequential": 3.0, "a": 2.0, "b": 1.0}
    report.render(results(bench.Study("s", "S", (bench.Bars("Time", values, "s", reference="sequential"),))), tmp_path)
    assert colours(tmp_path / "s-time.png") == {(125, 133, 144), (47, 129, 215), (224, 117, 45)}


def test_pictures_have_no_background_and_keep_none_of_the_users_style(tmp_path):
    study = bench.Study("s", "S", (LINES, BARS, images(1, 2, 8, 8)))
    with matplotlib.rc_context({"axes.facecolor": "red", "text.color": "red", "savefig.facecolor": "red"}):
        report.render(results(study), tmp_path)
    for path in tmp_path.glob("*.png"):
        picture = matplotlib.image.imread(path)
        assert picture[0, 0, 3] == picture[-1, -1, 3] == 0
        assert not (picture == [1, 0, 0, 1]).all(axis=-1).any()


def test_the_headline_leads_its_study(tmp_path):
    page = report.render(results(bench.Study("s", "S", (TABLE,), "Why.", headline="9 < 10")), tmp_path).read_text()
    assert page.index("9 &lt; 10") < page.index("Why.")


def test_a_study_prints_as_its_tables_and_plots_its_first_curves():
    study = bench.Study("s", "Study", (LINES, TABLE, BARS), headline="What came out.")
    assert str(study) == f"Study\n\nWhat came out.\n\n{TABLE}"
    axes = study.plot()
    assert [line.get_label() for line in axes.get_lines()] == ["one", "dot"]
    assert study.plot(axes) is axes
    with pytest.raises(ValueError, match="the study 'n' has no curves"):
        bench.Study("n", "N", (TABLE,)).plot()


def test_the_terminal_shows_the_first_table_of_each_study_that_no_other_sums_up():
    second = bench.Table("Second", ("a",), ((1,),))
    text = report.main_tables(
        results(
            bench.Study("s", "S", (LINES, TABLE, second)),
            bench.Study("d", "D", (second,), detail=True),
            bench.Study("n", "N", (LINES,)),
        )
    )
    assert text.splitlines() == [
        "Costs",
        "solver         evaluations",
        "-------------  -----------",
        "Picard & <co>           85",
        "Anderson                 –",
    ]


def test_results_of_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected results of format 1"):
        report.render({"format": 2}, tmp_path)
