"""Headers of safetensors files, as far as the library does not check them."""

from pathlib import Path

from .configs import parse_json
from .errors import damaged

_MAX_HEADER = 4 * 2**20  # bytes, some 30,000 tensors


def check_safetensors(path: str | Path) -> None:
    """Raise if the header of a safetensors file is very large or says two things of one name.

    Everything else, such as lengths, offsets, sizes and types that contradict each other, the library refuses.

    Raises:
        CheckpointError: For these reasons, or there is no header.
    """
    path = Path(path)
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if length > _MAX_HEADER:
            raise damaged(path, 'a safetensors file', f'its header is said to take {length} bytes')
        try:
            parse_json(file.read(length))
        except ValueError as error:
            raise damaged(path, 'a safetensors file', error) from error
