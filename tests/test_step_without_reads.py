"""A training step never reads a value from the device, which would wait for all kernels that are queued.

The loops run on fake tensors, which have a shape but no values: reading one raises an error. Fake CPU tensors go
through the whole step. Fake CUDA tensors go through all of it but the backward pass, which PyTorch does not start
without a GPU; there a copy between the GPU and the CPU is an error too. Optimizers are fused, as on CUDA: PyTorch's
others keep their number of steps on the CPU.
"""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import segmentation.train
from cluster_zoo.training.optim import build_optimizer
from cluster_zoo.training.progress import ProgressReport
from cluster_zoo.training.train_options import train_parser
from segmentation.engine.build import build_optimizer as build_segmentation_optimizer
from segmentation.engine.train_options import train_parser as segmentation_parser

UPDATES = 2
ERRORS = (DataDependentOutputException, DynamicOutputShapeException)
READS = {
    'item': lambda x: x.item(),
    'float': float,
    'bool': bool,
    'tolist': lambda x: x.tolist(),
    'nonzero': lambda x: x.nonzero(),
    'mask': lambda x: x.view(1)[x.view(1) > 0],
}


class Stop:
    """Stops a run after some updates."""

    group, signal = None, 0

    def __init__(self, run):
        self.run = run

    def requested(self):
        return self.run.updates >= UPDATES


class Batches:
    """A loader that repeats a batch. It has more batches than there are updates: the last of an epoch is logged."""

    dataset = sampler = batch_sampler = None

    def __init__(self, *batch):
        self.batch = batch

    def __len__(self):
        return 100

    def __iter__(self):
        return itertools.repeat(self.batch, len(self))


class NoTransfers(TorchDispatchMode):
    """Raises an error for an operation that copies between the CPU and the GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.ndim]
        if len({x.device.type for x in tensors}) > 1:
            raise AssertionError(f'{operation} copies between devices')
        return result


def make_fake(run, mode, device='cpu'):
    """Replaces parameters and buffers of a run by fake tensors. Its process is not the first one, which logs."""

    def fake(x):
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    for module in run.task.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(fake(value), value.requires_grad)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else fake(value)
    assert all(isinstance(x, FakeTensor) for x in run.task.state_dict().values())
    run.args.rank, run.args.device, run.stop = 1, device, Stop(run)


@contextmanager
def fake_cuda(run, monkeypatch):
    """Lets PyTorch run fake CUDA tensors without a GPU: autocast without a check, a backward pass that does nothing."""

    def backward(loss, **kwargs):
        for parameter in run.task.get_trainable_module().parameters():
            parameter.grad = torch.empty_like(parameter)

    @contextmanager
    def autocast():
        torch.set_autocast_enabled('cuda', True)
        torch.set_autocast_dtype('cuda', torch.bfloat16)
        yield
        torch.set_autocast_enabled('cuda', False)
        torch.clear_autocast_cache()

    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    if run.args.amp:
        run.autocast = autocast
    with NoTransfers():
        yield


def classifier_run(train, image_folder, model, *flags):
    line = [image_folder, '--model', model, '--num-classes', 3, '--img-size', 32, '--device', 'cpu', '-j', 0, '-b', 4]
    line += ['--dry-run', '--opt-kwargs', 'fused=True', '--sched', 'none', '--model-ema', '--clip-grad', 1, *flags]
    return train.start(train_parser().resolve(list(map(str, line))))


def train_classifier(train, run, device='cpu', monkeypatch=None):
    """Runs `train_epoch` with fake tensors until the requested stop."""
    mode = FakeTensorMode()
    make_fake(run, mode, device)
    run.optimizer = build_optimizer(run.args, run.task)
    with mode:
        images, target = (torch.empty(4, 3, 32, 32, device=device), torch.empty(4, dtype=torch.int64, device=device))
        run.train_loader = Batches(images, target)
        with fake_cuda(run, monkeypatch) if device == 'cuda' else mode:
            assert train.train_epoch(run, ProgressReport(run.args, 100)) is None
    assert run.updates == UPDATES and isinstance(run.progress.loss_sum, FakeTensor)


SHALLOW = ['--model-kwargs', 'depths=[1,1,1,1]']
CASES = {
    'coc': ['coc_tiny', *SHALLOW, '--amp', '--grad-accum-steps', 2],
    'fec': ['fec_small', *SHALLOW, '--amp', '--clip-mode', 'agc', '--clip-grad', 0.01],
    'dnc': ['dnc_coc_tiny', *SHALLOW, '--amp'],
    # PyTorch's fused SGD does not take fake tensors
    'dnc_resnet': ['dnc_resnet18', '--opt', 'sgd', '--opt-kwargs', 'fused=False', '--centroid-every', 2],
    'contrast': ['dnc_resnet18', '--mixup', 0, '--cutmix', 0, '--opt', 'adamw', '--centroid-contrast', 0.1],
}


@pytest.mark.parametrize('case', CASES)
def test_classifier(train, image_folder, case):
    train_classifier(train, classifier_run(train, image_folder, *CASES[case]))


@pytest.mark.parametrize('kernels', ['triton', 'plain'])
@pytest.mark.parametrize('case', CASES)
def test_classifier_on_cuda(train, image_folder, monkeypatch, case, kernels):
    run = classifier_run(train, image_folder, *CASES[case])
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', kernels)
    train_classifier(train, run, 'cuda', monkeypatch)


def test_float16_does_not_wait_for_the_scaler(train, image_folder):
    """PyTorch's scaler leaves it to a fused optimizer to skip an update with infinite gradients."""
    flags = ['test_resnet', '--opt', 'adamw', '--amp', '--amp-dtype', 'float16']
    train_classifier(train, classifier_run(train, image_folder, *flags))
    with pytest.raises(ERRORS):
        train_classifier(train, classifier_run(train, image_folder, *flags, '--opt-kwargs', 'fused=False'))


@pytest.mark.parametrize('read', READS)
def test_read_is_found(train, image_folder, read):
    run = classifier_run(train, image_folder, 'test_resnet', '--opt', 'adamw')
    head = run.task.get_trainable_module().fc
    train_classifier(train, run)
    head.register_forward_hook(lambda module, inputs, output: READS[read](output.detach().sum()))
    run.updates = 0
    with pytest.raises(ERRORS):
        train_classifier(train, run)


@pytest.mark.parametrize('move', [lambda x: x.cpu(), lambda x: x + torch.zeros(3).to(x.device)], ids=['to', 'from'])
def test_copy_is_found(train, image_folder, monkeypatch, move):
    run = classifier_run(train, image_folder, 'test_resnet', '--opt', 'adamw')
    run.task.get_trainable_module().fc.register_forward_hook(lambda module, inputs, output: move(output) and None)
    with pytest.raises(AssertionError, match='copies between devices'):
        train_classifier(train, run, 'cuda', monkeypatch)


def test_loss_is_read_where_it_is_logged(train, image_folder):
    run = classifier_run(train, image_folder, 'test_resnet', '--opt', 'adamw', '--log-interval', 2)
    make_fake(run, mode := FakeTensorMode())
    run.args.rank, run.optimizer = 0, build_optimizer(run.args, run.task)
    with mode, pytest.raises(ERRORS):
        run.train_loader = Batches(torch.empty(4, 3, 32, 32), torch.empty(4, dtype=torch.int64))
        train.train_epoch(run, ProgressReport(run.args, 100))
    assert run.updates == 2


@pytest.fixture(scope='module')
def masks(tmp_path_factory):
    """Two images with their masks."""
    root = tmp_path_factory.mktemp('masks')
    for split, kind in itertools.product(('train', 'val'), ('images', 'masks')):
        (root / split / kind).mkdir(parents=True)
        for index in range(2):
            pixels = np.zeros((40, 48) if kind == 'masks' else (40, 48, 3), np.uint8)
            pixels[10:30, 10:30] = 1
            Image.fromarray(pixels).save(root / split / kind / f'{index}.png')
    (root / 'classes.txt').write_text('ground\nred\n')
    return root


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('classifier', ['plain', 'cond', 'dnc'])
def test_segmenter(masks, monkeypatch, classifier, device):
    line = [
        masks,
        '--head',
        'semantic_fpn',
        '--backbone',
        'coc_tiny',
        '--classifier',
        classifier,
        '--auxiliary',
        '--amp',
    ]
    line += ['--channels', 16, '--crop', 64, '--scale', 80, 64, '-b', 2, '-j', 0, '--device', 'cpu', '--dry-run']
    line += ['--opt-kwargs', 'fused=True', '--clip-grad', 1, '--model-ema', '--grad-accum-steps', 2, *SHALLOW]
    run = segmentation.train.start(segmentation_parser().resolve(list(map(str, line))))
    monkeypatch.setenv('CLUSTER_ZOO_KERNELS', 'triton' if device == 'cuda' else 'auto')
    mode = FakeTensorMode()
    make_fake(run, mode, device)
    run.task.train()
    run.optimizer, run.scheduler = build_segmentation_optimizer(run.args, run.task.get_trainable_module())
    report = segmentation.train.Report(run)
    with mode, fake_cuda(run, monkeypatch) if device == 'cuda' else mode:
        images, labels = (
            torch.empty(2, 3, 64, 64, device=device),
            torch.empty(2, 64, 64, dtype=torch.long, device=device),
        )
        while not run.stop.requested():
            loss = segmentation.train.update(run, itertools.repeat((images, labels)))
            report.update(loss, run.base_lr())
    assert run.iteration == UPDATES and isinstance(loss, FakeTensor)
