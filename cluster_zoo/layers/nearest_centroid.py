"""The nearest-centroid head: a classifier without class weights, whose classes are a few centroids each.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3

Centroids move without gradients: a training step ends with ``head.learn(target)``.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.utils import unwrap_model
from torch import Tensor

from .anchors import AnchorMixin
from .centroid_learning import (
    CHUNK,
    CentroidLearning,
    balanced_assignment,
    class_of_target,
    normalize,
    update_centroids,
)
from .feature_memory import FeatureMemory, from_oldest
from .kernels import products

__all__ = ['NearestCentroidHead', 'centroid_head', 'centroid_heads']

# Largest default memory over all processes: with ``every`` of 1, and with a larger ``every``
_QUEUE, _BATCHES = 16384, 131072


class NearestCentroidHead(AnchorMixin, nn.Module):
    """Scores each class by the cosine similarity of a feature to the nearest of its sub-centroids (section 3.1).

    The centroids are a buffer, not parameters: they get no gradient, and optimizers do not change them. Only their
    direction matters, not their norm. With a single class all logits equal the bias of ``mask_norm``.

    After training, `anchor` can replace the centroids by features of training images, which
    the head then records. The next `learn` removes the record.

    In training, one call after each step updates the centroids:

        >>> loss = criterion(head(features), target)
        >>> loss.backward()
        >>> optimizer.step()
        >>> head.learn(target)

    Args:
        in_features: Width D of the features.
        num_classes: Number of classes K.
        sub_centroids: Number of sub-centroids k of each class.
        learning: Settings of `learn`; may be replaced at any time.
        common_start: Initial closeness of the sub-centroids of a class: the weight of a common direction, added to a
            separate direction of weight one. With 0, as in the paper, all start in unrelated directions, and the
            network learns each class k times, which is measurably slower in short training with many classes. With 2
            their cosine similarity is about 0.8.

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
        self.memory = self._memory_of = None  # allocated by the first call of learn
        self.batches = 0  # number of calls of learn
        self.register_buffer('prototypes', torch.empty(num_classes, sub_centroids, in_features, **dd))
        self.feat_norm = nn.LayerNorm(in_features, **dd)
        self.mask_norm = nn.LayerNorm(num_classes, **dd)
        self._exact = None  # centroids in float32 if the buffer has half precision
        self._seen = None  # unit features of the last forward pass in training mode
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes the centroids in random directions, see ``common_start``, and resets the norms."""
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
        """Features to unit vectors, which are compared with the centroids: [..., D] -> [..., D]."""
        return normalize(self.feat_norm(x))

    def similarity(self, x: Tensor) -> Tensor:
        """Cosine similarity of each feature and each sub-centroid: [..., D] -> [..., K, k], values -1 .. 1."""
        return self._similarity(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        """Features to logits: [..., D] -> [..., K]. In training mode it stores the features for `learn`."""
        z = self.embed(x)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.training and not _is_traced(z):
                self._seen = z if self.learning.contrast > 0 else z.detach()
        return self.mask_norm(self._similarity(z).amax(-1))

    # ---- Learning ----

    def _last_seen(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features [M, D] of the last forward pass, at least float32, and the classes [M] of its targets."""
        if self._seen is None:
            raise RuntimeError('Centroids learn from the last forward pass in training mode: run one first.')
        expected = list(self._seen.shape[:-1])
        if list(target.shape) != (expected + [self.num_classes] if target.is_floating_point() else expected):
            raise ValueError(
                f'Targets of {expected} features must be integers {expected} or floats '
                f'{[*expected, self.num_classes]}, got {target.dtype} {list(target.shape)}.'
            )
        labels = class_of_target(target, self.num_classes)
        dtype = torch.promote_types(self._seen.dtype, torch.float32)
        return self._seen.reshape(-1, self.in_features).to(dtype), labels.reshape(-1)

    @torch.no_grad()
    def learn(self, target: Tensor) -> None:
        """Moves the centroids towards the features of the last forward pass in training mode (section 3.2).

        The samples of each class are assigned evenly to its sub-centroids, and those that the model now classifies
        correctly move them. Features with NaN or infinity are ignored. A class without samples is unchanged.

        In distributed training all processes must call it equally often, with batches of any size. They then have the
        same centroids, equal to those of one process with the joined batches. Each process stores its own features.

        It never synchronizes with the device. It may be part of a compiled training step if ``learning.every`` is 1;
        otherwise call it outside, because the count of batches would be compiled as a constant.

        Args:
            target: Targets of that forward pass, see `class_of_target`.

        Raises:
            RuntimeError: There was no forward pass in training mode since the last call.
            ValueError: The shape of the targets does not fit the features.
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
        """Allocates this process's share of the memory if it does not exist or the settings have changed."""
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
        """State of centroid learning in this process, without the centroids, to resume from a checkpoint."""
        memory = None if self.memory is None else self.memory.state_dict()
        exact = None if self._exact is None else self._exact.cpu()
        return dict(batches=self.batches, memory=memory, exact=exact)

    def load_learning_state(self, *states: dict[str, Any]) -> None:
        """Restores the result of `learning_state`. The memories of several processes are joined.

        Raises:
            ValueError: The features have another width, or the labels are not int64.
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
        """Unit vectors. Half precision would round small steps to zero, so a float32 copy accumulates them."""
        centroids = normalize(self.prototypes.to(dtype))
        if self._exact is None:
            return centroids
        # The copy is outdated where the buffer was changed from outside.
        same = (self._exact.to(self.prototypes) == self.prototypes).all(-1, keepdim=True)
        return torch.where(same, self._exact.to(centroids), centroids)

    def _own_similarity(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Similarity to the sub-centroids of the sample's class [M, k], and whether it is classified correctly [M].

        Products are computed in the dtype of the memory, logits in that of the model.
        """
        # One product for each sub-centroid: the maximum of whole matrices takes half the time of a maximum over a last
        # dimension of a few elements.
        centroids = normalize(self.prototypes).to(features.dtype).unbind(1)
        own, correct = [], []
        for some, label in zip(features.split(CHUNK), labels.split(CHUNK)):
            cosines = [products(some, each) for each in centroids]
            index = label.clamp_min(0).unsqueeze(-1)
            own.append(torch.cat([cosine.gather(1, index) for cosine in cosines], dim=1))
            logits = self.mask_norm(functools.reduce(torch.maximum, cosines).to(self.mask_norm.weight.dtype))
            correct.append((logits.argmax(-1) == label) & logits.isfinite().all(-1))
        return torch.cat(own), torch.cat(correct)

    def contrast_loss(self, target: Tensor) -> Tensor:
        """Contrast loss of the features of the last forward pass and all sub-centroids (section 3.2).

        Cross-entropy over the similarities to all K * k sub-centroids, divided by ``learning.contrast_temperature``.
        The target is the sub-centroid that the sample is assigned to. ``learning.contrast`` must be above 0 during the
        forward pass. The loss is not multiplied by it.

        Args:
            target: Targets of that forward pass, see `class_of_target`.

        Returns:
            Mean over the samples that have a class; 0 if there are none.

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
            index = torch.where(labels >= 0, labels * self.sub_centroids + assigned, -1)
            logits = cosines.flatten(1) / self.learning.contrast_temperature
            total = F.cross_entropy(logits, index, ignore_index=-1, reduction='sum')
            return total / (index >= 0).sum().clamp_min(1)

    def __getstate__(self) -> dict[str, Any]:
        # Copies do not include the stored features: deepcopy fails for tensors with a graph.
        return self.__dict__ | dict(_seen=None)

    def extra_repr(self) -> str:
        return f'in_features={self.in_features}, num_classes={self.num_classes}, sub_centroids={self.sub_centroids}'


def centroid_heads(model: nn.Module | None) -> list[NearestCentroidHead]:
    """Nearest-centroid heads of a model, which may be wrapped or compiled."""
    modules = unwrap_model(model).modules() if model is not None else ()
    return [module for module in modules if isinstance(module, NearestCentroidHead)]


def centroid_head(model: nn.Module) -> NearestCentroidHead:
    """The nearest-centroid head of a model; raises ValueError if it does not have exactly one."""
    heads = centroid_heads(model)
    if len(heads) != 1:
        raise ValueError(
            f'{type(unwrap_model(model)).__name__} has {len(heads) or "no"} centroid heads, expected one: '
            'use a dnc_* model or cluster_zoo.nearest_centroid(name).'
        )
    return heads[0]


def _is_traced(x: Tensor) -> bool:
    """Whether the forward pass is being traced or exported, so that there are no features to learn from."""
    # is_exporting is also true inside torch.compile in torch 2.11.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(x: Tensor) -> Tensor:
    if _world_size() > 1:
        dist.all_reduce(x)
    return x
