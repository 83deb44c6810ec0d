"""What the tasks of pictures share: reading, random changes, pixel values."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ticktune.device import mix
from ticktune.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST = 65535
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the Exif tag, and its values that exchange width and height


def check_pictures(paths: Sequence[str], where: Callable[[int], str]) -> list[tuple[int, int]]:
    """Refuses files that are no pictures, or only the beginning of one.

    Returns:
        Width and height of each in pixels, upright.

    Raises:
        DataError: Naming the first such row.
    """
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    sizes = []
    for i, path in enumerate(paths):
        try:
            with images.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
                # A JPEG is decoded at an eighth of its size: its end shows all the same, in a third of the time.
                image.draft("RGB", (width // 8, height // 8))
                image.load()
        except UnidentifiedImageError as error:
            raise DataError(f"this is no picture: {path}", where=where(i)) from error
        except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
            raise DataError(
                f"this picture cannot be read: {error}", where=where(i), fix=f"replace {path}, or remove the row"
            ) from error
        sizes.append((height, width) if turned else (width, height))
    return sizes


def read_picture(path: str) -> "Image":
    """A picture in RGB, upright as its camera says; what is transparent shows the colour under it.

    Raises:
        DataError: It cannot be decoded.
    """
    from PIL import Image as images
    from PIL import ImageOps

    try:
        with images.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # Pillow warns where this step is left out
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise DataError(f"this picture cannot be read: {error}", where=path) from error


class Change:
    """A random change of one picture, the same for its boxes and masks.

    Args:
        augment: Strengths; see :class:`ticktune.recipe.schema.Augment`.
        seed: Of what is random; None: nothing changes.
        row: Number of the example, so that each has its own change.
        size: Width and height in pixels.
    """

    def __init__(self, augment: Mapping[str, float], seed: int | None, row: int, size: tuple[int, int]) -> None:
        width, height = size
        self.box = (0, 0, width, height)
        self.flip = False
        self.factors = (1.0, 1.0, 1.0)
        if seed is None:
            return
        rng = np.random.default_rng(mix(seed, row))
        self.flip = bool(rng.random() < augment.get("flip", 0.0))
        cut = rng.random(4)
        share = augment.get("crop", 0.0)
        if share:
            kept_width = max(1, round(width * (1 - share * cut[0])))
            kept_height = max(1, round(height * (1 - share * cut[1])))
            left, top = round((width - kept_width) * cut[2]), round((height - kept_height) * cut[3])
            self.box = (left, top, left + kept_width, top + kept_height)
        jitter = augment.get("jitter", 0.0)
        brightness, contrast, colour = (1 + jitter * rng.uniform(-1, 1, 3)).tolist()
        self.factors = (brightness, contrast, colour)

    def picture(self, image: "Image") -> "Image":
        """The changed picture."""
        from PIL import ImageEnhance

        image = self.shape(image)
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for kind, factor in zip(kinds, self.factors, strict=True):
            if factor != 1.0:
                image = kind(image).enhance(factor)
        return image

    def shape(self, image: "Image") -> "Image":
        """A mask, or a picture, cut and mirrored; its colours stay."""
        from PIL import ImageOps

        if self.box != (0, 0, *image.size):
            image = image.crop(self.box)
        return ImageOps.mirror(image) if self.flip else image

    def boxes(self, boxes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Boxes (n, 4) as left, top, width, height in pixels, cut and mirrored; and which of them are left."""
        left, top, right, bottom = self.box
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners[:, 0::2] = corners[:, 0::2].clip(left, right) - left
        corners[:, 1::2] = corners[:, 1::2].clip(top, bottom) - top
        if self.flip:
            corners[:, 0::2] = (right - left) - corners[:, 2::-2]
        sizes = corners[:, 2:] - corners[:, :2]
        whole = np.maximum(boxes[:, 2] * boxes[:, 3], 1e-9)
        # Less than a quarter of a thing is no longer the thing.
        kept = sizes.prod(axis=1) / whole > 0.25
        return np.concatenate([corners[:, :2], sizes], axis=1)[kept], kept


def pixel_values(processor: Any, images: Sequence["Image"]) -> Tensor:
    """What a model takes of pictures: (batch, channels, height, width) float32.

    Raises:
        DataError: The processor gives pictures of several sizes.
    """
    values = processor(list(images), return_tensors="pt")["pixel_values"]
    if not isinstance(values, torch.Tensor):
        raise DataError("the base's image processor gives no tensor of pixels")
    return values


def seen_picture(processor: Any, values: Tensor) -> "Image":
    """What a model sees, as a picture: its pixel values, with scaling and normalisation undone.

    Args:
        processor: It made the values.
        values: (channels, height, width) float32.

    Raises:
        UsageError: The processor gives no grid of pixels.
    """
    from PIL import Image as images

    if values.ndim != 3 or len(values) not in (1, 3):
        shape = " x ".join(map(str, values.shape))
        raise UsageError(
            f"the base's image processor gives no picture of 1 or 3 channels but {shape} numbers", where="--draw"
        )
    if getattr(processor, "do_normalize", False):
        mean, spread = (torch.tensor(getattr(processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        values = values * spread + mean
    if getattr(processor, "do_rescale", False):
        values = values / processor.rescale_factor
    pixels = values.round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return images.fromarray(pixels.movedim(0, -1).contiguous().numpy())


def enlarged(image: "Image", least: int = 320) -> "Image":
    """A small picture with every pixel as a square, so that its sides are ``least`` pixels or more."""
    from PIL.Image import Resampling

    factor = -(-least // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Resampling.NEAREST) if factor > 1 else image


def draw_boxes(image: "Image", boxes: Sequence[tuple[Sequence[float], str, int]]) -> None:
    """Draws boxes with labels on a picture, the last one on top.

    Args:
        image: Is changed.
        boxes: Of each: left, top, width and height in pixels; what is written; its class, for the colour.
    """
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    for (left, top, width, height), text, number in boxes:
        color = class_color(number)
        pen.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), outline=color, width=2)
        write_on(image, (round(left), round(top)), text, color)


def read_mask(path: str, where: str) -> "np.ndarray[Any, Any]":
    """The values of a mask, (height, width) uint16: of one channel, or the places in a palette.

    Raises:
        DataError: It cannot be read, has several channels, or values outside 0 to 65535.
    """
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        with images.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise DataError(f"this mask cannot be read: {error}", where=where) from error
    if values.ndim != 2 or values.dtype.kind == "f":
        raise DataError(
            f"expected a mask of one channel of whole numbers, found the mode {mode}",
            where=where,
            fix=f"save {path} as a PNG whose pixel values are the classes' numbers",
        )
    if values.size and (values.min() < 0 or values.max() > _LARGEST):
        worst = values.min() if values.min() < 0 else values.max()
        raise DataError(f"expected values of 0 to {_LARGEST} in the mask, found {worst}", where=where)
    return values.astype(np.uint16)


def class_color(number: int) -> tuple[int, int, int]:
    """A colour for a class: neighbours in number are far apart in hue."""
    import colorsys

    # Steps of the golden ratio never meet again; the brightness tells hues apart that come close.
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, (1.0, 0.75, 0.5)[number % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def write_on(image: "Image", place: tuple[int, int], text: str, color: tuple[int, int, int]) -> tuple[int, int]:
    """Writes text in black or white on a box of a colour; returns the place of the box's right lower corner.

    Args:
        image: Is changed.
        place: Left and upper edge of the box; it is moved inwards where it would reach beyond the picture.
        text: Letters that Pillow's own font lacks become question marks.
        color: Of the box.
    """
    from PIL import ImageDraw

    pen = ImageDraw.Draw(image)
    text = text.encode("latin-1", "replace").decode("latin-1")
    left, top, right, bottom = pen.textbbox((2, 1), text)
    width, height = int(right + left), int(bottom + 3)
    x, y = max(0, min(place[0], image.width - width)), max(0, min(place[1], image.height - height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]  # blue looks darker than green
    ink = (0, 0, 0) if luma > 128 else (255, 255, 255)
    pen.text((x + 2, y + 1), text, fill=ink)
    return x + width, y + height


def legend_below(image: "Image", entries: Sequence[tuple[str, tuple[int, int, int]]]) -> "Image":
    """A picture with names on boxes of their colours below it, one a line."""
    from PIL import Image as images

    line = 16
    whole = images.new("RGB", (image.width, image.height + line * len(entries)), (255, 255, 255))
    whole.paste(image, (0, 0))
    for i, (name, color) in enumerate(entries):
        write_on(whole, (2, image.height + line * i + 1), name, color)
    return whole
