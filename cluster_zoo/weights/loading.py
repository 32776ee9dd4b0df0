"""Loading models by name, with checks of model folders from the Hub or the disk."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from torch import Tensor

from ..errors import CheckpointError, one_line
from . import cache
from .checkpoints import load_state_dict
from .configs import check_size, read_config
from .download import hub_folder

__all__ = ['FOREIGN', 'load_model', 'open_model_folder']

FOREIGN = ('hf-hub', 'local-dir')  # prefixes of names whose configuration is untrusted


def open_model_folder(folder: Path, architecture: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the configuration and the state dict of a model folder after checking both."""
    config = read_config(folder, architecture)
    return config, load_state_dict(cache.verified_weights(folder))


def load_model(name: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """Calls ``timm.create_model`` with checks of untrusted model folders, and raises only `CheckpointError`.

    Args:
        name: Any model of timm or of this package, with or without a tag, ``hf-hub:org/name`` or ``local-dir:FOLDER``.
        pretrained: Load pretrained weights.
        **kwargs: Further arguments of ``timm.create_model``.

    Returns:
        The model. That of a model folder has the attribute ``multi_label``: whether an image can have several of its
        classes, with a probability that is the sigmoid of each logit.

    Raises:
        CheckpointError: The model does not exist or cannot be built, or its weights are not available.
    """
    source, _, location = name.partition(':')
    try:
        if source not in FOREIGN:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        folder = hub_folder(location) if source == 'hf-hub' else Path(location)
        config, state_dict = open_model_folder(folder) if pretrained else (read_config(folder), None)
        create = partial(timm.create_model, f'local-dir:{folder}', **kwargs)
        check_size(create, state_dict, name)
        model = create(pretrained=pretrained, pretrained_cfg_overlay=dict(state_dict=state_dict, source=None))
        model.multi_label = bool(config.get('multi_label'))
        return model
    except CheckpointError:
        raise
    except Exception as error:  # of timm, of the Hub's client, or of a library that reads a damaged file
        raise CheckpointError(f"'{name}' cannot be loaded: {one_line(error)}") from error
