"""Kernel launches and memory traffic on a GPU, of registered models and of their floor, counted without a GPU.

    python benchmarks/traffic.py [--models coc_tiny,fec_small] [--precisions bfloat16,float32] [--kernels plain,triton]
    python benchmarks/traffic.py --models coc_small --operations

A model runs in training mode on fake CUDA tensors, which have sizes, strides and a dtype but no data. Each operation is
counted with the launches and bytes of its CUDA kernels. The floor is that of benchmarks/clustering.py: the same network
without clustering. The step is the forward and the backward pass, without loss and optimizer.

The counts are a model of what a GPU does, not a measurement:

- An operation is one launch. It reads each element of its inputs once and writes each element of its outputs once.
  Views and allocations cost nothing. Caches and the time of a launch are not modeled.
- A convolution with a bias adds it in a second launch. If its input or its weight is channels_last, the other is copied
  to that format. Its gradients are one launch each.
- Group normalization works on NCHW and copies other formats to it. It is three launches: moments, factors per channel,
  scaling. Its gradients are four.
- A matrix product copies a factor in which neither of the last two strides is one. `baddbmm`, and `addmm` of a matrix,
  copy the added term to the output first.
- `scatter` reads and writes the selected elements only. `index_put` with accumulation sorts its indices: ten launches.
- `cluster_zoo::*`, except `bmm`, is one launch of a Triton kernel, after copies of inputs that are not contiguous.
- The gradients of a tensor with several uses are added, one launch for each further use.
"""

import argparse
import copy
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from clustering import floor  # noqa: E402
from measuring import positive, print_table  # noqa: E402

import cluster_zoo  # noqa: E402, F401  registers the models

MODELS = 'coc_tiny,coc_small,fec_small'
ALLOCATIONS = {
    'empty',
    'new_empty',
    'empty_like',
    'empty_strided',
    'new_empty_strided',
    'detach',
    'alias',
    'as_strided_',
}
FACTORIES = {'new_zeros', 'zeros_like', 'ones_like', 'full_like', 'new_ones', 'new_full'}
PRODUCTS = {'mm', 'bmm', 'addmm', 'baddbmm'}


def size(x: Tensor) -> int:
    """Bytes of the elements of a tensor that are stored: an expanded dimension is stored once."""
    stored = [length for length, stride in zip(x.shape, x.stride()) if stride]
    return torch.Size(stored).numel() * x.element_size() if x.numel() else 0


def is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout_of(operands: Iterable[Tensor]) -> torch.memory_format:
    """Memory format in which cuDNN runs a convolution."""
    return torch.channels_last if any(map(is_channels_last, operands)) else torch.contiguous_format


def is_factor(x: Tensor) -> bool:
    """Whether a matrix product takes a tensor without a copy."""
    rows, columns = x.stride()[-2:]
    return (columns == 1 and rows >= x.shape[-1]) or (rows == 1 and columns >= x.shape[-2]) or 1 in x.shape[-2:]


class Traffic(TorchDispatchMode):
    """Counts launches and bytes of the operations that run under it.

    Attributes:
        launches, bytes: By the name of the operation.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = function._schema.name.split('::')[1]
        namespace = function.namespace
        if namespace == 'aten' and name.startswith('native_group_norm'):  # the strides of CUDA's result
            self.copies(name, (x for x in args if isinstance(x, Tensor) and not x.is_contiguous()))
            args = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
        result = function(*args, **(kwargs or {}))
        if name in ('convolution', 'convolution_backward'):  # the strides of cuDNN's result
            layout = layout_of(x for x in args[:3] if isinstance(x, Tensor))
            result = tree_map(
                lambda x: x.contiguous(memory_format=layout) if x is not None and x.ndim == 4 else x, result
            )
        if namespace in ('aten', 'cluster_zoo') and name not in ALLOCATIONS:
            self.count(name if namespace == 'aten' else f'{namespace}::{name}', function, (args, kwargs or {}), result)
        return result

    def add(self, name: str, launches: int, moved: int) -> None:
        self.launches[name] += launches
        self.bytes[name] += moved

    def copies(self, name: str, tensors: Iterable[Tensor]) -> None:
        for x in tensors:
            self.add(f'{name}, copies', 1, 2 * size(x))

    def count(self, name: str, function: Any, inputs: Any, result: Any) -> None:
        """Adds one operation. ``inputs`` are the arguments of the operator ``function``."""
        read = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        if function._overloadname == 'out':  # the last input is written only
            read = read[:-1]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if not any(x.device.type == 'cuda' for x in written):
            return
        storages = {x.untyped_storage()._cdata for x in read}
        if not function._schema.is_mutable and any(x.untyped_storage()._cdata in storages for x in written):
            return  # a view
        total, launches = sum(map(size, read + written)), 1
        if name in PRODUCTS:
            self.copies(name, (x for x in read[-2:] if not is_factor(x)))
            if len(read) == 3 and (name == 'baddbmm' or read[0].ndim == 2):
                launches, total = 2, total + 2 * size(result)
        elif name == 'convolution':
            launches, total = self.convolution(read, result, total)
        elif name == 'convolution_backward':
            launches, total = self.convolution_backward(read, written)
        elif name == 'native_group_norm':
            launches, total = 3, 2 * size(read[0]) + size(written[0])
        elif name == 'native_group_norm_backward':
            launches, total = 4, 2 * size(read[0]) + 2 * size(read[1]) + size(written[0])
        elif name in ('gather', 'index_select'):
            total = 2 * size(result) + size(read[1])
        elif name in ('scatter', 'scatter_', 'scatter_add'):
            total = size(read[1]) + 2 * size(read[2])
            if name != 'scatter_':  # into a copy
                launches, total = 2, total + 2 * size(result)
        elif name in FACTORIES:
            total = sum(map(size, written))
        elif name == 'index_put':  # sorts the rows
            launches, total = 10, total + 8 * 2 * size(read[1])
        elif name == 'cluster_zoo::bmm':
            self.copies(name, (x for x in read if not is_factor(x)))
        elif name.startswith('cluster_zoo'):
            self.copies(name, (x for x in read if not x.is_contiguous()))
        self.add(name, launches, total)

    def convolution(self, read: list[Tensor], result: Tensor, total: int) -> tuple[int, int]:
        self.copies('convolution', self.other_layouts(read[:2]))
        return (2, total + 2 * size(result)) if len(read) == 3 else (1, total)

    def convolution_backward(self, read: list[Tensor], written: list[Tensor]) -> tuple[int, int]:
        gradient, x, weight = read[:3]
        self.copies('convolution_backward', self.other_layouts([gradient, x, weight]))
        total = 0
        for out in written:
            used = {x.shape: [gradient, weight], weight.shape: [gradient, x]}.get(out.shape, [gradient])
            total += sum(map(size, used)) + size(out)
        return len(written), total

    @staticmethod
    def other_layouts(tensors: list[Tensor]) -> Iterator[Tensor]:
        """Operands of a convolution that are copied to another memory format."""
        layout = layout_of(tensors)
        return (x for x in tensors if not x.is_contiguous(memory_format=layout))


def backward(out: Tensor) -> None:
    """Runs the backward pass of ``out.sum()`` node by node, because PyTorch's engine needs a GPU for CUDA tensors.

    It frees nothing and does not set ``grad``: only its operations matter.
    """
    uses: Counter[Any] = Counter()
    found, seen = [out.grad_fn], {out.grad_fn}
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    found.append(node)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[out.grad_fn][out.output_nr] = torch.ones_like(out)
    ready = [out.grad_fn]
    while ready:
        node = ready.pop()
        incoming = gradients.pop(node, {})
        if 'AccumulateGrad' in node.name():
            continue
        count = len(node._input_metadata)
        outgoing = run(node, [incoming.get(i) for i in range(count)]) if incoming else [None] * len(node.next_functions)
        for (following, position), gradient in zip(node.next_functions, outgoing):
            if following is None:
                continue
            if gradient is not None:
                expected = following._input_metadata[position]
                gradient = gradient.sum_to_size(tuple(expected.shape)).to(expected.dtype)
                before = gradients[following].get(position)
                gradients[following][position] = gradient if before is None else before + gradient
            uses[following] -= 1
            if not uses[following]:
                ready.append(following)


def run(node: Any, incoming: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    call: Callable = node if callable(node) else node.apply
    outgoing = call(*incoming)
    return outgoing if isinstance(outgoing, tuple) else (outgoing,)


def on_fake_gpu(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replaces parameters and buffers by fake CUDA tensors."""
    with mode:
        for module in model.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='cuda')
                    module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
            for name, value in list(module._buffers.items()):
                if value is not None:
                    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device='cuda')
                    module._buffers[name] = fake
    return model


def counts(model: nn.Module, precision: str, kernels: str, args: argparse.Namespace) -> dict[str, Traffic]:
    """Counts the forward pass and the step (forward and backward pass) of a model."""
    mode = FakeTensorMode()
    model = on_fake_gpu(copy.deepcopy(model).to(memory_format=torch.channels_last).train(), mode)
    forward, step = Traffic(), Traffic()
    with mode, patch.dict(os.environ, CLUSTER_ZOO_KERNELS=kernels):
        images = torch.empty(args.batch_size, 3, args.img_size, args.img_size, device='cuda')
        images = images.contiguous(memory_format=torch.channels_last)
        # torch.autocast turns itself off where there is no GPU
        with forward:
            torch.set_autocast_enabled('cuda', precision != 'float32')
            torch.set_autocast_dtype('cuda', torch.bfloat16)
            out = model(images)
            torch.set_autocast_enabled('cuda', False)
            torch.clear_autocast_cache()
        with step, torch.no_grad():
            backward(out)
    step.launches.update(forward.launches)
    step.bytes.update(forward.bytes)
    return dict(forward=forward, step=step)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default=MODELS, help='comma-separated names (default: %(default)s)')
    parser.add_argument('--precisions', default='bfloat16,float32', help='bfloat16 is autocast')
    parser.add_argument('--kernels', default='plain,triton', help='values of CLUSTER_ZOO_KERNELS')
    parser.add_argument('--batch-size', type=positive, default=128)
    parser.add_argument('--img-size', type=positive, default=224)
    parser.add_argument('--operations', action='store_true', help='also list the operations of each model')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all counts, by operation')
    args = parser.parse_args()
    args.models, args.precisions, args.kernels = (
        value.split(',') for value in (args.models, args.precisions, args.kernels)
    )
    for name in args.models:
        if not timm.is_model(name) or not name.startswith(('coc_', 'fec_')):
            parser.error(f"--models: '{name}' is not one of the registered models coc_* and fec_*")
    return args


def print_operations(traffic: Traffic) -> None:
    rows = [['operation', 'launches', 'GB']]
    for name, moved in traffic.bytes.most_common():
        rows.append([f'`{name}`', str(traffic.launches[name]), f'{moved / 1e9:.3f}'])
    print()
    print_table(rows)
    print()


def main() -> None:
    args = parse_args()
    print(f'batch {args.batch_size}, {args.img_size} px, channels_last; torch {torch.__version__}, {date.today()}')
    rows = [['model', 'precision', 'kernels', 'pass', 'launches', 'floor', 'ratio', 'GB', 'floor', 'ratio']]
    result = []
    for name in args.models:
        model = timm.create_model(name)
        for precision in args.precisions:
            least = counts(floor(model), precision, 'plain', args)
            for kernels in args.kernels:
                for which, traffic in counts(model, precision, kernels, args).items():
                    row = [f'`{name}`', precision, kernels, which]
                    for ours, theirs, form in (
                        (traffic.launches.total(), least[which].launches.total(), '{}'),
                        (traffic.bytes.total() / 1e9, least[which].bytes.total() / 1e9, '{:.1f}'),
                    ):
                        row += [form.format(ours), form.format(theirs), f'{ours / theirs:.2f}']
                    rows.append(row)
                    by_operation = dict(launches=traffic.launches, bytes=traffic.bytes)
                    result.append(dict(zip(rows[0][:4], (name, *row[1:4]))) | by_operation)
                    if args.operations:
                        print(f'\n{name}, {precision}, {kernels}, {which}')
                        print_operations(traffic)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
