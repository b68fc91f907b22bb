"""Conventions for folders of images: names of images, captions, metadata, and of folders with repeats. Torch-free.

The trainer reads folders by them; the operator's command checks a folder by them before a run.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".heic", ".heif", ".hif", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
"""Suffixes of the images that the trainer reads, in lower case."""
CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of the file next to an image that holds its captions, one in each line; the first that exists counts."""
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files that list the samples of a folder; the first that exists counts."""
LIST_SUFFIXES = (".jsonl", ".csv")
"""Suffixes of files that list samples and are a data set by themselves."""
FILE_NAME = "file_name"
"""Column of a list with the name of the image file; used if the image column is missing."""
SPLIT_NAMES = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Names of splits that are recognised in the paths of files."""

_HIDDEN = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found"})
"""Files and folders that operating systems and storage devices add, in lower case."""
_NOT_SAMPLES = frozenset({".json", ".jsonl", ".md", ".toml", ".yaml", ".yml", ".npz", ".lock"})
"""Suffixes of settings, notes and caches of other programs, which nobody expects to be images."""
_DELIMITERS = (",", ";", "\t")
_MAX_CELL = 1 << 24
"""Longest cell of a .csv file, in characters."""
_REPEATS = re.compile(r"([1-9][0-9]{0,2})_(.+)")


def is_hidden(name: str) -> bool:
    """Return whether a file or any of its folders is hidden or was added by an operating system, e.g. `._a.png`."""
    return any(part.startswith(".") or part.lower() in _HIDDEN for part in PurePosixPath(name).parts)


def is_image(name: str) -> bool:
    """Return whether the trainer reads a file as an image, judged by its name."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def repeats_of(name: str) -> tuple[int, str] | None:
    """Return the repeats and the rest of the name of the innermost folder with the form `10_name`; None without one.

    The number has at most three digits and does not start with 0: `2024_holiday` and `01_part` are ordinary names.
    """
    for part in reversed(PurePosixPath(name).parts[:-1]):
        if (found := _REPEATS.fullmatch(part)) is not None:
            return int(found[1]), found[2]
    return None


def caption_file_of(image: str, names: Iterable[str] | frozenset[str]) -> str | None:
    """Return the name of an image's caption file among `names`; None if there is none."""
    return next(
        (text for each in CAPTION_SUFFIXES if (text := str(PurePosixPath(image).with_suffix(each))) in names), None
    )


def split_captions(text: str) -> tuple[str, ...]:
    """Return the captions of a caption file: its lines that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def select_split(names: Sequence[str], split: str, other_splits: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Select the files of one split of a folder without metadata.

    Args:
        names: all files of the folder, relative to it.
        split: name of the split.
        other_splits: names of the job's other splits.

    Returns:
        The subfolder of the split ("" if the folder has no such subfolder), and the files below it, relative to it.
        Without the subfolder these are all files outside of the subfolders of other splits.
    """
    visible = [name for name in names if not is_hidden(name)]
    own = [name.removeprefix(f"{split}/") for name in visible if name.startswith(f"{split}/")]
    if any(is_image(name) for name in own):
        return split, own
    others = {*SPLIT_NAMES, *other_splits}
    return "", [name for name in visible if "/" not in name or name.partition("/")[0] not in others]


def unread_files(names: Sequence[str]) -> list[str]:
    """Return the files of a split that are neither images, nor captions of one, nor settings or notes."""
    present = set(names)
    captions = {
        text
        for name in names
        if is_image(name)
        for each in CAPTION_SUFFIXES
        if (text := str(PurePosixPath(name).with_suffix(each))) in present
    }
    return [
        name
        for name in names
        if not is_image(name) and name not in captions and PurePosixPath(name).suffix.lower() not in _NOT_SAMPLES
    ]


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is removed.

    Raises:
        ValueError: it is in another encoding.
    """
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding).removeprefix("\ufeff")
    text = data.decode("utf-8-sig")
    if "\0" in text:
        # Other encodings with two or four bytes per letter are valid UTF-8 if the text is ASCII.
        raise ValueError("it contains zero bytes")
    return text


def read_csv(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of the last line of each row of a .csv file, and its cells by column.

    The first line has the names of the columns. Cells are separated by the delimiter that it has most often: a comma, a
    semicolon or a tab.

    Raises:
        ValueError: a row is malformed; the message begins with its line.
    """
    header = text.lstrip().partition("\n")[0]
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(_DELIMITERS, key=header.count), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not names:
                names = [cell.strip() for cell in cells]
            elif len(cells) == len(names):
                yield reader.line_num, dict(zip(names, cells, strict=True))
            elif cells:
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} cells, and the first line has {len(names)}; write a "
                    "caption that contains the delimiter in double quotes"
                )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not valid CSV: {error}; correct this line") from error
