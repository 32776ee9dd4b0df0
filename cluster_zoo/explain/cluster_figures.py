"""Figures of clusters: outlines over a photograph, what clusters add to a class, a page of all stages, a film."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .centers import CenterView, Patch
from .contributions import Contributions
from .explained import Explained
from .maps import ClusterMap, ClusterMaps
from .segments import Segments, compose

__all__ = ['draw_center', 'draw_clusters', 'draw_contributions', 'draw_film', 'draw_page']

_TEXT, _FAINT = '#1c1e21', '#70767d'
_POSITIVE, _NEGATIVE = (0, 130, 110), (200, 80, 30)
_GAP = 16  # pixels
_FILTER = Image.Resampling.LANCZOS

_font = functools.cache(ImageFont.load_default)


def draw_clusters(image: Image.Image, labels: np.ndarray, opacity: float = 0.7, line: int = 2) -> Image.Image:
    """Draws groups of pixels: each group in the mean color of its pixels, with an outline.

    Args:
        image: The image.
        labels: Group of each pixel, integers [height, width], for example of `segments` or `ClusterMaps.at_pixels`.
        opacity: Weight of the mean color, 0 .. 1.
        line: Width of the outlines in pixels; 0 for none.

    Returns:
        An RGB image of the size of ``image``.

    Raises:
        ValueError: The labels have another size.
    """
    pixels = np.asarray(image.convert('RGB'), np.float64)
    if labels.shape != pixels.shape[:2]:
        raise ValueError(f'Expected labels {list(pixels.shape[:2])}, the size of the image, got {list(labels.shape)}.')
    _present, group = np.unique(labels, return_inverse=True)
    group = group.reshape(labels.shape)
    count = np.bincount(group.flatten())
    mean = np.stack([np.bincount(group.flatten(), pixels[..., c].flatten()) / count for c in range(3)], axis=-1)
    pixels = (1 - opacity) * pixels + opacity * mean[group]
    return _outline(Image.fromarray(pixels.round().astype(np.uint8)), labels, line)


def _outline(image: Image.Image, labels: np.ndarray, line: int) -> Image.Image:
    """Draws white lines with a dark border where labels change."""
    if line < 1:
        return image
    pixels = np.array(image)
    for width, color in ((2 * line, (40, 40, 44)), (line, (255, 255, 255))):
        pixels[_edges(labels, width)] = color
    return Image.fromarray(pixels)


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels within ``width / 2`` of a change of labels along an axis."""
    edge = np.zeros(labels.shape, bool)
    for shift in range(1, width + 1):
        before, after = shift // 2, shift - shift // 2  # pixels on both sides of the change
        for axis in (0, 1):
            change = np.swapaxes(np.diff(labels, axis=axis) != 0, 0, axis)
            target = np.swapaxes(edge, 0, axis)
            for step in range(-before + 1, after + 1):
                rows = np.arange(len(change)) + step
                keep = (rows >= 0) & (rows < len(target))
                target[rows[keep]] |= change[keep]
    return edge


def draw_contributions(image: Image.Image, maps: ClusterMaps, parts: Contributions, line: int = 2) -> Image.Image:
    """Draws what each cluster of the last stage adds to a logit: green adds, orange takes away.

    Args:
        image: The image at any size.
        maps: Its maps.
        parts: Result of `contributions`.
        line: Width of the outlines in pixels; 0 for none.

    Returns:
        An RGB image of the size of ``image``, with the value of each cluster.
    """
    labels = maps.at_pixels(parts.center, maps.at(-1).stride, image.size)
    gray = np.asarray(image.convert('L').convert('RGB'), np.float64)
    share = parts.clusters / max(np.abs(parts.clusters).max(), 1e-12)
    color = np.where(share[:, None] < 0, _NEGATIVE, _POSITIVE)
    weight = 0.75 * np.abs(share)[labels][..., None]
    figure = _outline(
        Image.fromarray(((1 - weight) * gray + weight * color[labels]).round().astype(np.uint8)), labels, line
    )
    draw, size = ImageDraw.Draw(figure), max(12, image.width // 22)
    for center in np.unique(labels):
        rows, columns = np.nonzero(parts.center == center)
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        place = (columns[middle], rows[middle])
        x, y = (
            min((point + 0.5) * maps.at(-1).stride, given) * shown / given
            for point, given, shown in zip(place, reversed(maps.inputs.shape[-2:]), image.size)
        )
        text, half = f'{parts.clusters[center]:+.2f}', _font(size).getlength('+0.00') / 2
        x, y = min(max(x, half), image.width - half), min(max(y, size), image.height - size)
        draw.text((x, y), text, 'white', _font(size), 'mm', stroke_width=2, stroke_fill=_TEXT)
    return figure


def draw_page(
    explained: Sequence[Explained],
    stage: int | None = None,
    block: int | None = None,
    head: int = 0,
    every: bool = False,
    groups: Segments | None = None,
) -> Image.Image:
    """Draws images, the clusters of their points in each stage, and what the clusters add to the class.

    One image has its panels in rows of three or four, several images have one row each. A model with cluster pooling
    has a panel of the points of the last stage that all pixels end in. Groups too fine for outlines have only colors.

    Args:
        explained: Results of `explain_image` for a model with clusters.
        stage: Only this stage, negative from the end, with all its layers if ``block`` is None.
        block: This block of each stage; by default the last one.
        head: Head of the blocks.
        every: All blocks and poolings.
        groups: Segments of the only image, for one more panel.

    Returns:
        An RGB image, 1,600 pixels wide for one image.

    Raises:
        ValueError: There is no such stage, block or head.
    """
    one, size = len(explained) == 1, 22 if len(explained) == 1 else 17
    rows: list[list[Image.Image]] = []
    for image in explained:
        chosen = _chosen(image.maps, stage, block, every)
        pools = any(found.block is None for found in image.maps.maps)
        count = 1 + len(chosen) + pools + bool(groups) + bool(image.parts)
        columns = (3 if count <= 6 else 4) if one else count
        width = (1600 - _GAP) // columns - _GAP if one else 300
        photo = image.image.resize((width, round(width * image.image.height / image.image.width)), _FILTER)
        tiles = [_titled(photo, image.caption, size, _TEXT)]
        for found in chosen:
            labels = image.maps.at_pixels(found.of_head(head), found.stride, photo.size)
            tile = _draw_labels(photo, labels)
            tiles.append(_titled(tile, f'{found.name}: {found.grid[0] * found.grid[1]} centers', size))
        if pools:
            ends = compose(image.maps)
            tile = _draw_labels(photo, image.maps.at_pixels(ends, image.maps.at(0).stride, photo.size))
            tiles.append(_titled(tile, f'all poolings: {len(np.unique(ends))} points', size))
        if groups:
            tiles.append(_titled(_draw_labels(photo, _resize(groups.labels, photo.size)), f'{groups.k} segments', size))
        if image.parts:
            title = f'{image.parts.class_name}: logit {image.parts.logit:.2f}'
            tiles.append(_titled(draw_contributions(photo, image.maps, image.parts), title, size))
        rows += [tiles[start : start + columns] for start in range(0, count, columns)]
    note = (
        f'The points of one center (head {head}) have the mean color of their pixels and, if not too small, an outline.'
    )
    if explained[0].parts:
        what = explained[0].parts.class_name if one else 'the class'
        note += f' Last: what the clusters of the last block add to the logit of {what}, green more and orange less.'
    return _arrange(rows, note, size - 3)


def _chosen(maps: ClusterMaps, stage: int | None, block: int | None, every: bool) -> list[ClusterMap]:
    stages = sorted({found.stage for found in maps.maps}) if stage is None else [maps.at(stage).stage]
    if every or (stage is not None and block is None):
        return [found for found in maps.maps if found.stage in stages]
    return [maps.at(one, -1 if block is None else block) for one in stages]


def _draw_labels(image: Image.Image, labels: np.ndarray) -> Image.Image:
    changes = (labels[:, 1:] != labels[:, :-1]).mean()
    if changes > 0.045:  # outlines would hide the groups, which only their colors can show
        return draw_clusters(image, labels, opacity=0.9, line=0)
    return draw_clusters(image, labels, opacity=0.6, line=1 if changes > 0.03 else 2)


def _arrange(rows: list[list[Image.Image]], note: str, size: int) -> Image.Image:
    """Arranges tiles of one width in rows above a note."""
    step = rows[0][0].width + _GAP
    width = _GAP + step * max(map(len, rows))
    lines = _wrap(note, width - 2 * _GAP, size)
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new('RGB', (width, 2 * _GAP + sum(heights) + len(lines) * (size + 7)), 'white')
    top = _GAP
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * step, top))
        top += height
    for number, text in enumerate(lines):
        ImageDraw.Draw(sheet).text((_GAP, top + number * (size + 7)), text, _FAINT, _font(size))
    return sheet


def draw_center(image: Image.Image, view: CenterView, patches: Sequence[Patch] = ()) -> Image.Image:
    """Draws how similar the points of an image are to one center, and the most similar patches of other images.

    Args:
        image: The image of the view, RGB.
        view: Result of `center_view`.
        patches: Result of `similar_patches`.

    Returns:
        An RGB image: the points from dark (least similar) to the colors of the image (most similar), with outlines
        around the members of the center; beside it the patches with their similarities.
    """
    width = 760
    photo = image.resize((width, round(width * image.height / image.width)), _FILTER)
    low, high = np.nanmin(view.similarity), np.nanmax(view.similarity)
    brightness = np.nan_to_num((view.similarity - low) / max(high - low, 1e-12))
    brightness = 0.08 + 0.92 * view.at_pixels(brightness, photo.size)[..., None]
    shown = Image.fromarray((np.asarray(photo) * brightness).round().astype(np.uint8))
    shown = _outline(shown, view.at_pixels(view.members, photo.size), 2)
    stage, block, head, center = view.where
    layer = f'pooling into stage {stage}' if block is None else f'stage {stage}, block {block}, head {head}'
    tiles = [_titled(shown, f'{layer}: similarity to center {center}, {low:.2f} to {high:.2f}', 22)]
    for patch in patches:
        pixels = ImageOps.fit(patch.pixels, (150, 150), _FILTER)
        tiles.append(_titled(pixels, f'{patch.similarity:.2f}', 17))
    rows, per_row = 1 + tiles[0].height // (tiles[1].height + _GAP) if patches else 1, 5
    beside = tiles[1 : 1 + rows * per_row]
    step = [side + _GAP for side in beside[0].size] if beside else [0, 0]
    used = -(-len(beside) // per_row)
    size = (2 * _GAP + width + min(len(beside), per_row) * step[0], _GAP + max(tiles[0].height + _GAP, used * step[1]))
    sheet = Image.new('RGB', size, 'white')
    sheet.paste(tiles[0], (_GAP, _GAP))
    for number, tile in enumerate(beside):
        row, column = divmod(number, per_row)
        sheet.paste(tile, (2 * _GAP + width + column * step[0], _GAP + row * step[1]))
    return sheet


def draw_film(maps: ClusterMaps, head: int = 0, width: int = 480) -> list[Image.Image]:
    """Draws the clusters of all layers in the order of the forward pass, as the frames of an animation.

    Args:
        maps: Maps of one image.
        head: Head of the blocks.
        width: Of a frame, in pixels.
    """
    image = maps.images[0]
    image = image.resize((width, max(1, round(width * image.height / image.width))), _FILTER)
    frames = [_titled(image, 'image', 18)]
    for one in maps.maps:
        labels = maps.at_pixels(one.of_head(head), one.stride, image.size)
        frames.append(_titled(draw_clusters(image, labels), one.name, 18))
    return frames


def _resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels [height, width] at another size, without interpolation."""
    rows, columns = ((np.arange(shown) + 0.5) * given / shown for shown, given in zip(size[::-1], labels.shape))
    return labels[rows.astype(np.int64)[:, None], columns.astype(np.int64)]


def _titled(image: Image.Image, text: str, size: int, color: str = _FAINT) -> Image.Image:
    tile = Image.new('RGB', (image.width, image.height + size + 10), 'white')
    font = _font(size)
    while text and font.getlength(text) > image.width:
        text = text[:-2].rstrip('.') + '...' if len(text) > 2 else ''
    draw = ImageDraw.Draw(tile)
    draw.text((0, 0), text, color, font)
    tile.paste(image, (0, size + 10))
    return tile


def _wrap(text: str, width: float, size: int) -> list[str]:
    lines = ['']
    for word in text.split():
        longer = f'{lines[-1]} {word}'.strip()
        if _font(size).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
