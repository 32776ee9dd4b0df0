"""Tasks for models with centroids: updates of the centroids, the averaged model, the contrast loss."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
)
from torch import nn

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.layers.centroid_learning import CentroidLearning
from cluster_zoo.training.tasks import CentroidTaskMixin, NearestCentroidTask, centroid_heads, with_centroid_learning

TINY = dict(channels=(8, 16, 24, 32), num_classes=5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(**learning) -> nn.Module:
    model = timm.create_model('dnc_resnet18', **TINY)
    model.get_classifier().learning = CentroidLearning(**{'momentum': 0.5, **learning})
    return model


def batch(size=6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 3, 32, 32), torch.randint(5, (size,))


def prototypes(task, ema=False) -> torch.Tensor:
    (head,) = centroid_heads(task.get_trainable_module(ema=ema))
    return head.prototypes.clone()


@pytest.fixture
def learned(monkeypatch):
    """Records the targets of `NearestCentroidHead.learn`."""
    from cluster_zoo.layers.nearest_centroid import NearestCentroidHead

    targets, original = [], NearestCentroidHead.learn

    def learn(self, target):
        targets.append(target)
        original(self, target)

    monkeypatch.setattr(NearestCentroidHead, 'learn', learn)
    return targets


# ---- Steps ----


def test_a_step_is_a_plain_loops(learned):
    """Compares the task with the loop in the documentation of `NearestCentroidHead`."""
    model = tiny()
    twin = copy.deepcopy(model)
    task = NearestCentroidTask(model, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for _ in range(3):
        images, target = batch()
        result = task(images, target)
        result['loss'].backward()
        loss = F.cross_entropy(twin(images), target, label_smoothing=0.1)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        before = prototypes(task)
        task.update_ema()
        twin.learn(target)
        torch.testing.assert_close(result['loss'], loss)
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        assert result['output'].shape == (6, 5) and 'contrast_loss' not in result
        assert not torch.equal(prototypes(task), before)
    assert len(learned) == 6


def test_a_batch_is_learned_once_under_accumulation(learned):
    task = NearestCentroidTask(tiny(), verbose=False)
    task.setup_ema(decay=0.9)
    targets = []
    for number in range(6):
        images, target = batch()
        targets.append(target)
        with task.no_sync():
            task(images, target)['loss'].backward()
        assert len(learned) == number  # the last batch is learned after its backward pass
        if number % 3 == 2:
            task.update_ema(step=number)
            assert len(learned) == number + 1
            task.update_ema(step=number)
            task.learn_last_batch()
    assert len(learned) == 6 and all(a is b for a, b in zip(learned, targets))


def test_centroids_stay_until_the_gradients_are_taken():
    task = NearestCentroidTask(tiny(), verbose=False)
    before = prototypes(task)
    loss = task(*batch())['loss']
    assert torch.equal(prototypes(task), before)
    loss.backward()
    task.update_ema()
    assert not torch.equal(prototypes(task), before)


def test_evaluation_teaches_nothing(learned):
    task = NearestCentroidTask(tiny(), verbose=False).eval()
    before = prototypes(task)
    assert task(*batch())['loss'].isfinite()
    task.get_eval_model()(batch()[0])
    task(*batch())
    task.update_ema()
    assert learned == [] and torch.equal(prototypes(task), before)
    # The previous batch is not lost.
    task.train()
    _, target = pending = batch()
    task(*pending)
    task.eval()(*batch())
    assert len(learned) == 1 and learned[0] is target


def test_soft_targets(learned):
    task = NearestCentroidTask(tiny(), criterion_kwargs=dict(soft_targets=True), verbose=False)
    images, target = batch()
    task(images, F.one_hot(target, 5) * 0.6 + 0.08)['loss'].backward()
    task.update_ema()
    (head,) = centroid_heads(task)
    assert head.memory.labels[:6].tolist() == target.tolist()


# ---- The averaged model ----


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_averaged_model_has_the_centroids_themselves(dtype):
    task = NearestCentroidTask(tiny().to(dtype), verbose=False)
    task.setup_ema(decay=0.99)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for step in range(3):
        images, target = batch()
        task(images.to(dtype), target)['loss'].backward()
        optimizer.step()
        task.update_ema(step=step)
        assert torch.equal(prototypes(task, ema=True), prototypes(task))
    averaged = task.get_trainable_module(ema=True).module
    assert not torch.equal(averaged.conv1.weight, task.get_trainable_module().conv1.weight)
    assert centroid_heads(averaged)[0].memory is None  # it does not learn


# ---- The contrast loss ----


def test_contrast_loss_is_added_and_reaches_the_backbone():
    model = tiny(contrast=0.3, contrast_temperature=0.2)
    plain = copy.deepcopy(model)
    task = NearestCentroidTask(model, verbose=False)
    images, target = batch()
    result = task(images, target)
    head = plain.get_classifier()
    logits = plain(images)
    contrast = head.contrast_loss(target)
    loss = F.cross_entropy(logits, target) + 0.3 * contrast
    torch.testing.assert_close(result['contrast_loss'], contrast)
    torch.testing.assert_close(result['loss'], loss)
    result['loss'].backward()
    loss.backward()
    torch.testing.assert_close(model.conv1.weight.grad, plain.conv1.weight.grad)
    without = copy.deepcopy(plain)
    without.zero_grad()
    F.cross_entropy(without(images), target).backward()
    assert not torch.allclose(without.conv1.weight.grad, model.conv1.weight.grad)
    task.update_ema()


@pytest.mark.parametrize('compiled', [False, True])
def test_contrast_loss_with_a_compiled_model(compiled):
    torch.compiler.reset()
    task = NearestCentroidTask(tiny(contrast=0.3), verbose=False)
    task.setup_ema()
    if compiled:
        task.compile(backend='aot_eager')
        task.compile_ema(backend='aot_eager')
    before = prototypes(task)
    torch.manual_seed(1)
    for _ in range(2):
        result = task(*batch())
        result['loss'].backward()
        task.update_ema()
    assert result['contrast_loss'] > 0
    assert not torch.equal(prototypes(task), before)
    assert torch.equal(prototypes(task, ema=True), prototypes(task))
    assert not any('_orig_mod' in name for name in task.get_checkpoint_state()['state_dict'])


# ---- Other tasks of timm ----


def test_classes_are_made_once():
    made = with_centroid_learning(LogitDistillationTask)
    assert made is with_centroid_learning(LogitDistillationTask)
    assert issubclass(made, (CentroidTaskMixin)) and issubclass(made, LogitDistillationTask)
    assert made.__name__ == 'NearestCentroidLogitDistillationTask'


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation(kind, learned):
    teacher = timm.create_model('resnet18', **TINY)
    common = dict(teacher_model=teacher, verbose=False)
    model = tiny(contrast=0.1)
    if kind == 'logit':
        task = with_centroid_learning(LogitDistillationTask)(model, **common)
    else:
        dims = dict(student_feature_dim=32, teacher_feature_dim=32)
        task = with_centroid_learning(FeatureDistillationTask)(model, **dims, **common)
    task.setup_ema()
    before = prototypes(task)
    for _ in range(2):
        result = task(*batch())
        result['loss'].backward()
        task.update_ema()
    assert len(learned) == 2 and not torch.equal(prototypes(task), before)
    assert torch.equal(prototypes(task, ema=True), prototypes(task))
    assert result['contrast_loss'].isfinite() and model.conv1.weight.grad.abs().sum() > 0
    assert {'fc.prototypes'} < set(task.get_checkpoint_state()['state_dict'])


def test_a_teacher_with_centroids_learns_nothing(learned):
    teacher = tiny()
    task = with_centroid_learning(LogitDistillationTask)(tiny(), teacher_model=teacher, verbose=False)
    before = teacher.get_classifier().prototypes.clone()
    task(*batch())['loss'].backward()
    task.update_ema()
    assert len(learned) == 1 and torch.equal(teacher.get_classifier().prototypes, before)


def test_models_without_centroids():
    model = timm.create_model('resnet18', **TINY)
    twin = copy.deepcopy(model)
    task, plain = NearestCentroidTask(model, verbose=False), ClassificationTask(twin, verbose=False)
    images, target = batch()
    assert torch.equal(task(images, target)['loss'], plain(images, target)['loss'])
    task.update_ema()
    assert task.learning_state() == []


# ---- Resuming ----


def test_learning_state():
    task = NearestCentroidTask(tiny(), verbose=False)
    task(*batch())['loss'].backward()
    task.update_ema()
    other = NearestCentroidTask(tiny(), verbose=False)
    other.load_learning_state([task.learning_state(), task.learning_state()])  # of two processes
    (head,) = centroid_heads(task)
    (restored,) = centroid_heads(other)
    assert restored.memory.labels[:12].tolist() == 2 * head.memory.labels[:6].tolist()
    other.load_learning_state([])
    assert restored.memory.labels[:12].tolist() == 2 * head.memory.labels[:6].tolist()
