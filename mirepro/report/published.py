"""Published values: `published/<profile>.csv`, checked line by line; an empty value means "not transcribed"."""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mirepro import files
from mirepro.errors import UserError

COLUMNS = ("paper", "version", "table", "row", "column", "value", "unit", "page", "transcribed_by", "pdf_sha256")
PROVENANCE = ("paper", "version", "table", "page", "transcribed_by")
"""What a transcribed value needs beside its place and the digest of the PDF."""

Published = dict[tuple[str, str], float]


def read(path: Path) -> Published:
    """Values by (row, column); those that nobody transcribed are left out. No file, no values.

    Raises:
        UserError: Other columns, a value that is no number or lacks its provenance, a place that is named twice.
    """
    return {place: float(line["value"]) for place, line in _lines(path).items() if line["value"]}


def check(path: Path, known: Mapping[str, Iterable[str]], pdfs: Iterable[Path] = ()) -> tuple[int, int]:
    """Checks a file against the profile's tables, and its values against the PDFs that they were read from.

    Args:
        path: The file.
        known: Columns of each row of the profile's tables.
        pdfs: Files whose sha256 the values' lines may name; none: not compared.

    Returns:
        Numbers of transcribed values and of lines.

    Raises:
        UserError: See `read`; also a value of a cell that no table has, or from a PDF that is not given.
    """
    digests = {files.sha256(pdf) for pdf in pdfs}
    lines = _lines(path)
    for (row, column), line in lines.items():
        if not line["value"]:
            continue
        if column not in known.get(row, ()):
            raise UserError(f"{path}: {row}, {column}: no table of the profile has this cell; correct the line")
        if digests and line["pdf_sha256"] not in digests:
            raise UserError(f"{path}: {row}, {column}: read from the PDF {line['pdf_sha256'][:12]}..., not from these")
    return sum(bool(line["value"]) for line in lines.values()), len(lines)


def _lines(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}: its columns are not {','.join(COLUMNS)}; restore the first line")
        found: dict[tuple[str, str], dict[str, str]] = {}
        for line in reader:
            where = f"{path}:{reader.line_num}"
            if None in line or None in line.values():
                raise UserError(f"{where}: not {len(COLUMNS)} fields; quote fields with commas")
            line = {key: value.strip() for key, value in line.items()}
            place = line["row"], line["column"]
            if not all(place) or place in found:
                raise UserError(f"{where}: row and column {place} are empty or stand twice; correct the line")
            if line["value"]:
                _value(line, where)
            found[place] = line
    return found


def _value(line: Mapping[str, str], where: str) -> None:
    try:
        finite = math.isfinite(float(line["value"]))
    except ValueError:
        finite = False
    if not finite:
        raise UserError(f"{where}: value {line['value']!r} is no number; leave it empty where nothing was transcribed")
    for key in PROVENANCE:
        if not line[key]:
            raise UserError(f"{where}: {key} is empty beside a value; say where the value was read, and by whom")
    if not re.fullmatch("[0-9a-f]{64}", line["pdf_sha256"]):
        raise UserError(f"{where}: pdf_sha256 is not the output of `sha256sum` of the PDF")
