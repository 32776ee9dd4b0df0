"""What is refused before it is opened: files that are not what they say, configurations that do more than describe.

Whoever wrote a file chose every byte of it, so what it claims about itself (sizes, offsets, names) is compared with
what is there before anything is unpacked, allocated or built.
"""

from .archives import check_archive, is_archive, unpack_checkpoint
from .configs import check_config, read_config_file
from .errors import CheckpointError
from .pickles import check_pickled
from .safetensors_header import check_safetensors

__all__ = [
    'CheckpointError',
    'check_archive',
    'check_config',
    'check_pickled',
    'check_safetensors',
    'is_archive',
    'read_config_file',
    'unpack_checkpoint',
]
