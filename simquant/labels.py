"""Names beside the points of a picture, each where it hides nothing and touches no other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

GAPS = (7, 11, 16, 24, 34, 46, 60, 80, 105, 135, 170, 210, 260, 320, 400, 500, 630, 800)  # pixels from point to label
CLOSE = 16  # up to this gap, no line has to lead from a label to its point
TURNS = [  # a label's directions from its point, stretched so that they reach its corners
    np.clip([2**0.5 * math.cos(step * math.pi / 12), 2**0.5 * math.sin(step * math.pi / 12)], -1, 1)
    for step in range(24)
]
PADDING, MARKER = 3, 5  # pixels around a label, and from the centre of a point to its edge
OVERLAP = OUTSIDE = 10**6  # costs, in pixels of gap: more than all that follow, added up for a label
HIDES_POINT, HIDES_LINE, UNCLEAR, LEADER_ON_BOX, LEADER_ON_POINT, LEADER_ON_LEADER = 400, 60, 60, 800, 100, 150
ORDERS, ROUNDS = 12, 8  # in which labels are placed, and how often each is moved at most
MANY = 40  # more labels than these are tried in fewer orders
GROWTHS, GROWTH = 5, 1.2  # how often a figure grows at most, and by what factor


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
    leaders  whether a line leads from the label to its point [k]
    points   [n,2]
    costs    what each place costs by itself, whatever the other labels do [n,k]
    """

    centres: np.ndarray
    boxes: np.ndarray
    leaders: np.ndarray
    points: np.ndarray
    costs: np.ndarray

    def costs_alone(self, label: int, lines: np.ndarray) -> np.ndarray:
        """Return what the points and the lines [s,2,2] add to the costs of a label's places [k]."""
        boxes, point, others = self.boxes[label], self.points[label], np.delete(self.points, label, 0)
        hidden = boxes_overlap(boxes[:, None], around(self.points, MARKER)).sum(1)
        crossed = segments_cross_boxes(lines[:, 0], lines[:, 1], boxes[:, None]).sum(1)
        led_over = segments_cross_boxes(point, self.centres[label][:, None], around(others, MARKER)).sum(1)
        is_nearer = distances(boxes[:, None], others) < 1.5 * distances(boxes, point)[:, None]
        is_nearer &= np.hypot(*(others - point).T) > MARKER / 2  # points in one place need not be told apart
        of_which_point = np.where(self.leaders, LEADER_ON_POINT * led_over, UNCLEAR * is_nearer.sum(1))
        return HIDES_POINT * hidden + HIDES_LINE * crossed + of_which_point

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
    meets = (one[..., 0, :] < other[..., 1, :]) & (other[..., 0, :] < one[..., 1, :])
    return meets[..., 0] & meets[..., 1]


def around(points: np.ndarray, margin: float) -> np.ndarray:
    """Return the boxes [...,2,2] whose sides are margin away from points [...,2]."""
    return np.stack([points - margin, points + margin], -2)


def distances(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how far points [...,2] are from boxes [...,2,2], in pixels."""
    beyond = np.maximum(boxes[..., 0, :] - points, points - boxes[..., 1, :])
    return np.hypot(*np.moveaxis(np.maximum(beyond, 0), -1, 0))


def segments_cross_boxes(starts: np.ndarray, ends: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return whether segments from [...,2] to [...,2] enter boxes [...,2,2]."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a segment along an axis never meets the sides beside it
        length = ends - starts
        one, other = (boxes[..., 0, :] - starts) / length, (boxes[..., 1, :] - starts) / length  # shares of the segment
    enters, leaves = np.minimum(one, other), np.maximum(one, other)  # the slabs between opposite sides [...,2]
    first, last = np.maximum(enters[..., 0], enters[..., 1]), np.minimum(leaves[..., 0], leaves[..., 1])
    return np.maximum(first, 0) < np.minimum(last, 1)


def segments_cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return whether the segments from a to b and from c to d, all [...,2], cross each other [...]."""

    def side(one, other, point):
        """Return [...], positive where point lies left of the line from one to other."""
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
    choice, lines = Choice(centres, boxes, gaps > CLOSE, points, gaps + OUTSIDE * is_outside), drawn_segments(axes)
    added = [choice.costs_alone(label, lines) for label in range(len(labels))]
    return replace(choice, costs=choice.costs + added)


def placed(choice: Choice, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the place of each label [n], what it costs there [n]), first one by one in order [n], then by turns."""
    chosen = np.zeros(len(order), dtype=int)
    for number, label in enumerate(order):
        chosen[label] = choice.costs_beside(label, chosen, order[:number]).argmin()
    others = [np.delete(np.arange(len(order)), label) for label in range(len(order))]
    for _ in range(ROUNDS):
        before = chosen.copy()
        for label in order:
            chosen[label] = choice.costs_beside(label, chosen, others[label]).argmin()
        if (chosen == before).all():
            break
    costs = [choice.costs_beside(label, chosen, beside)[chosen[label]] for label, beside in enumerate(others)]
    return chosen, np.array(costs)


def best_placed(choice: Choice) -> tuple[np.ndarray, bool]:
    """Return (the best places [n] that several orders lead to, whether all labels are apart and inside there)."""
    count, random = len(choice.points), np.random.default_rng(0)
    orders = [random.permutation(count) for _ in range(min(ORDERS, max(2, ORDERS * MANY // count)))]
    tried = [placed(choice, order) for order in orders]
    chosen, costs = min(tried, key=lambda found: found[1].sum())
    return chosen, bool((costs < OVERLAP).all())


def place_labels(figure, labels: Sequence[tuple[Any, Sequence[Label]]]) -> None:
    """Write the labels of each (axes, labels) near their points, inside the axes and over no other.

    The figure grows until all find room, and at most GROWTHS times. Its axes must not change afterwards.
    """
    labels = [(axes, each) for axes, each in labels if each]
    for growth in range(GROWTHS + 1):
        if growth:
            figure.set_size_inches(GROWTH * figure.get_size_inches())
        choices = [choice_of(axes, each) for axes, each in labels]
        found = [best_placed(choice) for choice in choices]
        if all(fits for _, fits in found):
            break
    for (axes, each), choice, (chosen, _) in zip(labels, choices, found, strict=True):
        for number, (label, place) in enumerate(zip(each, chosen, strict=True)):
            shift = (choice.centres[number, place] - choice.points[number]) * 72 / figure.dpi
            arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": label.colour} if choice.leaders[place] else None
            at: dict[str, Any] = {"xytext": shift, "textcoords": "offset points", "arrowprops": arrow}
            axes.annotate(label.text, label[:2], **at, **text_style(label)).set_in_layout(False)
