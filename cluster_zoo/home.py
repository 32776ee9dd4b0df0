"""The folder in which the package keeps files: downloaded weights, results of checks."""

import os
from pathlib import Path

import torch

__all__ = ['home']


def home() -> Path:
    """Returns ``CLUSTER_ZOO_HOME``, by default ``cluster_zoo`` in the folder of torch.hub."""
    named = os.environ.get('CLUSTER_ZOO_HOME')
    return (Path(named).expanduser() if named else Path(torch.hub.get_dir()) / 'cluster_zoo').absolute()
