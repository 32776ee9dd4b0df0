"""torch.hub entry points: every model of cluster_zoo, by its name in timm, and ``segmenter``.

    torch.hub.load('/path/to/cluster_zoo', 'coc_small', source='local', num_classes=10)
    torch.hub.load('/path/to/cluster_zoo', 'coc_tiny_plain.cifar10', source='local', pretrained=True)
    torch.hub.load('/path/to/cluster_zoo', 'segmenter', 'semantic_fpn_coc_small_25', source='local', pretrained=True)

Keyword arguments are those of ``timm.create_model``, and of ``segmentation.create_segmenter`` for ``segmenter``. The
dependencies must be installed, the package itself need not.
"""

import functools as _functools

import timm as _timm

# torch.hub puts the folder of this file first on the import path, so this imports the package in that folder.
import cluster_zoo as _cluster_zoo
import segmentation as _segmentation

dependencies = ['torch', 'timm', 'safetensors']


def _entry_point(name):
    """Returns a function that calls `timm.create_model`, which handles keywords that the model function ignores."""

    @_functools.wraps(_timm.models.model_entrypoint(name.partition('.')[0]))
    def create(pretrained=False, **kwargs):
        return _timm.create_model(name, pretrained=pretrained, **kwargs)

    return create


def segmenter(head, *args, **kwargs):
    """Creates a segmentation model: the arguments are those of ``segmentation.create_segmenter``."""
    return _segmentation.create_segmenter(head, *args, **kwargs)


def _is_ours(name):
    return _timm.models.model_entrypoint(name.partition('.')[0]).__module__.startswith(f'{_cluster_zoo.__name__}.')


globals().update(
    {name: _entry_point(name) for name in (*_timm.list_models(), *_timm.list_pretrained()) if _is_ours(name)}
)
