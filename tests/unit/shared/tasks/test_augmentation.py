"""Random changes to images: exact where they can be, the same for boxes as for pixels, and the site's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from quorate.shared.tasks.vision.augmentation import Augmentation, Change

DRAW = np.random.default_rng(0)
IMAGE = DRAW.integers(0, 256, (3, 12, 12), dtype=np.uint8)
OBLONG = DRAW.integers(0, 256, (3, 8, 14), dtype=np.uint8)
PLAIN = (1.0, 1.0, 1.0)


def change(linear: Any, shift: Any = (0, 0), colour: Any = PLAIN, padding_mode: str = "zeros") -> Change:
    return Change(np.array(linear, dtype=np.float64), np.array(shift, dtype=np.float64), colour, padding_mode)


def test_nothing_asked_for_changes_nothing() -> None:
    plain = Augmentation(padding_mode="zeros")
    assert not plain.changes and Augmentation(rotation=1).changes
    assert np.array_equal(plain.draw(np.random.default_rng(1)).image(IMAGE), IMAGE)


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        ([[-1, 0], [0, 1]], IMAGE[:, :, ::-1]),
        ([[1, 0], [0, -1]], IMAGE[:, ::-1]),
        ([[0, -1], [1, 0]], np.rot90(IMAGE, -1, (1, 2))),
        ([[0, 1], [-1, 0]], np.rot90(IMAGE, 1, (1, 2))),
    ],
    ids=["horizontal", "vertical", "clockwise", "back"],
)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflection", "border"])
def test_flips_and_right_angles_move_every_pixel(linear: Any, expected: Any, padding_mode: str) -> None:
    assert np.array_equal(change(linear, padding_mode=padding_mode).image(IMAGE), expected)


def test_shifts_are_shares_of_the_image() -> None:
    moved = change(np.eye(2), (3 / 14, -2 / 8)).image(OBLONG)
    assert np.array_equal(moved[:, :-2, 3:], OBLONG[:, 2:, :-3])
    assert not moved[:, -2:].any() and not moved[:, :, :3].any()
    mirrored = change(np.eye(2), (3 / 14, 0), padding_mode="reflection").image(OBLONG)
    assert np.array_equal(mirrored[:, :, :3], OBLONG[:, :, 2::-1])


def test_enlarging_by_two_shows_the_middle() -> None:
    image = np.zeros((3, 16, 16), np.uint8)
    image[:, 4:12, 4:12] = 200
    assert (change(2 * np.eye(2)).image(image)[:, 1:-1, 1:-1] == 200).all()
    small = change(0.5 * np.eye(2)).image(np.full((3, 16, 16), 200, np.uint8))
    assert (small[:, 5:11, 5:11] == 200).all() and not small[:, :3].any()


def test_boxes_move_as_their_pixels_do() -> None:
    height, width = 60, 80
    asked = Augmentation(
        horizontal_flip=0.5, vertical_flip=0.5, rotation=25, scale=(0.8, 1.2), translation=0.1,
        padding_mode="zeros",
    )  # fmt: skip
    for seed in range(20):
        drawn = asked.draw(np.random.default_rng(seed))
        boxes = np.array([[20, 15, 24, 10], [50, 30, 8, 20]], dtype=np.float64)
        found, left = drawn.boxes(boxes, height, width)
        for (x, y, w, h), new, share in zip(boxes.astype(int), found, left, strict=True):
            image = np.zeros((3, height, width), np.uint8)
            image[:, y : y + h, x : x + w] = 255
            rows, columns = np.nonzero(drawn.image(image)[0] > 127)
            start, end = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
            np.testing.assert_allclose(new[:2], start, atol=2)
            np.testing.assert_allclose(new[:2] + new[2:], end, atol=2)
            assert 0 < share <= 1


def test_boxes_are_cut_at_the_edge_and_say_what_is_left() -> None:
    shifted = change(np.eye(2), (0.5, 0))
    found, left = shifted.boxes(np.array([[0, 0, 4, 4], [3, 2, 4, 4], [8, 0, 2, 2]]), 10, 10)
    assert found.tolist()[:2] == [[5, 0, 4, 4], [8, 2, 2, 4]]
    assert left.tolist() == pytest.approx([1, 0.5, 0])
    mirrored, _ = change([[-1, 0], [0, 1]]).boxes(np.array([[1, 2, 3, 4]]), 10, 20)
    assert mirrored.tolist() == [[16, 2, 3, 4]]
    none, left = shifted.boxes(np.empty((0, 4)), 10, 10)
    assert none.shape == (0, 4) and left.shape == (0,)


def test_colours_keep_their_bounds_and_their_grey() -> None:
    assert (
        change(np.eye(2), colour=(2.0, 1, 1)).image(IMAGE) == np.minimum(2 * IMAGE.astype(int), 255)
    ).all()
    flat = np.full((3, 4, 4), 120, np.uint8)
    assert np.array_equal(change(np.eye(2), colour=(1, 0.3, 1)).image(flat), flat)
    grey = change(np.eye(2), colour=(1, 1, 0.0)).image(IMAGE)
    assert (grey[0] == grey[1]).all() and (grey[1] == grey[2]).all()


def test_the_generator_decides_and_options_do_not_shift_each_other() -> None:
    asked = Augmentation(horizontal_flip=0.5, rotation=30, brightness=0.2)
    draws = [asked.draw(np.random.default_rng(4)) for _ in range(2)]
    assert np.array_equal(draws[0].image(IMAGE), draws[1].image(IMAGE))
    several = [asked.draw(generator) for generator in [np.random.default_rng(4)] for _ in range(30)]
    assert len({each.colour for each in several}) == 30
    assert {np.sign(np.linalg.det(each.linear)) for each in several} == {-1, 1}
    without = Augmentation(horizontal_flip=0.5, brightness=0.2).draw(np.random.default_rng(4))
    assert without.colour == draws[0].colour
    assert np.linalg.det(without.linear) == pytest.approx(np.linalg.det(draws[0].linear))


def test_what_is_drawn_lies_in_its_range() -> None:
    asked = Augmentation(rotation=10, scale=(0.5, 2), translation=0.1, contrast=0.3)
    generator = np.random.default_rng(0)
    drawn = [asked.draw(generator) for _ in range(200)]
    factors = np.sqrt([np.linalg.det(each.linear) for each in drawn])
    assert 0.5 <= factors.min() < 0.6 and 1.9 < factors.max() <= 2
    angles = np.degrees([np.arctan2(each.linear[1, 0], each.linear[0, 0]) for each in drawn])
    assert 9 < np.abs(angles).max() <= 10
    assert 0.09 < np.abs([each.shift for each in drawn]).max() <= 0.1
    assert {each.colour[0] for each in drawn} == {1.0} and max(each.colour[1] for each in drawn) <= 1.3


@pytest.mark.parametrize("wrong", [{"scale": (2, 1)}, {"scale": (0, 1)}, {"rotation": 200}, {"crop": 1}])
def test_nonsense_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**wrong)
