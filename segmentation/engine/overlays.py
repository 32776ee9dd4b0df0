"""Images of predictions: image, labels and prediction side by side, with a legend."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.datasets import SegmentationDataset

__all__ = ['OverlayWriter', 'check_output_folder', 'draw_overlay']

_OPACITY = 0.55
_MARGIN = 10  # pixels
_BACKGROUND, _TEXT = (255, 255, 255), (30, 30, 30)


def draw_overlay(
    image: Tensor,
    mask: Tensor,
    classes: Sequence[str],
    colours: Sequence[Sequence[int]] | np.ndarray | Tensor,
    truth: Tensor | None = None,
    name: str = '',
) -> Image.Image:
    """Draws predicted and true classes as half-transparent colors over an image.

    Args:
        image: uint8 [3, H, W].
        mask: Predicted classes [H, W].
        classes: Names of the K classes.
        colours: RGB color of each class, 0..255, [K, 3].
        truth: True classes [H, W]. Labels of K and above are ignored pixels and drawn black.
        name: Title of the image, such as its file name.

    Returns:
        Panels with the image, the true classes if given, and the prediction, above a legend of the classes in them.
    """
    # One more color, for all labels that are not a class
    palette = np.concatenate([np.asarray(colours, dtype=np.uint8).reshape(-1, 3), np.zeros((1, 3), np.uint8)])
    base = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    panels, present = {name or 'image': base}, set()
    for title, labels in dict(truth=truth, prediction=mask).items():
        if labels is not None:
            indices = labels.cpu().numpy().clip(0, len(classes))
            panels[title] = Image.blend(base, Image.fromarray(palette[indices]), _OPACITY)
            present |= set(np.unique(indices).tolist())
    names = [*classes, 'no label']
    return _arrange(panels, [(names[k], tuple(palette[k].tolist())) for k in sorted(present)])


def _arrange(panels: dict[str, Image.Image], legend: list[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """Draws panels of equal size side by side under their titles, and the legend below, in as many lines as needed."""
    width, height = next(iter(panels.values())).size
    font = ImageFont.load_default(min(28, max(12, width // 30)))
    line = round(1.6 * font.size)
    step = max(width, *(round(font.getlength(title)) for title in panels)) + _MARGIN  # from one panel to the next
    swatch, gap = font.size, _MARGIN // 2
    lengths = [swatch + gap + round(font.getlength(name)) for name, _ in legend]
    total = max(_MARGIN + step * len(panels), 2 * _MARGIN + max(lengths))
    positions, x, y = [], _MARGIN, line + height + _MARGIN
    for length in lengths:
        if x > _MARGIN and x + length > total - _MARGIN:
            x, y = _MARGIN, y + line
        positions.append((x, y + line // 2))
        x += length + 2 * _MARGIN
    canvas = Image.new('RGB', (total, y + line + gap), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, (title, panel) in enumerate(panels.items()):
        left = _MARGIN + column * step
        draw.text((left, line // 2), title, _TEXT, font, anchor='lm')
        canvas.paste(panel, (left, line))
    for (name, color), (x, y) in zip(legend, positions):
        draw.rectangle((x, y - swatch // 2, x + swatch, y + swatch // 2), fill=color, outline=_TEXT)
        draw.text((x + swatch + gap, y), name, _TEXT, font, anchor='lm')
    return canvas


def check_output_folder(folder: str | Path) -> None:
    """Creates a folder if necessary. Raises OSError unless files can be written to it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


class OverlayWriter:
    """Writes overlays of some images, evenly spaced in a dataset.

    Args:
        dataset: Images with labels. They are drawn without its transform.
        folder: Folder of the PNG files, which have the index and the name of the image. It is created if necessary.
        count: Number of images.

    Raises:
        OSError: The folder cannot be created or written to.
    """

    def __init__(self, dataset: SegmentationDataset, folder: str | Path, count: int = 4) -> None:
        self.dataset = copy.copy(dataset)
        self.dataset.transform = None
        self.folder = Path(folder)
        check_output_folder(folder)
        count = min(count, len(dataset))
        self.chosen = {len(dataset) * (2 * i + 1) // (2 * count) for i in range(count)}

    def __call__(self, index: int, prediction: Tensor) -> None:
        """Draws an image of the dataset with its predicted classes [H, W], if it is one of the chosen images."""
        if index not in self.chosen:
            return
        image, truth = self.dataset[index]
        path = Path(self.dataset.name(index))
        overlay = draw_overlay(image, prediction, self.dataset.classes, self.dataset.colours, truth, path.name)
        overlay.save(self.folder / f'{index:04d}-{path.stem}.png')
