"""The registered architectures, one file for each."""

from . import context_cluster, dnc, fec, resnet_cifar
from .dnc import nearest_centroid

__all__ = ['context_cluster', 'dnc', 'fec', 'nearest_centroid', 'resnet_cifar']
