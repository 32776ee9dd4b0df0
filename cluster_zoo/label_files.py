"""Images with any number of labels each, named in CSV files.

    file,labels
    train/beach.jpg,sea;sand;sky
    train/desk.jpg,

Paths are relative to the data directory. An image without labels has none of the classes.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from .errors import DataError, quoted

__all__ = ['LabelFileReader', 'read_label_files']


def read_label_files(files: Sequence[str | Path]) -> dict[str, list[str]]:
    """Reads CSV files with the columns ``file`` and ``labels``.

    Args:
        files: The CSV files, which are read as one.

    Returns:
        The labels of each file name.

    Raises:
        DataError: A file cannot be read, has other columns, no rows, or names an image twice.
    """
    labels: dict[str, list[str]] = {}
    for path in files:
        try:
            with open(path, newline='', encoding='utf-8-sig') as file:
                rows = csv.DictReader(file)
                if rows.fieldnames is None or not {'file', 'labels'} <= set(rows.fieldnames):
                    raise DataError(f"{path} must start with the line 'file,labels', not {quoted(rows.fieldnames)}.")
                for row in rows:
                    if not row['file'] or row['labels'] is None or any(row.get(None, ())):
                        raise DataError(
                            f'{path}, line {rows.line_num}: expected a file and its labels, with ; between labels.'
                        )
                    name = os.path.normpath(row['file'])
                    if name in labels:
                        raise DataError(f'{path}, line {rows.line_num}: {name} has labels already.')
                    labels[name] = [label for label in map(str.strip, row['labels'].split(';')) if label]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f'{path} cannot be read: {error}') from error
    if not any(labels.values()):
        raise DataError(f'{", ".join(map(str, files))}: no file has a label.')
    return labels


class LabelFileReader(Reader):
    """timm's interface of images whose labels are in CSV files.

    Args:
        root: Folder of a split; rows that name images elsewhere belong to other splits.
        data_dir: Folder that the file names are relative to.
        files: The CSV files, see `read_label_files`.
        class_map: Mapping from labels to indices, a file or a dictionary; sorted labels by default.

    Attributes:
        samples: Path and target of each image. A target is float32 [K], 1 for each label of the image and 0 otherwise.
        class_to_idx: Index of each label.

    Raises:
        DataError: An image does not exist or is no file, a label is not in the class map, or no row names an image of
            this split.
    """

    def __init__(
        self,
        root: str | Path,
        data_dir: str | Path,
        files: Sequence[str | Path],
        class_map: str | dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.root, source = str(root), ', '.join(map(str, files))
        labels = read_label_files(files)
        found = sorted({label for named in labels.values() for label in named}, key=natural_key)
        known = load_class_map(class_map, self.root) if class_map else {label: i for i, label in enumerate(found)}
        if unknown := [label for label in found if label not in known]:
            raise DataError(f'{source}: {len(unknown)} labels are not among the classes, such as {quoted(unknown[0])}.')
        self.class_to_idx, self.samples, missing = known, [], []
        for name in sorted(labels, key=natural_key):
            path = Path(data_dir, name)
            if not path.is_relative_to(self.root):
                continue
            if not path.is_file():
                missing.append(str(path))
            target = torch.zeros(max(known.values()) + 1)
            target[[known[label] for label in labels[name]]] = 1.0
            self.samples.append((str(path), target))
        if missing:
            raise DataError(f'{source}: {len(missing)} images do not exist or are no files, such as {missing[0]}.')
        if not self.samples:
            raise DataError(f'{source} names no images in {root}: names must be relative to {data_dir}.')

    def __getitem__(self, index: int) -> tuple:
        path, target = self.samples[index]
        return open(path, 'rb'), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)
