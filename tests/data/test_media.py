"""Folders of pictures and sound: classes, metadata, files that are missing, and what their digest depends on."""

from pathlib import Path

import pytest

from ticktune.data.media import digest_of, read_classes
from ticktune.data.read import Rows, read_rows
from ticktune.errors import DataError, Problem
from ticktune.recipe.schema import Source
from ticktune.registry import TASKS

PICTURES = TASKS["image-classification"]


def write(folder: Path, **files: str) -> Path:
    """Files by ``class__name_ending`` keyword: two underscores are a slash, one before the ending is a dot."""
    for name, content in files.items():
        stem, _, ending = name.replace("__", "/").rpartition("_")
        path = folder / f"{stem}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def read(folder: Path, path: str = ".", *, labelled: bool = True, limit: int | None = None) -> Rows:
    return read_rows(Source(path=path, limit=limit), PICTURES, {}, relative_to=folder, labelled=labelled)


def refused(folder: Path, path: str = ".") -> Problem:
    with pytest.raises(DataError) as caught:
        read(folder, path)
    (problem,) = caught.value.problems
    return Problem(*(text.replace(str(folder), "F") for text in (problem.message, problem.where, problem.fix)))


# A folder for each class


def test_the_names_of_subfolders_are_labels_in_order(tmp_path: Path) -> None:
    write(tmp_path, dog__b_png="1", dog__a_JPG="2", cat__deep__c_webp="3", cat__notes_txt="4", _hidden__d_png="5")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/e.png").write_text("6")
    rows = read(tmp_path)
    assert [(Path(r["image"]).relative_to(tmp_path).as_posix(), r["label"]) for r in list(rows.records())] == [
        ("_hidden/d.png", "_hidden"),
        ("cat/deep/c.webp", "cat"),
        ("dog/a.JPG", "dog"),
        ("dog/b.png", "dog"),
    ]


def test_a_row_of_such_a_folder_is_told_by_its_file(tmp_path: Path) -> None:
    rows = read(write(tmp_path, dog__b_png="1", cat__a_png="2"))
    assert (rows.by_file, rows.where(0)) == (True, str(tmp_path / "cat/a.png"))


def test_only_the_first_rows_are_read_where_a_limit_says_so(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, a__1_png="", a__2_png="", b__3_png=""), limit=2)) == 2


def test_a_folder_without_pictures_says_what_it_should_hold(tmp_path: Path) -> None:
    write(tmp_path, dog__a_txt="1", b_png="2")
    assert refused(tmp_path) == Problem(
        "expected metadata.jsonl or metadata.csv, or a subfolder of image files for each label",
        "F",
        "image files end in .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff",
    )


def test_sound_is_told_from_pictures(tmp_path: Path) -> None:
    write(tmp_path, dog__a_wav="1", dog__a_png="2")
    assert [r["audio"] for _, r in read_classes(tmp_path, "audio")] == ["dog/a.wav"]


# A file that lists them


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "x/a.png", "label": "cat"}\n\n{"file_name": "b.png", "label": "dog"}\n'),
        ("metadata.csv", "file_name,label\nx/a.png,cat\nb.png,dog\n"),
    ],
)
def test_metadata_name_the_files_beside_them(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, x__a_png="1", b_png="2", c_png="3")
    (tmp_path / name).write_text(content)
    rows = read(tmp_path)
    assert list(rows.records()) == [
        {"image": str(tmp_path / "x/a.png"), "label": "cat"},
        {"image": str(tmp_path / "b.png"), "label": "dog"},
    ]
    assert rows.where(1) == f"{tmp_path}/{name}:3"


def test_any_file_of_rows_may_name_files(tmp_path: Path) -> None:
    write(tmp_path / "pictures", a_png="1")
    (tmp_path / "rows.jsonl").write_text('{"image": "pictures/a.png", "label": "cat"}\n')
    assert list(read(tmp_path, "rows.jsonl").records()) == [{"image": str(tmp_path / "pictures/a.png"), "label": "cat"}]


def test_an_absolute_path_stays(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", a_png="1")
    (tmp_path / "rows.csv").write_text(f"image,label\n{tmp_path}/elsewhere/a.png,cat\n")
    assert list(read(tmp_path, "rows.csv").records())[0]["image"] == f"{tmp_path}/elsewhere/a.png"


@pytest.mark.parametrize("name", ["b.png", "", "x"])
def test_a_file_that_is_missing_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    write(tmp_path, a_png="1", x__a_png="2")
    lines = [f'{{"file_name": "{n}", "label": "cat"}}' for n in ("a.png", name)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    place = f"F/{name}" if name else "F"
    assert refused(tmp_path) == Problem(
        f"there is no file {name!r} (image)", "F/metadata.jsonl:2", f"it was looked for at {place}"
    )


def test_metadata_without_file_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path, a_png="1")
    (tmp_path / "metadata.jsonl").write_text('{"label": "cat"}\n')
    assert refused(tmp_path).message == "there is no file '' (image)"


def test_rows_without_answers_need_no_labels(tmp_path: Path) -> None:
    write(tmp_path, a_png="1")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    assert read(tmp_path, labelled=False).columns == ("image",)


# The digest


def test_the_digest_changes_with_a_picture_a_label_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "one", cat__a_png="1", dog__b_png="2")
    write(tmp_path / "same", cat__a_png="1", dog__b_png="2")
    write(tmp_path / "other", cat__a_png="1", dog__b_png="3")
    one, same, other = (read(tmp_path, name).sha256 for name in ("one", "same", "other"))
    assert (one == same, one == other) == (True, False)


@pytest.mark.parametrize("metadata", [False, True])
def test_the_digest_knows_the_labels(tmp_path: Path, metadata: bool) -> None:
    for name, label in (("one", "cat"), ("other", "dog")):
        if metadata:
            write(tmp_path / name, a_png="1")
            (tmp_path / name / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "label": "{label}"}}\n')
        else:
            write(tmp_path / name, **{f"{label}__a_png": "1"})
    assert read(tmp_path, "one").sha256 != read(tmp_path, "other").sha256


def test_the_digest_is_one_of_contents_in_order(tmp_path: Path) -> None:
    write(tmp_path, a_png="1", b_png="2")
    one, two = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert digest_of(iter([one, two]), "") != digest_of(iter([two, one]), "")
    assert digest_of(iter([one]), "x") != digest_of(iter([one]), "y")
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        digest_of(iter([str(tmp_path / "gone.png")]), "")
