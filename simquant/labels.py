"""Names beside the points of a picture, each where it hides nothing and touches no other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

GAPS = (7, 11, 16, 24, 34, 46, 60, 80, 105, 135, 170, 210, 260, 320, 400)  # pixels between a point and its label
CLOSE = 16  # up to this gap, no line has to join a label to its point
TURNS = [  # right and left, above and below, corners, and what lies between
    np.clip([2**0.5 * math.cos(step * math.pi / 12), 2**0.5 * math.sin(step * math.pi / 12)], -1, 1)
    for step in (0, 12, 6, 18, 3, 9, 15, 21, *(step for step in range(24) if step % 3))
]
PADDING, MARKER = 3, 5  # pixels around a label, and from the centre of a point to its edge
OVERLAP, OUTSIDE = 10_000, 20_000  # costs, in pixels of gap: a sum below OVERLAP has all labels apart and inside
HIDES_POINT, HIDES_LINE, LEADER_ON_BOX, LEADER_ON_POINT, LEADER_ON_LEADER = 200, 20, 200, 60, 80
ROUNDS, STARTS = 20, 6
GROWTH, MOST_INCHES = 1.15, 40.0


class Label(NamedTuple):
    """A text beside the point (x, y), in the figures that the axes show."""

    x: float
    y: float
    text: str
    colour: str
    weight: str = "normal"


@dataclass(frozen=True)
class Choice:
    """Where labels may stand, for n labels with k places each, in pixels.

    centres  of the boxes [n,k,2]
    boxes    their lower left and upper right corners [n,k,2,2]
    costs    what each place costs by itself, whatever the other labels do [n,k]
    leaders  whether a line joins the label to its point [k]
    points   [n,2]
    """

    centres: np.ndarray
    boxes: np.ndarray
    costs: np.ndarray
    leaders: np.ndarray
    points: np.ndarray

    def costs_beside(self, label: int, chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return what each place of a label costs [k] while the labels others [m] stand where chosen [n] says."""
        boxes, theirs = self.boxes[label][:, None], self.boxes[others, chosen[others]]  # [k,1,2,2], [m,2,2]
        leader = self.points[label], self.centres[label][:, None]  # [2], [k,1,2]
        their_leader = self.points[others], self.centres[others, chosen[others]]  # [m,2] each
        mine, has = self.leaders[:, None], self.leaders[chosen[others]]  # [k,1], [m]
        on_boxes = (mine & segments_cross_boxes(*leader, theirs)) | (has & segments_cross_boxes(*their_leader, boxes))
        on_leaders = mine & has & segments_cross(*leader, *their_leader)
        pairs = OVERLAP * boxes_overlap(boxes, theirs) + LEADER_ON_BOX * on_boxes + LEADER_ON_LEADER * on_leaders
        return self.costs[label] + pairs.sum(1)


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Let a letter that the font lacks be drawn as a box, without a warning, inside the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def boxes_overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return whether boxes [...,2,2] have an area in common [...]."""
    return ((one[..., 0, :] < other[..., 1, :]) & (other[..., 0, :] < one[..., 1, :])).all(-1)


def segments_cross_boxes(starts: np.ndarray, ends: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return whether segments from [...,2] to [...,2] enter boxes [...,2,2]."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a segment along an axis never meets the sides beside it
        meets = (boxes - starts[..., None, :]) / (ends - starts)[..., None, :]  # as shares of the segment's length
    enters, leaves = meets.min(-2).max(-1), meets.max(-2).min(-1)
    return np.maximum(enters, 0) < np.minimum(leaves, 1)


def segments_cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return whether the segments from a to b and from c to d, all [...,2], cross each other [...]."""

    def side(one, other, point):  # positive where point lies left of the line from one to other
        (x, y), (u, v) = np.moveaxis(other - one, -1, 0), np.moveaxis(point - one, -1, 0)
        return x * v - y * u

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)


def drawn_segments(axes) -> np.ndarray:
    """Return the segments [s,2,2] of the lines and error bars that axes show, in pixels."""
    paths = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
    paths += [path.transformed(axes.transData) for bars in axes.collections for path in bars.get_paths()]
    pairs = [np.stack([path.vertices[:-1], path.vertices[1:]], 1) for path in paths if len(path.vertices) > 1]
    return np.concatenate(pairs) if pairs else np.zeros((0, 2, 2))


def text_style(label: Label) -> dict[str, Any]:
    """Return how matplotlib is to write a label."""
    return {"fontsize": 8, "color": label.colour, "weight": label.weight, "ha": "center", "va": "center"}


def text_size(axes, label: Label) -> np.ndarray:
    """Return the width and height [2] of a label, in pixels."""
    words = axes.annotate(label.text, (label.x, label.y), **text_style(label))
    size = words.get_window_extent().padded(PADDING).size
    words.remove()
    return size


def choice_of(axes, labels: Sequence[Label]) -> Choice:
    """Return the places of labels in axes whose limits and size stay as they are."""
    with quiet_fonts():
        axes.figure.draw_without_rendering()  # so that it is known what lies where
        half = np.array([text_size(axes, label) for label in labels])[:, None] / 2  # [n,1,2]
    points = axes.transData.transform([label[:2] for label in labels])
    gaps = np.repeat(GAPS, len(TURNS))
    centres = points[:, None] + (half + gaps[:, None]) * np.tile(TURNS, (len(GAPS), 1))
    boxes = np.stack([centres - half, centres + half], 2)  # [n,k,2,2]
    is_outside = (boxes[:, :, 0] < axes.bbox.min).any(-1) | (boxes[:, :, 1] > axes.bbox.max).any(-1)
    costs = gaps + OUTSIDE * is_outside + hiding_costs(boxes, points, drawn_segments(axes))
    markers = np.stack([points - MARKER, points + MARKER], 1)
    for label, point in enumerate(points):
        others = np.delete(markers, label, 0)
        crossed = segments_cross_boxes(point, centres[label][:, None], others).sum(-1)
        costs[label] += LEADER_ON_POINT * (gaps > CLOSE) * crossed
    return Choice(centres, boxes, costs, gaps > CLOSE, points)


def hiding_costs(boxes: np.ndarray, points: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Return what it costs [n,k] that boxes [n,k,2,2] hide points [n,2] and lines [s,2,2]."""
    markers = np.stack([points - MARKER, points + MARKER], 1)
    starts, ends = lines[:, 0], lines[:, 1]
    on_points = [boxes_overlap(each[:, None], markers).sum(-1) for each in boxes]
    on_lines = [segments_cross_boxes(starts, ends, each[:, None]).sum(-1) for each in boxes]
    return HIDES_POINT * np.array(on_points) + HIDES_LINE * np.array(on_lines)


def improved(choice: Choice, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the place of each label [n], what it costs there [n]): one after the other, then each again and again."""
    chosen, count = np.zeros(len(order), dtype=int), len(order)
    for place, label in enumerate(order):
        chosen[label] = choice.costs_beside(label, chosen, np.array(order[:place], dtype=int)).argmin()
    others = [np.delete(np.arange(count), label) for label in range(count)]
    for _ in range(ROUNDS):
        before = chosen.copy()
        for label in order:
            chosen[label] = choice.costs_beside(label, chosen, others[label]).argmin()
        if (chosen == before).all():
            break
    costs = [choice.costs_beside(label, chosen, others[label])[chosen[label]] for label in range(count)]
    return chosen, np.array(costs)


def arranged(choice: Choice) -> tuple[np.ndarray, bool]:
    """Return (the best places that are found [n], whether all labels are apart and inside there)."""
    count, random = len(choice.points), np.random.default_rng(0)
    orders = [np.arange(count), *(random.permutation(count) for _ in range(STARTS - 1))]
    chosen, costs = min((improved(choice, order) for order in orders), key=lambda found: found[1].sum())
    return chosen, bool((costs < OVERLAP).all())


def place_labels(figure, labels: Sequence[tuple[Any, Sequence[Label]]]) -> None:
    """Write the labels of each (axes, labels) near their points, inside the axes and over no other.

    The figure grows until all find room. Its axes must not change afterwards.
    """
    labels = [(axes, each) for axes, each in labels if each]
    while True:
        choices = [choice_of(axes, each) for axes, each in labels]
        found = [arranged(choice) for choice in choices]
        if all(fits for _, fits in found) or max(figure.get_size_inches()) * GROWTH > MOST_INCHES:
            break
        figure.set_size_inches(GROWTH * figure.get_size_inches())
    for (axes, each), choice, (chosen, _) in zip(labels, choices, found, strict=True):
        for number, (label, place) in enumerate(zip(each, chosen, strict=True)):
            shift = (choice.centres[number, place] - choice.points[number]) * 72 / figure.dpi
            arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": label.colour} if choice.leaders[place] else None
            where = {"xy": label[:2], "xytext": shift, "textcoords": "offset points", "arrowprops": arrow}
            axes.annotate(label.text, **where, **text_style(label)).set_in_layout(False)
