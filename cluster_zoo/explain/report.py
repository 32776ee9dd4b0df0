"""What the explanations of an image say, as data for JSON and as a web page that needs no network."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn as nn
from PIL import Image

from ..weights.metadata import label_names
from .centroids import Explanation, Neighbour, resolve_class_names
from .contributions import contributions
from .explained import Explained
from .maps import ClusterMap
from .segments import compose, has_scikit_learn, k_means

__all__ = ['html_page', 'report']

_PHOTO = 1024  # pixels, longest side of an image in a page
_SEGMENTS = range(2, 13)  # to choose from in a page


def report(model: nn.Module, explained: Explained, ks: Sequence[int] = (), top: int = 5) -> dict[str, Any]:
    """Returns what is known about one image, as data for ``json.dumps``.

    Args:
        model: The model.
        explained: Result of `explain_image`.
        ks: Numbers of segments, see `segments`.
        top: Number of the most probable classes.

    Returns:
        A dictionary with ``name``, ``width`` and ``height`` of the image, ``input`` (height and width of the model's
        input), ``classes``, ``layers`` (see `ClusterMap`; points and centers row by row), ``ends`` and ``segments``
        (see `Segments`), ``contributions`` (see `Contributions`) and ``neighbours`` (see `Explanation`). What a model
        does not have is empty.
    """
    maps, decision, image = explained.maps, explained.decision, explained.image
    data: dict[str, Any] = dict(name=explained.name, width=image.width, height=image.height, input=None)
    data |= dict(classes=[], layers=[], ends=None, segments={}, contributions=[], neighbours=_neighbours(decision))
    if maps is None:
        data['classes'] = [
            dict(index=one['index'], label=one['label'], probability=one['probability'])
            for one in data['neighbours']
            if one['first']
        ]
        return data
    data['input'] = list(maps.inputs.shape[-2:])
    data['layers'] = [_layer(one) for one in maps.maps]
    data['ends'] = dict(points=compose(maps).flatten().tolist(), grid=list(maps.at(-1).center.shape[-2:]))
    data['segments'] = {str(k): k_means(maps, k).flatten().tolist() for k in ks}
    logits = maps.logits[0]
    probability = logits.sigmoid() if getattr(model, 'multi_label', False) else logits.softmax(-1)
    probability, order = probability.sort(descending=True)
    names = resolve_class_names(label_names({**model.pretrained_cfg, 'num_classes': len(logits)}), len(logits))
    data['classes'] = [
        dict(index=index, label=names[index], probability=value)
        for value, index in zip(probability.tolist()[:top], order.tolist())
    ]
    if explained.parts:
        first = explained.parts.class_index
        for index in [first, *(one['index'] for one in data['classes'] if one['index'] != first)]:
            parts = contributions(model, maps, index)
            one = dict(index=index, label=parts.class_name, probability=parts.probability)
            points = parts.points.flatten().round(6).tolist()
            data['contributions'].append(one | dict(logit=parts.logit, bias=parts.bias, points=points))
    return data


def _layer(one: ClusterMap) -> dict[str, Any]:
    return dict(
        stage=one.stage,
        block=one.block,
        stride=one.stride,
        points=list(one.center.shape[-2:]),
        grid=list(one.grid),
        center=[head.flatten().tolist() for head in one.center[0]],
        similarity=[head.flatten().round(3).tolist() for head in one.similarity[0].astype(np.float64)],
        region=one.region.tolist(),
        position=[[None, None] if np.isnan(y) else [float(y), float(x)] for y, x in one.position],
    )


def _ordered(decision: Explanation | None) -> list[Neighbour]:
    """The centroids of the predicted class, the nearest first, and the one of the next class."""
    return [] if decision is None else [*decision.neighbours, *([decision.competitor] if decision.competitor else [])]


def _neighbours(decision: Explanation | None) -> list[dict[str, Any]]:
    return [
        dict(
            index=one.class_index,
            label=one.class_name,
            probability=decision.probability if predicted else decision.competitor_probability,
            predicted=predicted,
            first=position in (0, len(decision.neighbours)),
            sub_centroid=one.sub_centroid,
            similarity=one.similarity,
            image=one.image and one.image.name,
        )
        for position, one in enumerate(_ordered(decision))
        for predicted in [position < len(decision.neighbours)]
    ]


def html_page(model: nn.Module, model_name: str, explained: Sequence[Explained]) -> str:
    """Returns a web page with sliders for the layers, groups that light up under the pointer, and contributions.

    The page has no reference to other files or servers. It has segments if scikit-learn is installed.

    Args:
        model: The model.
        model_name: Its name, for a reader.
        explained: Results of `explain_image`.
    """
    ks, records = _SEGMENTS if has_scikit_learn() else (), []
    for one in explained:
        photo = one.image.copy()
        photo.thumbnail((_PHOTO, _PHOTO))
        record = report(model, one, ks) | dict(model=model_name, photo=_data_url(photo, 'JPEG'))
        for shown, neighbour in zip(record['neighbours'], _ordered(one.decision)):
            shown['thumbnail'] = neighbour.image and _data_url(neighbour.image.thumbnail, 'PNG')
        records.append(record)
    # In a script element only "</script" and "<!--" end or change the script, so no "<" may be left.
    content = json.dumps(records, separators=(',', ':')).replace('<', '\\u003c')
    template = Path(__file__).with_name('viewer.html').read_text(encoding='utf-8')
    return template.replace('/* RECORDS */[]', content)


def _data_url(image: Image.Image, format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, quality=88)
    return f'data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'
