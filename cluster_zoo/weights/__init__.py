"""Pretrained weights: downloads, the cache, reading and converting untrusted files (see docs/security.md).

All problems with files, servers and configurations raise `CheckpointError` with a message of one line.
"""

from ..errors import CheckpointError
from .checkpoints import (
    check_architecture,
    check_fit,
    convert_state_dict,
    extract_state_dict,
    load_checkpoint,
    load_state_dict,
    load_weights,
    read_checkpoint,
    training_metadata,
    weights_in_use,
)

__all__ = [
    'CheckpointError',
    'check_architecture',
    'check_fit',
    'convert_state_dict',
    'extract_state_dict',
    'load_checkpoint',
    'load_state_dict',
    'load_weights',
    'read_checkpoint',
    'training_metadata',
    'weights_in_use',
]
