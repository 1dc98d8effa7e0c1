"""The pictures that the training scripts draw, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from manualgrad.training.pictures import confusion_matrix, grid

BLUE, RED = (26, 115, 232), (217, 48, 37)  # of a cell that has its whole row


def places(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(n, 2): where a colour is, down and across."""
    return np.argwhere((np.asarray(picture) == colour).all(2))


def drawn(*rows: list[int]) -> Image.Image:
    return confusion_matrix(torch.tensor(rows), ["cat", "dog"])


def test_what_is_right_is_blue_and_on_the_diagonal() -> None:
    picture = drawn([7, 0], [0, 7])
    down, across = places(picture, BLUE).T
    above, below = across[down < down.mean()], across[down > down.mean()]
    assert above.max() < below.min()
    assert len(places(picture, RED)) == 0


def test_what_is_wrong_is_red_and_in_the_row_of_the_truth() -> None:
    cats_for_dogs, dogs_for_cats = places(drawn([0, 3], [0, 3]), RED), places(drawn([3, 0], [3, 0]), RED)
    assert cats_for_dogs[:, 0].max() < dogs_for_cats[:, 0].min()
    assert cats_for_dogs[:, 1].min() > dogs_for_cats[:, 1].max()


def test_cells_are_as_dark_as_their_share_of_the_row() -> None:
    """Whatever the rows' sizes; and the numbers are those that are given."""
    few, many = drawn([3, 1], [0, 9]), drawn([300, 100], [0, 9])
    shade = (236, 152, 146)  # the root of a quarter, of the way from white to red
    assert len(places(few, shade)) > 500 < len(places(many, shade))
    assert drawn([7, 0], [0, 7]).tobytes() != drawn([8, 0], [0, 8]).tobytes()
    assert many.width > few.width  # cells hold their number


def test_a_matrix_has_room_for_the_names_and_for_many_classes() -> None:
    counts = torch.eye(2, dtype=torch.long)
    short, long = confusion_matrix(counts, ["a", "b"]), confusion_matrix(counts, ["a", "a class of many words"])
    assert long.width - short.width == long.height - short.height > 200
    assert confusion_matrix(torch.eye(62, dtype=torch.long), [str(number) for number in range(62)]).width > 2500
    assert confusion_matrix(torch.zeros(2, 2, dtype=torch.long), ["a", "b"]).mode == "RGB"


@pytest.mark.parametrize("colours", [(), (3,)])
def test_images_are_enlarged_in_whole_pixels(colours: tuple[int, ...]) -> None:
    images = torch.randint(256, (5, 14, 10, *colours), dtype=torch.uint8)
    picture = np.asarray(grid(images, ["one"] * 5))
    for left, image in zip((16, 132), images, strict=False):  # ten times the size, and 16 between
        large = image.repeat_interleave(10, 0).repeat_interleave(10, 1).numpy()
        large = large if colours else large[..., None]
        assert (picture[16:156, left : left + 100] == large).all()
    assert (picture[:16] == 255).all()


def test_captions_stand_below_and_have_room() -> None:
    images = torch.zeros(4, 14, 14, dtype=torch.uint8)
    words, none = grid(images, ["true: Ankle boot\npredicted: Sneaker"] * 4), grid(images, [""] * 4)
    assert words.width > none.width
    assert words.height > none.height
    assert grid(images[:0], []).mode == "RGB"


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 names need as many rows and columns, not \(3, 3\)"):
        confusion_matrix(torch.zeros(3, 3, dtype=torch.long), ["a", "b"])
    with pytest.raises(ValueError, match="3 images need as many captions, not 1"):
        grid(torch.zeros(3, 8, 8, dtype=torch.uint8), ["a"])
