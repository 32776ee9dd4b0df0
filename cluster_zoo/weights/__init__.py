"""Pretrained weights: where they come from, how files are read, and what is refused (docs/security.md).

Whatever is wrong with weights, a file, a server or a configuration is one `CheckpointError` with one line of text.
"""

from ..errors import CheckpointError
from .reading import (
    check_fit,
    convert_state_dict,
    extract_state_dict,
    load_checkpoint,
    load_state_dict,
    load_weights,
    read_checkpoint,
)

__all__ = [
    'CheckpointError',
    'check_fit',
    'convert_state_dict',
    'extract_state_dict',
    'load_checkpoint',
    'load_state_dict',
    'load_weights',
    'read_checkpoint',
]
