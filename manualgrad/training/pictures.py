"""Pictures for TensorBoard, with letters large enough to read after TensorBoard shrinks them."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BLACK, _GREY, _BLUE, _RED = (32, 33, 36), (95, 99, 104), (26, 115, 232), (217, 48, 37)
_SIZE, _MARGIN = 26, 16


def confusion_counts(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count how often each class (row) is predicted as each class (column): (classes, classes) integers."""
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)


def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Image.Image:
    """Draw a confusion matrix: a row for each true class, a column for each predicted class.

    Correct predictions are blue and wrong ones red. A cell is darker if its share of the row is larger. Zeros are
    not shown.

    Args:
        counts: (classes, classes) integers; counts[i, j] examples of class i were predicted as class j.
        names: the names of the classes.

    Raises:
        ValueError: if there is not one row and one column for each name.
    """
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names need as many rows and columns, not {tuple(counts.shape)}")
    font = ImageFont.load_default(_SIZE)
    rows: list[list[int]] = counts.tolist()
    longest = round(max((font.getlength(name) for name in names), default=0))
    cell = round(max((font.getlength(str(count)) for row in rows for count in row), default=0))
    cell = max(cell + 12, _SIZE + 16)
    left, top = 2 * _MARGIN + _SIZE + longest + 10, 2 * _MARGIN + _SIZE + longest + 10
    side = cell * len(names)
    picture = Image.new("RGB", (left + side + _MARGIN, top + side + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)

    draw.text((left + side / 2, _MARGIN), "predicted", _GREY, font, "mt")
    picture.paste(_rotated_text("true", _GREY, font, side), (_MARGIN, top))
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        middle = round((number + 0.5) * cell)
        draw.text((left - 10, top + middle), name, _BLACK, font, "rm")
        column = _rotated_text(name, _BLACK, font, longest, "lm")
        picture.paste(column, (left + middle - column.width // 2, top - 10 - longest))
        for other, count in enumerate(row):
            x, y = left + other * cell, top + number * cell
            share = math.sqrt(count / max(sum(row), 1))  # the root makes rare mistakes visible
            shade = _with_white(_BLUE if other == number else _RED, share)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade if count else "#f1f3f4")
            if count:
                colour = "white" if share > 0.6 else _BLACK
                draw.text((x + cell / 2 - 1, y + cell / 2 - 1), str(count), colour, font, "mm")
    return picture


def grid(images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Arrange small images in a grid, enlarged by a whole number, each with a caption below.

    Args:
        images: uint8, (n, height, width) grey or (n, height, width, 3) RGB.
        captions: one for each image, with one or more lines.

    Raises:
        ValueError: if there is not one caption for each image.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}")
    font = ImageFont.load_default(_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), caption, font) for caption in captions]
    widest, highest = (max((math.ceil(box[end]) for box in boxes), default=0) for end in (2, 3))
    height, width = images.shape[1:3]
    scale = max(1, max(140, widest) // max(height, width, 1))
    across, down = max(width * scale, widest) + _MARGIN, height * scale + highest + 6 + _MARGIN
    columns = max(1, round(math.sqrt(len(images) * down / across)))
    lines = max(1, math.ceil(len(images) / columns))
    picture = Image.new("RGB", (_MARGIN + columns * across, _MARGIN + lines * down), "white")
    draw = ImageDraw.Draw(picture)
    for number, (image, caption) in enumerate(zip(images.cpu().numpy(), captions, strict=True)):
        x, y = _MARGIN + number % columns * across, _MARGIN + number // columns * down
        large = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        picture.paste(large, (x, y))
        draw.multiline_text((x, y + height * scale + 4), caption, _BLACK, font)
    return picture


Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _with_white(colour: Colour, share: float) -> Colour:
    """Mix a share of a colour with white."""
    red, green, blue = (round(255 + (part - 255) * share) for part in colour)
    return red, green, blue


def _rotated_text(text: str, colour: Colour, font: Font, length: int, anchor: str = "mm") -> Image.Image:
    """Draw text from the bottom to the top of a picture of this height."""
    picture = Image.new("RGB", (max(length, 1), _SIZE + 8), "white")
    ImageDraw.Draw(picture).text((0 if anchor == "lm" else length / 2, _SIZE / 2 + 4), text, colour, font, anchor)
    return picture.transpose(Image.Transpose.ROTATE_90)
