"""The pictures for TensorBoard, pixel by pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from manualgrad.training.pictures import confusion_matrix, grid

BLUE, RED = (26, 115, 232), (217, 48, 37)  # of a cell with all examples of its row


def pixels(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Return the (row, column) of each pixel with this colour, (n, 2)."""
    return np.argwhere((np.asarray(picture) == colour).all(2))


def matrix(*rows: list[int]) -> Image.Image:
    return confusion_matrix(torch.tensor(rows), ["cat", "dog"])


def test_correct_predictions_are_blue_on_the_diagonal() -> None:
    picture = matrix([7, 0], [0, 7])
    down, across = pixels(picture, BLUE).T
    above, below = across[down < down.mean()], across[down > down.mean()]
    assert above.max() < below.min()
    assert len(pixels(picture, RED)) == 0


def test_wrong_predictions_are_red_in_the_row_of_the_true_class() -> None:
    both_as_dog, both_as_cat = pixels(matrix([0, 3], [0, 3]), RED), pixels(matrix([3, 0], [3, 0]), RED)
    assert both_as_dog[:, 0].max() < both_as_cat[:, 0].min()
    assert both_as_dog[:, 1].min() > both_as_cat[:, 1].max()


def test_the_shade_is_the_share_of_the_row() -> None:
    """The shade does not depend on the size of the row. The numbers are shown."""
    few, many = matrix([3, 1], [0, 9]), matrix([300, 100], [0, 9])
    shade = (236, 152, 146)  # √¼ red, the rest white
    assert len(pixels(few, shade)) > 500 < len(pixels(many, shade))
    assert matrix([7, 0], [0, 7]).tobytes() != matrix([8, 0], [0, 8]).tobytes()
    assert many.width > few.width  # a cell has room for its number


def test_there_is_room_for_long_names_and_many_classes() -> None:
    counts = torch.eye(2, dtype=torch.long)
    short, long = confusion_matrix(counts, ["a", "b"]), confusion_matrix(counts, ["a", "a class of many words"])
    assert long.width - short.width == long.height - short.height > 200
    assert confusion_matrix(torch.eye(62, dtype=torch.long), [str(number) for number in range(62)]).width > 2500
    assert confusion_matrix(torch.zeros(2, 2, dtype=torch.long), ["a", "b"]).mode == "RGB"


@pytest.mark.parametrize("colours", [(), (3,)])
def test_images_are_enlarged_by_a_whole_number(colours: tuple[int, ...]) -> None:
    images = torch.randint(256, (5, 14, 10, *colours), dtype=torch.uint8)
    picture = np.asarray(grid(images, ["one"] * 5))
    for left, image in zip((16, 132), images, strict=False):  # ten times the size, with a margin of 16
        large = image.repeat_interleave(10, 0).repeat_interleave(10, 1).numpy()
        large = large if colours else large[..., None]
        assert (picture[16:156, left : left + 100] == large).all()
    assert (picture[:16] == 255).all()


def test_there_is_room_for_captions() -> None:
    images = torch.zeros(4, 14, 14, dtype=torch.uint8)
    words, none = grid(images, ["true: Ankle boot\npredicted: Sneaker"] * 4), grid(images, [""] * 4)
    assert words.width > none.width
    assert words.height > none.height
    assert grid(images[:0], []).mode == "RGB"


def test_wrong_numbers_of_names_and_captions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 names need as many rows and columns, not \(3, 3\)"):
        confusion_matrix(torch.zeros(3, 3, dtype=torch.long), ["a", "b"])
    with pytest.raises(ValueError, match="3 images need as many captions, not 1"):
        grid(torch.zeros(3, 8, 8, dtype=torch.uint8), ["a"])
