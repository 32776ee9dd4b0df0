"""Export of classifiers and segmenters to ONNX, TorchScript and pt2 (torch.export) files.

`export_model` writes a file under a temporary name, opens it again and compares its logits with those of the model for
several batches and image sizes. If they agree, the file gets its name, otherwise it is deleted.

TorchScript files accept images of any size. ONNX and pt2 files contain a graph without branches, which cannot pad: they
accept sides that are multiples of the model's grid sizes, 32 px for most variants, and refuse others (see `Sizes`).
"""

import copy
import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .errors import ExportError, one_line
from .layers.cluster_mixer import ClusterMixer
from .models.context_cluster import ContextCluster
from .models.fec import ClusterPool
from .weights.metadata import label_names

__all__ = ['FORMATS', 'OPSET', 'TOLERANCE', 'Export', 'ExportError', 'Sizes', 'check_request', 'export_model']

FORMATS = {'onnx': '.onnx', 'torchscript': '.pt', 'pt2': '.pt2'}  # format -> suffix of its files
OPSET = 18  # the oldest that torch.onnx writes
TOLERANCE = 1e-4  # largest difference of a logit, in float32; of a segmenter as a fraction of its largest logit above 1

_MIN_SIDE = 32  # pixels
_MIN_SCALE = 1e-3  # layer scales with a smaller mean can hide an error in their branch from the logits
_RAISED_SCALE = 0.5
_ROUNDING = 1e-6  # standard deviation of noise that simulates rounding errors, in normalized pixels


@dataclass(frozen=True)
class Sizes:
    """Image sizes that an exported file accepts.

    Attributes:
        fixed: Height and width in pixels if the file accepts only one size, else None.
        multiple: Divisor of both sides; None if the size is fixed.
        smallest: Smallest side in pixels; None if the size is fixed.
    """

    fixed: tuple[int, int] | None = None
    multiple: int | None = None
    smallest: int | None = None

    def __str__(self) -> str:
        if self.fixed:
            return f'{self.fixed[0]} x {self.fixed[1]} px'
        return f'{"any" if self.multiple == 1 else f"multiples of {self.multiple}"} from {self.smallest} px'


@dataclass(frozen=True)
class Export:
    """An exported file and the results of the export check.

    Attributes:
        path: The file.
        sizes: Image sizes that it accepts. Batches may have any size.
        checked: Batch size, height and width of the images in the check.
        difference: Largest difference of a logit over all images without a tie, at most `TOLERANCE`. That of a
            segmenter is a fraction of the largest logit of the image, if that is above 1.
        ties: Number of images with a larger difference, because rounding errors change the center of a point.
        raised: Number of layer scales near zero. If there are any, a copy of the model with larger ones is checked too.
    """

    path: Path
    sizes: Sizes
    checked: tuple[tuple[int, int, int], ...]
    difference: float
    ties: int
    raised: int


def export_model(
    model: nn.Module,
    path: str | Path,
    to: str = 'onnx',
    image_size: int | tuple[int, int] | None = None,
    opset: int = OPSET,
) -> Export:
    """Exports a classifier or segmenter in float32 and evaluation mode, and checks the file against the model.

    The input ``image`` [B, C, H, W] is normalized with the model's mean and std. The output ``logits`` is [B, K], of a
    segmenter [B, K, H, W]. The file contains mean, std, input size, crop, interpolation and class names, of a segmenter
    also the colors and the test protocol: ONNX as ``metadata_props``, TorchScript and pt2 as JSON in the extra file
    ``cluster_zoo.json``.

    Args:
        model: A classifier of this package or of timm, or a model of `segmentation.create_segmenter`. It stays
            unchanged.
        path: File to write. An existing file is replaced.
        to: ``'onnx'``, ``'torchscript'`` or ``'pt2'``.
        image_size: Height and width, or one number for both, of the only size that the file accepts. If None, the file
            accepts all sizes that the format allows, or only the model's input size if that is not one of them.
        opset: ONNX opset, from 18 to the newest of the package onnx.

    Raises:
        ExportError: The request is invalid (see `check_request`), the model has no logits or cannot be converted to
            this format, or the logits of the file differ from the model's.
        OSError: The file cannot be written.
    """
    check_request(path, to, image_size, opset)
    if not isinstance(getattr(model, 'num_classes', None), int) or not hasattr(model, 'pretrained_cfg'):
        raise ExportError(f'{type(model).__name__} is no classifier of timm: create one without features_only.')
    formats = getattr(model, 'export_formats', FORMATS)
    if to not in formats:
        raise ExportError(f'This {type(model).__name__} cannot be written as {to}, only as {" or ".join(formats)}.')
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    height, width = data['input_size'][1:]
    sizes = _sizes(model, to, (height, width), image_size)
    if sizes.fixed:
        checked = ((1, *sizes.fixed), (3, *sizes.fixed))
    else:
        small, more = sizes.smallest, sizes.smallest + sizes.multiple
        checked = ((1, small, small), (3, small, small + more), (2, height, width), (1, height + more, width))
    raised = copy.deepcopy(model)
    scales = [value for name, value in raised.named_parameters() if name.endswith('.gamma')]
    scales = [scale.fill_(_RAISED_SCALE) for scale in scales if scale.abs().mean() < _MIN_SCALE]
    metadata = _metadata(model, data, sizes)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix='.export-') as folder,
    ):
        warnings.simplefilter('ignore')  # deprecations in torch
        file = Path(folder) / f'model{FORMATS[to]}'
        if scales:
            _write(raised, file, to, sizes, metadata, opset)
            _check(raised, _open(file, to), checked, f'With layer scales of {_RAISED_SCALE} the file')
        _write(model, file, to, sizes, metadata, opset)
        difference, ties = _check(model, _open(file, to), checked, 'The file')
        file.replace(path)
    return Export(path, sizes, checked, difference, ties, len(scales))


def check_request(
    path: str | Path, to: str = 'onnx', image_size: int | tuple[int, int] | None = None, opset: int = OPSET
) -> None:
    """Checks the arguments of `export_model` that do not depend on the model.

    Raises:
        ExportError: The format, the size or the opset is invalid, the suffix is that of another format, the folder
            does not exist, or a package is missing.
    """
    path = Path(path)
    if to not in FORMATS:
        raise ExportError(f"There is no format '{to}': choose one of {', '.join(FORMATS)}.")
    if path.suffix.lower() in {*FORMATS.values()} - {FORMATS[to]}:
        raise ExportError(f"'{path.name}' has the suffix of another format: use {FORMATS[to]} for {to}.")
    if path.is_dir():
        raise ExportError(f"'{path}' is a folder: give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise ExportError(f"There is no folder '{path.absolute().parent}'.")
    sides = (image_size,) * 2 if isinstance(image_size, int) else image_size
    if sides is not None and (len(sides) != 2 or min(sides) < _MIN_SIDE):
        raise ExportError(f'An image size is a height and a width of at least {_MIN_SIDE} px, got {image_size}.')
    if to == 'onnx':
        missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'cluster_zoo[onnx]'")
        import onnx

        if not OPSET <= opset <= onnx.defs.onnx_opset_version():
            raise ExportError(f'The opset must be from {OPSET} to {onnx.defs.onnx_opset_version()}, got {opset}.')


def _sizes(model: nn.Module, to: str, native: tuple[int, int], image_size: int | tuple[int, int] | None) -> Sizes:
    """Returns the sizes that the file accepts, for a model with the input size ``native``."""
    fixed = (image_size, image_size) if isinstance(image_size, int) else image_size
    if model.pretrained_cfg.get('fixed_input_size'):
        if fixed not in (None, native):
            raise ExportError(f'This model accepts only images of {Sizes(native)}: create it with another img_size.')
        return Sizes(native)
    if fixed:
        return Sizes(fixed)
    multiple, smallest = getattr(model, 'export_multiple', 1), _MIN_SIDE
    if multiple is None:
        raise ExportError(f'This {type(model).__name__} can be written for one image size only: name it (--img-size).')
    for network in model.modules():  # the model, or the backbone of a segmenter
        if not isinstance(network, ContextCluster):
            continue
        multiple = math.lcm(multiple, network.stem.patch_size)
        for stage, info in zip(network.stages, network.feature_info):
            for module in stage.modules():
                if isinstance(module, ClusterPool) or (isinstance(module, ClusterMixer) and module.regions > 1):
                    multiple = math.lcm(multiple, info['reduction'] * module.regions)
                if isinstance(module, ClusterMixer):
                    # With more centers than points some centers are equal, and rounding determines a point's center
                    smallest = max(smallest, info['reduction'] * module.regions * module.proposals)
    if to == 'torchscript':
        multiple = 1
    else:
        # torch.export treats a side of one as a constant: the last feature map needs two points per side
        reduction = model.feature_info[-1]['reduction'] if getattr(model, 'feature_info', None) else _MIN_SIDE
        smallest = multiple * max(2, reduction // multiple + 1, math.ceil(smallest / multiple))
    if min(native) < smallest or any(side % multiple for side in native):
        return Sizes(native)
    return Sizes(None, multiple, smallest)


def _metadata(model: nn.Module, data: dict[str, Any], sizes: Sizes) -> dict[str, str]:
    """Returns the preprocessing of images and the class names, with values that are not strings as JSON."""
    cfg = model.pretrained_cfg
    metadata = dict(
        producer=f'cluster_zoo {__version__}',
        **{key: cfg.get(key) for key in ('architecture', 'tag', 'license')},
        num_classes=model.num_classes,
        label_names=label_names({**cfg, 'num_classes': model.num_classes}),
        # timm's test size always has three channels
        input_size=(model.in_chans, *(sizes.fixed or data['input_size'][1:])),
        **{key: data[key] for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        **{key: cfg.get(key) for key in ('label_colors', 'test')},  # of a segmenter
        sizes=str(sizes),
    )
    return {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in metadata.items() if v}


class _Input(nn.Module):
    """Raises an error for images whose sides are no multiples; the graph alone would ignore the last pixels."""

    def __init__(self, model: nn.Module, multiple: int):
        super().__init__()
        self.model = model
        self.multiple = multiple

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K] or [B, K, H, W]"""
        if self.multiple > 1:
            image = image.unflatten(2, (-1, self.multiple)).flatten(2, 3)
            image = image.unflatten(3, (-1, self.multiple)).flatten(3, 4)
        return self.model(image)


def _write(model: nn.Module, path: Path, to: str, sizes: Sizes, metadata: dict[str, str], opset: int) -> None:
    extra_files = {'cluster_zoo.json': json.dumps(metadata, ensure_ascii=False)}
    try:
        if to == 'torchscript':
            torch.jit.save(torch.jit.script(model), path, _extra_files=extra_files)
        elif to == 'pt2':
            torch.export.save(_trace(model, sizes), path, extra_files=extra_files)
        else:
            program = torch.onnx.export(
                _trace(model, sizes),
                verbose=False,
                opset_version=opset,
                input_names=['image'],
                output_names=['logits' if model.num_classes else 'features'],
                dynamic_shapes={'image': {0: 'batch'} if sizes.fixed else {0: 'batch', 2: 'height', 3: 'width'}},
            )
            written = program.model.opset_imports['']
            if written != opset:  # torch.onnx keeps its default opset if it cannot convert
                raise ExportError(f'This model can not be written with opset {opset}, but with {written}.')
            program.model.metadata_props.update(metadata)
            path.write_bytes(program.model_proto.SerializeToString())  # raises for models of more than 2 GB
    except (ExportError, OSError):
        raise
    except Exception as error:  # of any type: from the compiler, torch.export or the model
        hint = '' if sizes.fixed or to == 'torchscript' else ' Try a file for one image size.'
        raise ExportError(
            f'This model can not be written as {to} for images of {sizes}: {one_line(error)}{hint}'
        ) from error


def _trace(model: nn.Module, sizes: Sizes) -> torch.export.ExportedProgram:
    multiple, axes = sizes.multiple or 1, {0: torch.export.Dim('batch')}
    height, width = sizes.fixed or (sizes.smallest, sizes.smallest + multiple)
    if not sizes.fixed:
        for axis, name in ((2, 'height'), (3, 'width')):
            side = torch.export.Dim(name, min=sizes.smallest // multiple)
            axes[axis] = side if multiple == 1 else multiple * side
    image = torch.zeros(2, model.in_chans, height, width)
    program = torch.export.export(_Input(model, multiple), (image,), dynamic_shapes={'image': axes})
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # contains paths on this machine
    return program


def _open(path: Path, to: str) -> Callable[[Tensor], Tensor]:
    """Returns a function that runs the file on images."""
    if to == 'torchscript':
        return torch.jit.load(path)
    if to == 'pt2':
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run(None, {'image': image.numpy()})[0])


def _check(
    model: nn.Module, run: Callable[[Tensor], Tensor], shapes: tuple[tuple[int, int, int], ...], what: str
) -> tuple[float, int]:
    """Compares the logits of a model and its file for random images; returns the difference and ties of `Export`.

    If a point lies between two centers, rounding errors determine which one it joins, and the logits differ by more
    than the tolerance. An image counts as a tie if the model gives the file's logits for the image with noise of the
    size of rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    largest, ties = 0.0, 0
    for batch, *size in shapes:
        where = f'images of {batch} x {size[0]} x {size[1]} px'
        fine = torch.randn(batch, model.in_chans, *size, generator=generator)
        coarse = torch.randn(batch, model.in_chans, 4, 4, generator=generator)
        images = fine + F.interpolate(coarse, size, mode='bilinear')
        expected = model(images)
        try:
            found = run(images)
        except Exception as error:  # of any type that the runtime raises
            raise ExportError(f'{what} does not run on {where}: {one_line(error)}') from error
        if found.shape != expected.shape:
            raise ExportError(f'{what} gives {list(found.shape)} for {where}, the model {list(expected.shape)}.')
        for image, wanted, given in zip(images.split(1), expected.split(1), found.split(1)):
            # The logits of some segmenters are in the hundreds, which makes rounding errors larger
            scale = max(1.0, wanted.abs().max().item()) if wanted.ndim == 4 else 1.0
            difference = (given - wanted).abs().max().item() / scale
            if difference <= TOLERANCE:  # false for NaN
                largest = max(largest, difference)
                continue
            noise = _ROUNDING * torch.randn(32, *image.shape, generator=generator)
            if not any((model(image + one) - given).abs().max() <= TOLERANCE * scale for one in noise):
                raise ExportError(
                    f'{what} gives other logits than the model: for {where} they differ by {difference:.1e}, more than '
                    f'{TOLERANCE:.0e}.'
                )
            ties += 1
    return largest, ties
