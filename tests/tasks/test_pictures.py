"""Pictures: every kind of file becomes upright RGB, broken ones are named, changes fit boxes and masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ticktune.errors import DataError, Problem
from ticktune.tasks.pictures import Change, check_pictures, read_picture

SIZE = (13, 9)  # width, height: odd, and not square


def where(i: int) -> str:
    return f"rows.jsonl:{i + 1}"


def noise(size: tuple[int, int] = SIZE, channels: int = 3) -> Image.Image:
    """A picture of random colours."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def saved(image: Image.Image, path: Path, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


# Reading


def test_a_grey_picture_has_three_equal_channels(tmp_path: Path) -> None:
    grey = noise(channels=1)
    found = read_picture(saved(grey, tmp_path / "a.png"))
    assert (found.mode, found.size) == ("RGB", SIZE)
    assert (np.asarray(found) == np.asarray(grey)[..., None]).all()


def test_of_a_transparent_picture_the_colours_are_kept(tmp_path: Path) -> None:
    image = noise(channels=4)
    found = read_picture(saved(image, tmp_path / "a.png"))
    assert (np.asarray(found) == np.asarray(image)[..., :3]).all()


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(200))}])
def test_a_palette_becomes_its_colours_without_a_warning(tmp_path: Path, options: dict[str, Any]) -> None:
    image = noise().quantize(200)
    expected = np.asarray(image.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(image)]
    assert (np.asarray(read_picture(saved(image, tmp_path / "a.png", **options))) == expected).all()


def test_two_tones_become_black_and_white(tmp_path: Path) -> None:
    image = noise(channels=1).convert("1")
    found = read_picture(saved(image, tmp_path / "a.png"))
    assert (np.asarray(found)[..., 1] == 255 * np.asarray(image)).all()


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path, orientation: int, upright: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise()
    path = saved(image, tmp_path / "a.png", exif=exif)
    found = read_picture(path)
    assert (np.asarray(found) == upright(np.asarray(image))).all()
    assert check_pictures([path], where) == [found.size]


def test_a_picture_in_cmyk_is_read(tmp_path: Path) -> None:
    assert read_picture(saved(noise().convert("CMYK"), tmp_path / "a.jpg")).mode == "RGB"


def broken(folder: Path, kind: str) -> str:
    """A file of which the end is missing, one of text, or an empty one."""
    path = folder / f"b.{kind if kind in ('png', 'jpg') else 'png'}"
    if kind in ("png", "jpg"):
        whole = saved(noise((64, 64)), path)
        data = Path(whole).read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    else:
        path.write_bytes(b"no picture" if kind == "text" else b"")
    return str(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "text", "empty"])
def test_a_broken_file_is_named_by_its_row_before_anything_is_trained(tmp_path: Path, kind: str) -> None:
    good = saved(noise(), tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        check_pictures([good, broken(tmp_path, kind)], where)
    (problem,) = caught.value.problems
    assert problem.where == "rows.jsonl:2"
    if kind in ("png", "jpg"):
        assert "this picture cannot be read: " in problem.message
        assert "truncated" in problem.message
        assert problem.fix == f"replace {tmp_path}/b.{kind}, or remove the row"
    else:
        assert problem == Problem(f"this is no picture: {tmp_path}/b.png", "rows.jsonl:2")


def test_a_picture_that_breaks_later_is_named_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jpg: this picture cannot be read"):
        read_picture(broken(tmp_path, "jpg"))


def test_a_good_large_jpeg_passes(tmp_path: Path) -> None:
    assert check_pictures([saved(noise((200, 100)), tmp_path / "a.jpg")], where) == [(200, 100)]


# Changes

ALL = {"flip": 0.5, "crop": 0.5, "jitter": 0.5}


def facts(change: Change) -> tuple[Any, ...]:
    return change.box, change.flip, change.factors


def test_without_a_seed_nothing_changes() -> None:
    image = noise()
    change = Change(ALL, None, 3, SIZE)
    boxes = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert (np.asarray(change.picture(image)) == np.asarray(image)).all()
    assert (change.boxes(boxes)[0] == boxes).all()


def test_a_change_is_a_function_of_seed_and_row() -> None:
    assert facts(Change(ALL, 7, 3, SIZE)) == facts(Change(ALL, 7, 3, SIZE))
    assert facts(Change(ALL, 7, 3, SIZE)) != facts(Change(ALL, 8, 3, SIZE))
    assert facts(Change(ALL, 7, 3, SIZE)) != facts(Change(ALL, 7, 4, SIZE))


def test_strengths_of_zero_change_nothing() -> None:
    assert facts(Change({"flip": 0.0, "crop": 0.0, "jitter": 0.0}, 7, 3, SIZE)) == ((0, 0, *SIZE), False, (1, 1, 1))


def test_half_of_the_pictures_are_mirrored() -> None:
    share = np.mean([Change({"flip": 0.5}, 0, row, SIZE).flip for row in range(400)])
    assert 0.4 < share < 0.6
    assert all(Change({"flip": 1.0}, 0, row, SIZE).flip for row in range(20))


def test_a_cut_leaves_at_least_the_share_that_it_may_and_lies_inside() -> None:
    size = (200, 100)
    boxes = np.array([Change({"crop": 0.3}, 1, row, size).box for row in range(200)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= 200).all()
    assert (boxes[:, 3] <= 100).all()
    assert 140 <= widths.min() < 150
    assert 70 <= heights.min() < 75
    assert boxes[:, 0].max() > 30


def test_everything_cut_away_leaves_a_pixel() -> None:
    for row in range(50):
        assert min(Change({"crop": 1.0}, 1, row, (2, 1)).picture(noise((2, 1))).size) >= 1


@pytest.mark.parametrize("row", range(6))
def test_a_picture_is_cut_then_mirrored(row: int) -> None:
    change = Change({"flip": 0.5, "crop": 0.5}, 5, row, SIZE)
    left, top, right, bottom = change.box
    expected = np.asarray(noise())[top:bottom, left:right]
    expected = expected[:, ::-1] if change.flip else expected
    assert (np.asarray(change.picture(noise())) == expected).all()


def test_jitter_is_brightness_then_contrast_then_colour_within_its_strength() -> None:
    factors = np.array([Change({"jitter": 0.4}, 2, row, SIZE).factors for row in range(200)])
    assert (factors >= 0.6).all()
    assert (factors <= 1.4).all()
    assert (factors.max(0) > 1.35).all()
    assert (factors.min(0) < 0.65).all()
    change = Change({"jitter": 0.4}, 2, 0, SIZE)
    brightness, contrast, colour = change.factors
    expected = ImageEnhance.Brightness(noise()).enhance(brightness)
    expected = ImageEnhance.Color(ImageEnhance.Contrast(expected).enhance(contrast)).enhance(colour)
    assert (np.asarray(change.picture(noise())) == np.asarray(expected)).all()


def test_the_values_of_a_mask_stay() -> None:
    mask = noise(channels=1)
    change = Change({"flip": 1.0, "jitter": 0.9}, 2, 0, SIZE)
    assert (np.asarray(change.shape(mask)) == np.asarray(ImageOps.mirror(mask))).all()


@pytest.mark.parametrize("row", range(8))
def test_a_box_goes_where_its_pixels_go(row: int) -> None:
    size = (40, 30)
    change = Change({"flip": 0.5, "crop": 0.6}, 11, row, size)
    rng = np.random.default_rng(row)
    boxes = np.array([[x, y, w, h] for x, y, w, h in rng.integers(1, 15, (20, 4))], dtype=float)
    found, kept = change.boxes(boxes)
    assert len(found) == kept.sum()
    expected, left = [], []
    for x, y, w, h in boxes.astype(int):
        mask = np.zeros((30, 40), dtype=np.uint8)
        mask[y : y + h, x : x + w] = 1
        rows, columns = np.nonzero(np.asarray(change.shape(Image.fromarray(mask))))
        left.append(len(rows) > 0.25 * w * h)
        if left[-1]:
            x, y = columns.min(), rows.min()
            expected.append([x, y, columns.max() + 1 - x, rows.max() + 1 - y])
    assert kept.tolist() == left
    assert np.array_equal(found, np.array(expected, dtype=float).reshape(-1, 4))


def test_no_boxes_stay_no_boxes() -> None:
    found, kept = Change({"flip": 1.0}, 1, 0, SIZE).boxes(np.zeros((0, 4)))
    assert (found.shape, kept.shape) == ((0, 4), (0,))
