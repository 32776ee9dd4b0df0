"""Models as files that other programs run: ONNX, TorchScript and torch.export's pt2.

A file is compared with its model before it gets its name: it is opened again, by onnxruntime if it is ONNX, and has to
give the same logits for batches and image sizes other than those it was traced with. As long as layer scales are near
zero the branches behind them hardly count, so both are compared once more with these scales raised. Whatever fails,
nothing is left behind and no file is replaced.

TorchScript takes images of any size, as the model does. A traced graph, ONNX and pt2, has no branches: where the points
of an image are cut into regions or pooled two by two it takes the sizes that divide, which are multiples of 32 for most
variants (`Sizes`), and refuses others. For any other size a graph can be made for that size alone. FEC's pooling has no
blocks in a graph: all points meet all centers at once, which takes memory with the square of the number of points.
A model whose own size is none of these becomes a file for its own size alone.
"""

import copy
import importlib.util
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torch import Tensor

from . import __version__
from .comparison import RAISED, TOLERANCE, ExportError, compare, first_line, little_scales, raise_scales
from .context_cluster import ContextCluster
from .fec import ClusterPool
from .mixer import ClusterMixer
from .tags import label_names

__all__ = ['FORMATS', 'OPSET', 'TOLERANCE', 'Export', 'ExportError', 'Sizes', 'check_request', 'export_model']

OPSET = 18  # the oldest that torch.onnx writes, and so the one that most programs read

_SMALLEST = 32  # pixels, of the models themselves
_STEP = 37  # pixels from one side to another that is checked, unless sizes are multiples of something
_METADATA = 'cluster_zoo.json'  # in TorchScript and pt2, which are archives


@dataclass(frozen=True)
class Sizes:
    """Image sizes that an exported file takes.

    Attributes:
        fixed: Height and width, where they can be no others.
        multiple: Otherwise, what both sides are a multiple of.
        smallest: The smallest side of which it is certain that results agree, in pixels.
    """

    fixed: tuple[int, int] | None = None
    multiple: int = 1
    smallest: int = _SMALLEST

    def take(self, height: int, width: int) -> bool:
        """Whether these are among them."""
        if self.fixed:
            return (height, width) == self.fixed
        return all(side >= self.smallest and side % self.multiple == 0 for side in (height, width))

    def __str__(self) -> str:
        if self.fixed:
            return f'{self.fixed[0]} x {self.fixed[1]} px'
        return f'{"any" if self.multiple == 1 else f"multiples of {self.multiple}"} from {self.smallest} px'


@dataclass(frozen=True)
class Export:
    """A file that was written and how it compares with its model.

    Attributes:
        path: The file.
        sizes: Images that it takes; batches may have any size.
        checked: Batch, height and width of what was compared.
        difference: Largest difference of a logit, at most `TOLERANCE`.
        images: Images that were compared.
        undecided: Of these, how many differ by more, because of a point that lies between two centers.
        undecided_difference: By how much.
        raised: Layer scales near zero, which were raised in both for a second comparison of as many images.
    """

    path: Path
    sizes: Sizes
    checked: tuple[tuple[int, int, int], ...]
    difference: float
    images: int
    undecided: int = 0
    undecided_difference: float = 0.0
    raised: int = 0


def export_model(
    model: nn.Module,
    path: str | Path,
    to: str = 'onnx',
    image_size: int | tuple[int, int] | None = None,
    opset: int = OPSET,
) -> Export:
    """Write a classifier to a file, in float32 and as it is in evaluation, and compare the file with it.

    The input ``image`` [B, C, H, W] is normalised as the model expects it, the output are the ``logits`` [B, K]. What
    that takes is in the file: mean, std, input size, crop, interpolation and the names of the classes, as ONNX
    ``metadata_props``, or as JSON in the extra file ``cluster_zoo.json`` of TorchScript and pt2.

    Args:
        model: A classifier of this package or of timm; it is not changed.
        path: File to write. One that is there is replaced when all is done.
        to: ``'onnx'``, ``'torchscript'`` or ``'pt2'``.
        image_size: Height and width, or one number for both, of the only size that the file has to take. None: all
            that can be had, see `Sizes`, and the model's own; models of a fixed size, such as Swin, have only theirs.
        opset: Of ONNX, from 18 to the newest that the package onnx knows.

    Raises:
        ExportError: See `check_request`; the model is no classifier or cannot be traced; or the file does not give the
            model's logits.
        OSError: The file cannot be written.
    """
    check_request(path, to, image_size, opset)
    if not isinstance(getattr(model, 'num_classes', None), int) or not hasattr(model, 'pretrained_cfg'):
        raise ExportError(f'{type(model).__name__} is no classifier of timm: make one without features_only.')
    path, form = Path(path), FORMATS[to]
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    with (
        _quiet(),
        torch.no_grad(),
        tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix='.export-') as folder,
    ):
        sizes, traced = _sizes(model, form, image_size)
        temporary = Path(folder) / path.name
        form.write(model, temporary, sizes, traced, _metadata(model, sizes), opset)
        shapes = _shapes(model, sizes)
        near, far, images = compare(model, form.load(temporary, ()), shapes)
        if little := little_scales(model):
            raise_scales(model.parameters(), little)
            compare(model, form.load(temporary, little), shapes, f', with layer scales of {RAISED},')
        temporary.replace(path)
    return Export(path, sizes, shapes, near, images, len(far), max(far, default=0.0), len(little))


def check_request(
    path: str | Path, to: str = 'onnx', image_size: int | tuple[int, int] | None = None, opset: int = OPSET
) -> None:
    """Everything about an export that can be wrong before there is a model.

    Args:
        path, to, image_size, opset: See `export_model`.

    Raises:
        ExportError: There is no such format, size or opset; a package is missing; the file cannot be written, or its
            name is that of another format.
    """
    if to not in FORMATS:
        raise ExportError(f"There is no format '{to}': one of {', '.join(FORMATS)}.")
    path, form = Path(path), FORMATS[to]
    _fixed_size(image_size)
    missing = [name for name in form.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"This format needs {', '.join(missing)}: pip install 'cluster_zoo[onnx]'")
    if form.packages:
        import onnx

        if not OPSET <= opset <= onnx.defs.onnx_opset_version():
            raise ExportError(f'Opset is one of {OPSET} to {onnx.defs.onnx_opset_version()}, got {opset}.')
    others = {other.suffix: name for name, other in FORMATS.items() if name != to}
    if path.suffix.lower() in others:
        raise ExportError(f"'{path.name}' is a name for {others[path.suffix.lower()]}, not for {to}: {form.suffix}")
    if path.is_dir():
        raise ExportError(f"'{path}' is a folder: name the file to write.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"There is no folder '{folder}'.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ExportError(f"Nothing can be written into the folder '{folder}': {error.strerror}.") from error


def _fixed_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    fixed = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(fixed) != 2 or min(fixed) < _SMALLEST:
        raise ExportError(f'An image size is a height and a width of at least {_SMALLEST} px, got {image_size}.')
    return fixed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says to its developers: TorchScript is deprecated, one opset is converted to another."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _data_config(model: nn.Module) -> dict[str, Any]:
    """How images are prepared in validation."""
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    data['input_size'] = (model.in_chans, *data['input_size'][1:])  # timm's sizes for testing always say three
    return data


def _metadata(model: nn.Module, sizes: Sizes) -> dict[str, str]:
    """What is needed to use the file, as strings."""
    cfg = model.pretrained_cfg
    data = _data_config(model)
    if sizes.fixed:
        data['input_size'] = (data['input_size'][0], *sizes.fixed)
    known = dict(
        producer=f'cluster_zoo {__version__}',
        architecture=cfg.get('architecture'),
        tag=cfg.get('tag'),
        license=cfg.get('license'),
        paper=cfg.get('paper_ids'),
        num_classes=model.num_classes,
        label_names=label_names({**cfg, 'num_classes': model.num_classes}),
        **{key: data[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        sizes=str(sizes),
    )
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in known.items()
        if value
    }


# ---- Sizes ----


def _sizes(model: nn.Module, form: 'Format', image_size: int | tuple[int, int] | None) -> tuple[Sizes, tuple[int, int]]:
    """Sizes that the file will take, and the one to trace."""
    native, fixed = _data_config(model)['input_size'][1:], _fixed_size(image_size)
    if model.pretrained_cfg.get('fixed_input_size'):
        if fixed not in (None, native):
            raise ExportError(
                f'This model takes images of {native[0]} x {native[1]} px alone: create it with the img_size you need.'
            )
        return Sizes(native), native
    if fixed:
        return Sizes(fixed), fixed
    multiple, smallest = _grid(model)
    sizes, traced = Sizes(smallest=smallest), native
    if form.traces:
        # torch.export takes sizes of one for constants, and so must never see one where another may stand: the last
        # stage's map, or a region of it, needs two points a side.
        reduction = model.feature_info[-1]['reduction'] if getattr(model, 'feature_info', None) else _SMALLEST
        side = max(multiple * max(2, reduction // multiple + 1), _up(smallest, multiple))
        sizes, traced = Sizes(None, multiple, side if form.guards else _up(smallest, multiple)), (side, side + multiple)
    return (sizes, traced) if sizes.take(*native) else (Sizes(native), native)


def _grid(model: nn.Module) -> tuple[int, int]:
    """What both sides have to be a multiple of, for no grid of points to be padded, and how long they are at least.

    On a shorter side there are more centers than points. Some then lie in the same place, which of them a point joins
    is a matter of rounding, and no two programs need agree.
    """
    if not isinstance(model, ContextCluster):
        return 1, _SMALLEST
    multiple, smallest = model.stem.patch_size, _SMALLEST
    for stage, info in zip(model.stages, model.feature_info):
        for module in stage.modules():
            if isinstance(module, ClusterPool) or (isinstance(module, ClusterMixer) and module.regions > 1):
                multiple = math.lcm(multiple, info['reduction'] * module.regions)
            if isinstance(module, ClusterMixer):
                smallest = max(smallest, info['reduction'] * module.regions * module.proposals)
    return multiple, smallest


def _up(side: int, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple


def _shapes(model: nn.Module, sizes: Sizes) -> tuple[tuple[int, int, int], ...]:
    """Batches and sizes to compare: the smallest, the model's own and a larger one, square and not."""
    if sizes.fixed:
        return ((1, *sizes.fixed), (3, *sizes.fixed))
    multiple, small = sizes.multiple, sizes.smallest
    step = _up(_STEP, multiple)
    height, width = _data_config(model)['input_size'][1:]
    return ((1, small, small), (3, small, small + step), (2, height, width), (1, height + step, width))


# ---- Formats ----


class _Input(nn.Module):
    """The model behind what no graph without branches does by itself: to refuse sizes that it is wrong for."""

    def __init__(self, model: nn.Module, multiple: int):
        super().__init__()
        self.model = model
        self.multiple = multiple

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K]"""
        if self.multiple > 1:  # in onnxruntime an error, where the sides are no multiples
            image = image.unflatten(2, (-1, self.multiple)).flatten(2, 3)
            image = image.unflatten(3, (-1, self.multiple)).flatten(3, 4)
        return self.model(image)


def _trace(model: nn.Module, sizes: Sizes, traced: tuple[int, int]) -> torch.export.ExportedProgram:
    image = torch.zeros(2, model.in_chans, *traced)
    dynamic = {0: torch.export.Dim('batch')}
    if not sizes.fixed:
        smallest = traced[0] // sizes.multiple
        for axis, name in ((2, 'height'), (3, 'width')):
            side = torch.export.Dim(name, min=smallest)
            dynamic[axis] = side if sizes.multiple == 1 else sizes.multiple * side
    try:
        program = torch.export.export(_Input(model, sizes.multiple), (image,), dynamic_shapes={'image': dynamic})
    except Exception as error:  # torch.export's own, and whatever a model raises
        hint = '' if sizes.fixed else ' Name an image size for a file that takes only that one.'
        raise ExportError(f'This model can not be traced for images of {sizes}: {first_line(error)}{hint}') from error
    for module in program.graph_module.modules():  # nobody needs to know where the source files lay
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop('stack_trace', None)
    return program


def _write_onnx(
    model: nn.Module, path: Path, sizes: Sizes, traced: tuple[int, int], metadata: dict[str, str], opset: int
) -> None:
    import onnx

    output = 'logits' if model.num_classes else 'features'
    try:
        proto = torch.onnx.export(
            _trace(model, sizes, traced),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=['image'],
            output_names=[output],
        ).model_proto
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f'torch.onnx can not write this model: {first_line(error)}') from error
    written = next(entry.version for entry in proto.opset_import if entry.domain in ('', 'ai.onnx'))
    if written != opset:
        raise ExportError(f'This model can not be written with opset {opset}, but with {written}.')
    _tidy(proto.graph, sizes)
    onnx.helper.set_model_props(proto, dict(metadata, opset=str(opset), input='image', output=output))
    proto.producer_name, proto.producer_version = 'cluster_zoo', __version__
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, path)


def _tidy(graph: Any, sizes: Sizes) -> None:
    """Names for people, and no notes of the exporter's.

    The nodes that refuse an image say why by their names, which is what onnxruntime's error shows.
    """
    del graph.value_info[:]  # shapes in between, in symbols of the exporter's; whoever needs them infers them
    for noted in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        for axis, name in zip(axes, ('batch', 'channels', 'height', 'width')):
            if axis.dim_param:
                axis.dim_param = name
    graph.input[0].doc_string = 'RGB from 0 to 1, minus mean, divided by std'
    tensor = 'image'
    for side in ('height', 'width') if sizes.multiple > 1 else ():
        for name in (f'image_{side}_is_a_multiple_of_{sizes.multiple}', f'image_{side}'):
            node = next(node for node in graph.node if tensor in node.input and node.op_type == 'Reshape')
            node.name, tensor = name, node.output[0]


def _load_onnx(path: Path, scales: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    for stored in proto.graph.initializer if scales else ():
        values = torch.from_numpy(onnx.numpy_helper.to_array(stored).copy())
        raise_scales([values], scales)
        stored.CopyFrom(onnx.numpy_helper.from_array(values.numpy(), stored.name))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as well
    content = proto.SerializeToString() if scales else path
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run(None, {'image': image.numpy()})[0])


def _write_torchscript(
    model: nn.Module, path: Path, sizes: Sizes, traced: tuple[int, int], metadata: dict[str, str], opset: int
) -> None:
    try:
        scripted = torch.jit.script(model)
    except Exception as error:  # the compiler's own, and whatever it meets
        raise ExportError(f'TorchScript can not compile {type(model).__name__}: {first_line(error)}') from error
    torch.jit.save(scripted, path, _extra_files={_METADATA: json.dumps(metadata, ensure_ascii=False)})


def _load_torchscript(path: Path, scales: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    scripted = torch.jit.load(path)
    raise_scales(scripted.parameters(), scales)
    return scripted


def _write_pt2(
    model: nn.Module, path: Path, sizes: Sizes, traced: tuple[int, int], metadata: dict[str, str], opset: int
) -> None:
    program = _trace(model, sizes, traced)
    torch.export.save(program, path, extra_files={_METADATA: json.dumps(metadata, ensure_ascii=False)})


def _load_pt2(path: Path, scales: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()
    raise_scales(module.parameters(), scales)
    return module


@dataclass(frozen=True)
class Format:
    """How a format is written and read.

    Attributes:
        suffix: Of its files.
        write: Writes a model.
        load: Opens a file, as a function from images to logits, with some layer scales raised.
        traces: It is a graph without branches.
        guards: It insists on the smallest size that torch.export can promise to be right.
        packages: What it needs beside torch.
    """

    suffix: str
    write: Callable[..., None]
    load: Callable[[Path, Sequence[Tensor]], Callable[[Tensor], Tensor]]
    traces: bool = True
    guards: bool = False
    packages: tuple[str, ...] = ()


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, _load_onnx, packages=('onnx', 'onnxscript', 'onnxruntime')),
    'torchscript': Format('.pt', _write_torchscript, _load_torchscript, traces=False),
    'pt2': Format('.pt2', _write_pt2, _load_pt2, guards=True),
}
