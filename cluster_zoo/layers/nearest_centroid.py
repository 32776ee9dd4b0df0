"""A classifier without class weights: each class is a few centroids, which follow the features of its training images.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3

The pure functions come first (assignment, update), then the memory of features, then the head that owns both. Centroids
move without gradients: a training step ends with ``head.learn(target)``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.utils import unwrap_model
from torch import Tensor

from .anchors import AnchorMixin
from .feature_memory import FeatureMemory, from_oldest
from .kernels import products

__all__ = ['CentroidLearning', 'FeatureMemory', 'NearestCentroidHead', 'balanced_assignment', 'update_centroids']

# The most features that a memory of no stated size holds, of all processes: as a queue, and of several batches
_QUEUE, _BATCHES = 16384, 131072
_ROWS = 4096  # features whose similarities to all centroids exist at a time


def normalize(x: Tensor) -> Tensor:
    """Vectors [..., D] scaled to length one."""
    # Half precision holds this eps; the usual 1e-12 is zero there, and the constant features of a blank image would be
    # divided by it.
    return F.normalize(x, dim=-1, eps=1e-6)


def class_of_target(target: Tensor, num_classes: int) -> Tensor:
    """The class that a target stands for, -1 for none.

    Args:
        target: Class indices, integer [...], any number outside 0 .. K - 1 for none; or soft targets, float [..., K],
            as mixup, cutmix and label smoothing make them. A soft target stands for the class that has more than half
            of its weight; without such a class, as in an even mixture, the image is an example of none.
        num_classes: K.

    Returns:
        int64 [...], values -1 .. K - 1.
    """
    if target.is_floating_point():
        total = target.sum(-1)
        weight, target = target.max(-1)
        return torch.where(2 * weight > total, target, -1)
    target = target.long()
    return torch.where((target >= 0) & (target < num_classes), target, -1)


def _alone(x: Tensor) -> Tensor:
    return x


def balanced_assignment(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    temperature: float = 0.05,
    iterations: int = 3,
    all_reduce: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Shares the samples of each class evenly among its sub-centroids (Sinkhorn-Knopp; section 3.2).

    All classes at once: the sums over the samples of a class are sums over rows with the same label.

    Args:
        similarity: Of each sample to the k sub-centroids of its own class, [M, k], values -1 .. 1.
        labels: Classes, int64 [M]; -1 for samples that do not count.
        num_classes: K.
        temperature: The similarity is divided by it. The lower, the closer a sample keeps to its most similar one.
        iterations: Rounds of scaling the sub-centroids' shares, then the samples'.
        all_reduce: Sums a tensor over processes.

    Returns:
        The sub-centroid of each sample, int64 [M], values 0 .. k - 1.
    """
    rows = labels.clamp_min(0)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))  # float16 has no such powers
    share = (similarity / temperature).exp() * (labels >= 0).unsqueeze(-1)
    tiny = torch.finfo(share.dtype).tiny
    for _ in range(iterations):
        # Common factors (1 / k, 1 / n) change no assignment and are left out.
        load = all_reduce(share.new_zeros(num_classes, share.shape[-1]).index_add(0, rows, share))
        share = share / load.clamp_min(tiny)[rows]
        share = share / share.sum(-1, keepdim=True).clamp_min(tiny)
    return share.argmax(-1)


def update_centroids(
    centroids: Tensor,
    features: Tensor,
    labels: Tensor,
    assigned: Tensor,
    momentum: float = 0.999,
    all_reduce: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Each centroid a step towards the mean direction of its samples (section 3.2).

    Args:
        centroids: Unit vectors [K, k, D].
        features: Unit vectors [M, D], summed in the type of the centroids.
        labels: Classes, int64 [M]; -1 for samples that do not count.
        assigned: Sub-centroid of each sample in its class, int64 [M].
        momentum: Weight of the centroid; the new direction has 1 - momentum.
        all_reduce: Sums a tensor over processes.

    Returns:
        Unit vectors [K, k, D]; a centroid without samples is where it was.
    """
    K, k, D = centroids.shape
    rows = torch.where(labels >= 0, labels * k + assigned, K * k)  # in a last row goes what does not count
    total = centroids.new_zeros(K * k + 1, D)
    for some, to in zip(features.split(_ROWS), rows.split(_ROWS)):
        some = some.to(total.dtype)
        # On a CPU scatter_add sums rows several times as fast as index_add. Elsewhere only the latter has a
        # deterministic form.
        if total.device.type == 'cpu':
            total.scatter_add_(0, to.unsqueeze(-1).expand(-1, D), some)
        else:
            total.index_add_(0, to, some)
    direction = all_reduce(total[:-1]).view_as(centroids)
    moved = normalize(momentum * centroids + (1 - momentum) * normalize(direction))
    return torch.where((direction != 0).any(-1, keepdim=True), moved, centroids)


@dataclass(frozen=True)
class CentroidLearning:
    """How centroids follow the features.

    Attributes:
        momentum: Weight of a centroid against the new direction, 0 .. 1.
        temperature: Of the assignment, see `balanced_assignment`; at least 0.02, where float32 still holds its powers.
        iterations: Rounds of the assignment.
        memory: Features that are remembered, those of the latest images, over all processes. None: as a queue 64 for
            each class, 16,384 at most, but no less than a batch; otherwise those of `every` batches, 131,072 at most.
            Each use compares all of them with all centroids.
        every: Batches from one use of the memory to the next; the batches in between move the centroids by their own
            features. 1 uses the memory in every batch, the queue. The authors' code has 1000 (Swin-T 500, S 400,
            B 300), and remembers as many batches.
        dtype: What the memory holds its features in; None: float32, or float64 in a float64 model.
        contrast: Weight of the contrast loss, see `NearestCentroidHead.contrast_loss`.
        contrast_temperature: Its temperature.

    Raises:
        ValueError: A value is out of range.
    """

    momentum: float = 0.999
    temperature: float = 0.05
    iterations: int = 3
    memory: int | None = None
    every: int = 1
    dtype: torch.dtype | None = None
    contrast: float = 0.0
    contrast_temperature: float = 0.1

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.momentum <= 1, 'momentum', 'of 0 to 1'),
            (self.temperature >= 0.02, 'temperature', 'of at least 0.02'),
            (self.iterations >= 1, 'iterations', 'of at least 1'),
            (self.memory is None or self.memory >= 1, 'memory', 'of at least 1'),
            (self.every >= 1, 'every', 'of at least 1'),
            (self.dtype is None or self.dtype.is_floating_point, 'dtype', 'that is floating point'),
            (self.contrast >= 0, 'contrast', 'of at least 0'),
            (self.contrast_temperature > 0, 'contrast_temperature', 'above 0'),
        )
        for holds, name, expected in rules:
            if not holds:
                raise ValueError(f'Centroid learning needs {name} {expected}, got {getattr(self, name)}.')


class NearestCentroidHead(AnchorMixin, nn.Module):
    """Scores classes by the cosine similarity of a feature to the nearest of their sub-centroids (section 3.1).

    The centroids are no parameters: they are a buffer, which no gradient reaches and no optimizer moves. They need not
    have length one, only their direction counts. With a single class all logits are ``mask_norm``'s bias.

    When training is done, the centroids can become the features of training images, and the head knows of which: see
    :func:`cluster_zoo.explain.anchor`. From the next `learn` on they are no images any more.

    In training, one call after each forward pass lets them follow the features:

        >>> loss = criterion(head(features), target)
        >>> loss.backward()
        >>> optimizer.step()
        >>> head.learn(target)

    Args:
        in_features: Width D of the features.
        num_classes: Classes K.
        sub_centroids: Sub-centroids k of each class.
        learning: How `learn` moves the centroids; may be replaced at any time.
        common_start: Weight of a direction that the sub-centroids of a class have in common when they start, against
            one of their own. With 0 all start in unrelated directions, as published, and a network has to learn each
            class k times: measurably slower in few epochs of many classes. With 2 their cosine is about 0.8.

    Raises:
        ValueError: One of the sizes is not positive.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sub_centroids: int = 4,
        learning: CentroidLearning | None = None,
        common_start: float = 2.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        for name, value in dict(in_features=in_features, num_classes=num_classes, sub_centroids=sub_centroids).items():
            if value < 1:
                raise ValueError(f'A nearest-centroid head needs {name} of at least 1, got {value}.')
        if not 0 <= common_start < float('inf'):
            raise ValueError(f'A nearest-centroid head needs common_start of at least 0, got {common_start}.')
        self.in_features = in_features
        self.num_classes = num_classes
        self.sub_centroids = sub_centroids
        self.common_start = common_start
        self.learning = learning or CentroidLearning()
        self.memory = self._memory_of = None  # the first batch that is learned allocates it
        self.batches = 0  # learned so far
        self.register_buffer('prototypes', torch.empty(num_classes, sub_centroids, in_features, **dd))
        self.feat_norm = nn.LayerNorm(in_features, **dd)
        self.mask_norm = nn.LayerNorm(num_classes, **dd)
        self._exact = None  # centroids in float32, where the buffer is in half precision
        self._seen = None  # unit features of the last forward pass in training
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Centroids in random directions, those of a class near each other; norms without effect."""
        trunc_normal_(self.prototypes, std=0.02)
        if self.common_start > 0:
            common = trunc_normal_(torch.empty_like(self.prototypes[:, :1]), std=0.02)
            self.prototypes.add_(common, alpha=self.common_start)
        self.prototypes.copy_(normalize(self.prototypes))
        self.forget_anchors()
        self.memory, self.batches, self._exact = None, 0, None
        self.feat_norm.reset_parameters()
        self.mask_norm.reset_parameters()

    def _similarity(self, z: Tensor) -> Tensor:
        cosines = F.linear(z, normalize(self.prototypes).flatten(0, 1))
        return cosines.unflatten(-1, (self.num_classes, self.sub_centroids))

    def embed(self, x: Tensor) -> Tensor:
        """Features as they are compared with centroids, of length one: [..., D] -> [..., D]."""
        return normalize(self.feat_norm(x))

    def similarity(self, x: Tensor) -> Tensor:
        """Cosine of each feature and each sub-centroid: [..., D] -> [..., K, k], values -1 .. 1."""
        return self._similarity(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        """Features to logits: [..., D] -> [..., K]. In training it keeps the features for `learn`."""
        z = self.embed(x)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.training and not _is_traced(z):
                self._seen = z if self.learning.contrast > 0 else z.detach()
        return self.mask_norm(self._similarity(z).amax(-1))

    # ---- Learning ----

    def _last_seen(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [M, D] of the last forward pass, at least float32, and the classes [M] of its targets."""
        if self._seen is None:
            raise RuntimeError('Centroids learn from the forward pass before, in training mode: there was none.')
        expected = list(self._seen.shape[:-1])
        if list(target.shape) != (expected + [self.num_classes] if target.is_floating_point() else expected):
            raise ValueError(
                f'Targets of {expected} features are integers of that shape, or numbers '
                f'{[*expected, self.num_classes]}; got {target.dtype} {list(target.shape)}.'
            )
        labels = class_of_target(target, self.num_classes)
        dtype = torch.promote_types(self._seen.dtype, torch.float32)
        return self._seen.reshape(-1, self.in_features).to(dtype), labels.reshape(-1)

    @torch.no_grad()
    def learn(self, target: Tensor) -> None:
        """Move the centroids towards the features of the last forward pass in training mode (section 3.2).

        Samples of each class are shared evenly among its sub-centroids; those that the model now classifies correctly
        pull. Features with NaN or infinity are dropped, and a class without samples stays where it is. With several
        processes every one must call it as often, with batches of any size, and all have the same centroids after it:
        those that one process would have with all batches joined. Each process remembers the latest features of its
        own. Nothing waits for the device. A training step may be compiled with this in it; if ``learning.every`` is
        above 1, call it outside, because the number of the batch would be compiled in.

        Args:
            target: Targets of that pass, see `class_of_target`.

        Raises:
            RuntimeError: No such pass since the last call.
            ValueError: The targets do not fit it.
        """
        features, labels = self._last_seen(target)
        self._seen = None
        finite = features.isfinite().all(-1)
        features = torch.where(finite.unsqueeze(-1), features, 0)
        labels = torch.where(finite, labels, -1)
        self._prepare_memory(len(features))
        self.memory.push(features, labels)
        if self.learning.every > 1:
            self.batches += 1
        self.forget_anchors()
        if self.batches % self.learning.every == 0:
            features, labels = self.memory.features, self.memory.labels
        self._move(features, labels)

    def _prepare_memory(self, batch: int) -> None:
        """Allocate this process's share of the memory, unless it is as the head and its settings are now."""
        if self.memory is not None and self._memory_of == self._memory_settings():
            return
        world, learning = _world_size(), self.learning
        if learning.memory is not None:
            size = -(-learning.memory // world)
        elif learning.every > 1:
            size = min(learning.every * batch, -(-_BATCHES // world))
        else:
            size = max(-(-min(64 * self.num_classes, _QUEUE) // world), batch)
        remembered = self.memory
        self._new_memory(size)
        if remembered is not None:
            self.memory.load_state_dict(remembered.state_dict())

    def _memory_settings(self) -> tuple:
        dtype = self.learning.dtype or torch.promote_types(self.prototypes.dtype, torch.float32)
        return self.learning.memory, self.learning.every, dtype, self.prototypes.device

    def _new_memory(self, size: int) -> None:
        self._memory_of = self._memory_settings()
        *_, dtype, device = self._memory_of
        self.memory = FeatureMemory(size, self.in_features, device, dtype)

    def learning_state(self) -> dict[str, Any]:
        """What learning has gathered in this process beside the centroids, for a checkpoint to go on from."""
        memory = None if self.memory is None else self.memory.state_dict()
        exact = None if self._exact is None else self._exact.cpu()
        return dict(batches=self.batches, memory=memory, exact=exact)

    def load_learning_state(self, *states: dict[str, Any]) -> None:
        """Go on from what `learning_state` gave, in one process or in several whose memories become this one's.

        Raises:
            ValueError: It is of features of another width, or its labels are no numbers of classes.
        """
        self.memory = None
        memories = [state['memory'] for state in states if state['memory'] is not None]
        for state in states:
            self.batches, self._exact = state['batches'], state.get('exact')
        if not memories:
            return
        stated = self.learning.memory
        held = sum(memory.get('size', len(memory['labels'])) for memory in memories)
        self._new_memory(min(held, _BATCHES) if stated is None else -(-stated // _world_size()))
        first, *others = (
            dict(memory, labels=class_of_target(memory['labels'], self.num_classes)) for memory in memories
        )
        self.memory.load_state_dict(first)
        for memory in others:
            self.memory.push(*from_oldest(memory))

    def _move(self, features: Tensor, labels: Tensor) -> None:
        learning, dtype = self.learning, torch.promote_types(self.prototypes.dtype, torch.float32)
        with torch.autocast(self.prototypes.device.type, enabled=False):
            own, correct = self._own_similarity(features, labels)
            assigned = balanced_assignment(
                own, labels, self.num_classes, learning.temperature, learning.iterations, _all_reduce
            )
            labels = torch.where(correct, labels, -1)
            moved = update_centroids(
                self._exact_centroids(dtype), features, labels, assigned, learning.momentum, _all_reduce
            )
            self.prototypes.copy_(moved)
            self._exact = moved if self.prototypes.dtype != dtype else None

    def _exact_centroids(self, dtype: torch.dtype) -> Tensor:
        """Unit vectors. A step is so small that half precision would round it off, so its sum is kept beside."""
        centroids = normalize(self.prototypes.to(dtype))
        if self._exact is None:
            return centroids
        # Unless the buffer has been given other values
        same = (self._exact.to(self.prototypes) == self.prototypes).all(-1, keepdim=True)
        return torch.where(same, self._exact.to(centroids), centroids)

    def _own_similarity(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity to the sub-centroids of the own class [M, k], and whether the model now finds that class [M].

        The product has the type of the remembered features; logits are compared in the model's.
        """
        # One product a sub-centroid: their maximum is a maximum of whole matrices, which takes half the time of one
        # over a last dimension of a few.
        centroids = normalize(self.prototypes).to(features.dtype).unbind(1)
        own, correct = [], []
        for some, of in zip(features.split(_ROWS), labels.split(_ROWS)):
            cosines = [products(some, each) for each in centroids]
            index = of.clamp_min(0).unsqueeze(-1)
            own.append(torch.cat([of_all.gather(1, index) for of_all in cosines], dim=1))
            logits = self.mask_norm(functools.reduce(torch.maximum, cosines).to(self.mask_norm.weight.dtype))
            correct.append((logits.argmax(-1) == of) & logits.isfinite().all(-1))
        return torch.cat(own), torch.cat(correct)

    def contrast_loss(self, target: Tensor) -> Tensor:
        """Pulls the features of the last forward pass to their sub-centroid, and off all others (section 3.2).

        Cross-entropy over the similarities to all K * k sub-centroids, divided by ``learning.contrast_temperature``;
        the right one is the sub-centroid that the sample is assigned to. ``learning.contrast`` must have been above 0
        in the forward pass, and is not yet multiplied with.

        Args:
            target: Targets of that pass, see `class_of_target`.

        Returns:
            The mean over the samples that have a class; 0 without any.

        Raises:
            RuntimeError, ValueError: As in `learn`.
        """
        features, labels = self._last_seen(target)
        with torch.autocast(self.prototypes.device.type, enabled=False):
            cosines = self._similarity(features.to(self.prototypes.dtype))
            index = labels.clamp_min(0).view(-1, 1, 1).expand(-1, 1, self.sub_centroids)
            own = cosines.detach().gather(1, index).squeeze(1)
            assigned = balanced_assignment(
                own, labels, self.num_classes, self.learning.temperature, self.learning.iterations
            )
            right = torch.where(labels >= 0, labels * self.sub_centroids + assigned, -1)
            logits = cosines.flatten(1) / self.learning.contrast_temperature
            total = F.cross_entropy(logits, right, ignore_index=-1, reduction='sum')
            return total / (right >= 0).sum().clamp_min(1)

    def __getstate__(self) -> dict[str, Any]:
        # The features of a pass are not part of the head, and copy refuses those with a gradient.
        return self.__dict__ | dict(_seen=None)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, num_classes={self.num_classes}, sub_centroids={self.sub_centroids}'


def centroid_heads(model: nn.Module | None) -> list[NearestCentroidHead]:
    """The nearest-centroid heads of a model, which may be wrapped or compiled."""
    modules = unwrap_model(model).modules() if model is not None else ()
    return [module for module in modules if isinstance(module, NearestCentroidHead)]


def centroid_head(model: nn.Module) -> NearestCentroidHead:
    """The one head of a model, or ValueError."""
    heads = centroid_heads(model)
    if len(heads) != 1:
        raise ValueError(
            f'{type(unwrap_model(model)).__name__} has {len(heads) or "no"} centroid heads, expected one: '
            'take a dnc_* model, or cluster_zoo.nearest_centroid(name) for any other.'
        )
    return heads[0]


def _is_traced(x: Tensor) -> bool:
    """Whether a tool only looks at what a forward pass does: nothing has been seen then."""
    # In torch 2.11 torch.compile says that it is exporting.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(x: Tensor) -> Tensor:
    if _world_size() > 1:
        dist.all_reduce(x)
    return x
