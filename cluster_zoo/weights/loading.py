"""Loading models by name, with checks of what comes from elsewhere."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
from torch import Tensor

from ..errors import CheckpointError, one_line
from . import cache
from .configs import check_size, read_config
from .download import hub_folder
from .reading import load_state_dict

__all__ = ['FOREIGN', 'load_model', 'open_model_folder', 'split_hub_id']

FOREIGN = ('hf-hub', 'local-dir')  # sources whose configuration timm takes as it finds it


def split_hub_id(hub_id: str) -> tuple[str, str | None]:
    """``org/name@revision`` as repository and revision; None without a revision."""
    repo_id, _, revision = hub_id.partition('@')
    return repo_id, revision or None


def open_model_folder(folder: Path, architecture: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked configuration and the weights of a model folder."""
    config = read_config(folder, architecture)
    return config, load_state_dict(cache.verified_weights(folder))


def load_model(name: str, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with one kind of error, and with checks of what comes from elsewhere.

    Args:
        name: Any model of timm or of this package, with or without a tag, ``hf-hub:org/name`` or ``local-dir:FOLDER``.
        pretrained: As for ``timm.create_model``.
        **kwargs: Likewise.

    Raises:
        CheckpointError: There is no such model, it cannot be built, or its weights cannot be had. The message says what
            would help.
    """
    source, _, place = name.partition(':')
    try:
        if source not in FOREIGN:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        folder = hub_folder(*split_hub_id(place)) if source == 'hf-hub' else Path(place)
        _, state_dict = open_model_folder(folder) if pretrained else (read_config(folder), None)
        create = partial(timm.create_model, f'local-dir:{folder}', **kwargs)
        check_size(create, state_dict, name)
        return create(pretrained=pretrained, pretrained_cfg_overlay=dict(state_dict=state_dict, source=None))
    except CheckpointError:
        raise
    except Exception as error:  # of timm, of a client, or of a library that reads a damaged file
        raise CheckpointError(f"'{name}' cannot be loaded: {one_line(error)}") from error
