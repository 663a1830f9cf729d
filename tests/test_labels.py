"""Labels in a picture: what overlaps and crosses, as matplotlib sees it, and a figure that makes room."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from simquant import labels
from simquant.labels import Label


@pytest.fixture
def corners():
    """1000 pairs of points [1000,2,2], some of which share a coordinate."""
    random = np.random.default_rng(0)
    pairs = random.integers(0, 40, (1000, 2, 2)) + 0.5 * random.random((1000, 1, 2))
    return pairs[(pairs[:, 0] != pairs[:, 1]).any(1)]


def test_segments_cross_boxes_as_matplotlib_says(corners):
    boxes = np.array([[10.7, 12.7], [25.8, 19.8]]) + np.zeros((len(corners), 1, 1))
    found = labels.segments_cross_boxes(corners[:, 0], corners[:, 1], boxes)
    known = [Path(pair).intersects_bbox(Bbox(boxes[0]), filled=False) for pair in corners]
    inside = ((corners > boxes[0, 0]) & (corners < boxes[0, 1])).all(-1).any(-1)
    assert (found == (known | inside)).all() and 100 < found.sum() < 900


def test_segments_cross_as_matplotlib_says(corners):
    one, other = corners[0::2], corners[1::2][: len(corners[0::2])]
    one = one[: len(other)]
    found = labels.segments_cross(one[:, 0], one[:, 1], other[:, 0], other[:, 1])
    known = [Path(a).intersects_path(Path(b), filled=False) for a, b in zip(one, other, strict=True)]
    assert (found == known).all() and 50 < found.sum() < 450


def test_boxes_overlap_and_are_as_far_as_matplotlib_and_a_grid_say(corners):
    boxes = np.sort(corners, 1)
    pairs = boxes[:-1], boxes[1:]
    known = [Bbox(a).count_overlaps([Bbox(b)]) for a, b in zip(*pairs, strict=True)]
    assert (labels.boxes_overlap(*pairs) == known).all() and 0 < sum(known) < len(known)
    for box, point in zip(boxes[:50], corners[50:100, 0], strict=True):
        grid = np.stack(np.meshgrid(*np.linspace(*box, 200).T), -1)
        away = np.hypot(*np.moveaxis(grid - point, -1, 0)).min()
        assert labels.distances(box, point) == pytest.approx(away, abs=0.2)


def written(size, named):
    """Return (figure, texts) of labels in axes of this size, in inches."""
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "o")
    labels.place_labels(figure, [(axes, named)])
    figure.draw_without_rendering()
    return figure, axes.texts


def test_a_figure_without_room_grows_and_loses_no_label():
    named = [Label(0.5, 0.5, f"a label, number {number}", "black") for number in range(20)]
    figure, texts = written((2, 1.5), named)
    assert figure.get_size_inches()[0] > 2 and [text.get_text() for text in texts] == [each.text for each in named]
    boxes = [Text.get_window_extent(text) for text in texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(figure.axes[0].bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_a_label_alone_stands_by_its_point_and_one_far_away_has_a_line(monkeypatch):
    figure, (text,) = written((4, 3), [Label(0.2, 0.5, "alone", "red", "bold")])
    point = figure.axes[0].transData.transform((0.2, 0.5))
    assert labels.distances(Text.get_window_extent(text).get_points(), point) < 15 and text.arrow_patch is None
    assert (text.get_color(), text.get_weight(), tuple(figure.get_size_inches())) == ("red", "bold", (4, 3))
    monkeypatch.setattr(labels, "GAPS", (80,))
    assert written((4, 3), [Label(0.2, 0.5, "alone", "red")])[1][0].arrow_patch is not None


def test_no_label_at_all_is_no_error():
    assert [*written((4, 3), [])[1]] == []
