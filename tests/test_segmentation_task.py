"""Losses of segmenters and updates of their centroids."""

import copy
import math
from pathlib import Path

import plain_centroids
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_processes
from torch import nn

from cluster_zoo.features import record_inputs
from cluster_zoo.layers.centroid_learning import CentroidLearning
from cluster_zoo.layers.nearest_centroid import centroid_head
from segmentation import create_segmenter
from segmentation.engine.losses import cross_entropy, dice_loss
from segmentation.engine.tasks import SegmentationTask

K = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(classifier='plain', head='fcn', backbone='resnet10t', **options) -> nn.Module:
    model = create_segmenter(head, backbone, K, classifier=classifier, channels=8, dropout=0.0, **options)
    for found in [module for module in model.modules() if hasattr(module, 'learning')]:
        found.learning = CentroidLearning(momentum=0.5)
    return model.train()


def batch(size=2, height=40, width=52) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images with striped labels, partly ignored."""
    labels = (torch.arange(height).view(1, -1, 1) // 5 + torch.arange(width) // 9) % (K + 1)
    labels = torch.where(labels == K, 255, labels).expand(size, -1, -1).clone()
    labels[0, :9] = 255
    return torch.randn(size, 3, height, width), labels


def nearest_labels(labels: torch.Tensor, size: tuple[int, int], divisor: int) -> torch.Tensor:
    """Resizes labels of a padded image by nearest neighbor, pixel by pixel."""
    height, width = (math.ceil(side / divisor) * divisor for side in labels.shape[1:])
    found = torch.full((len(labels), *size), 255)
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = y * height // size[0], x * width // size[1]
            if row < labels.shape[1] and column < labels.shape[2]:
                found[:, y, x] = labels[:, row, column]
    return found


# ---- Losses ----


def test_loss_of_a_plain_classifier():
    model = tiny()
    images, labels = batch()
    result = SegmentationTask(model)(images, labels)
    assert set(result) == {'loss', 'output', 'pixel_loss'}
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], labels, ignore_index=255))
    assert result['output'].shape == (2, K, 40, 52)


@pytest.mark.parametrize('backbone', ['resnet10t', 'coc_tiny'])
def test_loss_of_a_conditional_classifier(backbone):
    """Compares with the weighted sum; Context Cluster pads these images."""
    model = tiny('cond', 'semantic_fpn', backbone, auxiliary=True)
    twin = copy.deepcopy(model)
    images, labels = batch()
    result = SegmentationTask(model)(images, labels)
    outputs = twin(images, all_outputs=True)
    guidance = outputs['guidance']
    dice = dice_loss(guidance, nearest_labels(labels, guidance.shape[-2:], model.backbone.divisor))
    expected = cross_entropy(outputs['logits'], labels) + 0.2 * dice + 0.4 * cross_entropy(outputs['auxiliary'], labels)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['guidance_loss'], dice)
    other = SegmentationTask(copy.deepcopy(twin), guidance_weight=1.0, auxiliary_weight=0.0)(images, labels)
    torch.testing.assert_close(other['loss'], result['pixel_loss'] + dice)


def test_loss_is_float32_under_autocast():
    task = SegmentationTask(tiny('cond', auxiliary=True))
    with torch.autocast('cpu', torch.bfloat16):
        result = task(*batch())
    assert result['output'].dtype == torch.bfloat16 and result['loss'].dtype == torch.float32
    result['loss'].backward()


# ---- Centroids ----


@pytest.mark.parametrize('backbone', ['resnet10t', 'coc_tiny'])
def test_centroids_are_updated_with_labeled_pixels(backbone):
    """Compares one step with a loop over the labeled pixels of the feature map."""
    model = tiny('dnc', 'semantic_fpn', backbone)
    task, head = SegmentationTask(model), centroid_head(model)
    images, labels = batch()
    with record_inputs(head) as seen:
        result = task(images, labels)
    [features] = seen
    at = nearest_labels(labels, features.shape[1:3], model.backbone.divisor)
    known = at != 255
    assert 0 < known.sum() < known.numel()
    with torch.no_grad():
        expected = plain_centroids.update(head, plain_centroids.unit_features(head, features[known]), at[known])
    before = head.prototypes.clone()
    result['loss'].backward()
    assert torch.equal(head.prototypes, before)  # not updated before the gradients are computed
    task.update_ema()
    torch.testing.assert_close(head.prototypes, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(head.prototypes, F.normalize(before, dim=-1), atol=1e-3)


def test_contrast_loss_uses_resized_labels():
    model = tiny('dnc')
    head = centroid_head(model)
    head.learning = CentroidLearning(contrast=0.3)
    images, labels = batch()
    result = SegmentationTask(model)(images, labels)
    expected = head.contrast_loss(model.labels_at(labels, tuple(head._seen.shape[1:3])))
    torch.testing.assert_close(result['contrast_loss'], expected)
    torch.testing.assert_close(result['loss'], result['pixel_loss'] + 0.3 * expected)


@pytest.mark.parametrize('compiled', [False, True])
def test_ema_model_has_the_same_centroids(compiled):
    torch.compiler.reset()
    model = tiny('dnc')
    task = SegmentationTask(model)
    task.setup_ema(decay=0.9)
    if compiled:
        task.compile(backend='eager')
        task.compile_ema(backend='eager')
    for step in range(2):
        before = centroid_head(model).prototypes.clone()
        task(*batch())['loss'].backward()
        task.update_ema(step=step)
        assert not torch.equal(centroid_head(model).prototypes, before)
        assert torch.equal(
            centroid_head(task.get_trainable_module(ema=True)).prototypes, centroid_head(model).prototypes
        )


def _in_a_process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    torch.manual_seed(0)
    model = tiny('dnc')
    _freeze_statistics(model)
    task = SegmentationTask(model).prepare_distributed()
    images, labels = batch(4, 96, 96)  # enough features to fill the memory
    own = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        task(images[own], labels[own])['loss'].backward()
        task.update_ema()
    torch.save((centroid_head(model).prototypes, next(model.parameters()).grad), f'{folder}/{rank}.pt')
    if rank == 0:
        task.get_eval_model()(images)  # must not wait for the other process
    dist.destroy_process_group()


def _freeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_two_processes_equal_one(tmp_path: Path):
    run_processes(_in_a_process, 2, str(tmp_path))
    (first, gradient), (second, other) = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert torch.equal(first, second) and torch.equal(gradient, other)
    model = tiny('dnc')
    _freeze_statistics(model)
    task = SegmentationTask(model)
    images, labels = batch(4, 96, 96)  # enough features to fill the memory
    for _ in range(2):
        task(images, labels)['loss'].backward()
        task.update_ema()
    torch.testing.assert_close(centroid_head(model).prototypes, first, rtol=1e-4, atol=1e-5)
