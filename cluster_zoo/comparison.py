"""A model and the file that it was exported to: whether both give the same."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['RAISED', 'TOLERANCE', 'ExportError', 'compare', 'first_line', 'little_scales', 'raise_scales']

TOLERANCE = 1e-4  # largest difference of a logit, float32
RAISED = 0.5  # what `raise_scales` sets layer scales to

_LITTLE = 0.1  # mean of layer scales that are raised
_ROUNDING = 1e-6  # of pixels, which are about one: some units in the last place, as many as a network's sums lose
_ALTERATIONS = 32  # of an image, in search of one for which the model gives what the file gives
_UNDECIDED = 0.5  # largest share of images that may need one


class ExportError(RuntimeError):
    """A model cannot be exported as asked, or what was exported is not the model. The message says which and why."""


def compare(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    shapes: Sequence[tuple[int, int, int]],
    circumstances: str = '',
) -> tuple[float, list[float], int]:
    """Compare a file with its model, for noise and for smooth images of each shape.

    Where a point lies between two centers, as near as float32 can tell, rounding decides which it joins, and an image
    in some dozens has such a point: its logits differ by more than rounding. That is no error if the model itself gives
    the file's logits, within the tolerance, for the image altered by rounding alone (`_is_undecided`). What is wrong
    for another reason is not among the few results that the model has to choose from.

    Args:
        model: In float32, on the CPU.
        run: The file, as a function of images.
        shapes: Batch, height and width.
        circumstances: What a message has to add to the shape.

    Returns:
        The largest difference within the tolerance, those beyond it, and how many images were compared.
    """
    generator = torch.Generator().manual_seed(0)
    near, far, images = 0.0, [], 0
    for shape in shapes:
        described = _described(shape) + circumstances
        for coarseness in (1, 8):
            image = _noise(model.in_chans, shape, coarseness, generator)
            expected = model(image)
            found = _outputs(run, image, expected, described)
            for index, difference in enumerate((found - expected).abs().flatten(1).amax(1).tolist()):
                one = slice(index, index + 1)
                if difference <= TOLERANCE:
                    near = max(near, difference)
                elif _is_undecided(model, image[one], found[one], generator):
                    far.append(difference)
                else:
                    raise ExportError(
                        f'The file is not the model: for {described} their outputs differ by {difference:.1e}, '
                        f'more than {TOLERANCE:.0e}.'
                    )
            images += len(image)
    if len(far) > _UNDECIDED * images:
        raise ExportError(
            f'The file can not be compared with the model: {len(far)} of {images} images have points between two '
            f'centers, and differ by up to {max(far):.1e}.'
        )
    return near, far, images


def _noise(channels: int, shape: tuple[int, int, int], coarseness: int, generator: torch.Generator) -> Tensor:
    """Normal noise [B, C, H, W], interpolated from a grid that is coarser by so much."""
    batch, *size = shape
    grid = torch.randn(batch, channels, *(-(-side // coarseness) for side in size), generator=generator)
    return grid if coarseness == 1 else F.interpolate(grid, size, mode='bilinear')


def _outputs(run: Callable[[Tensor], Tensor], image: Tensor, expected: Tensor, described: str) -> Tensor:
    """What a file gives, in the shape and as finite as it has to be."""
    try:
        found = run(image)
    except Exception as error:  # whatever the runtime raises
        raise ExportError(f'The file does not run on {described}: {first_line(error)}') from error
    if found.shape != expected.shape:
        raise ExportError(
            f'The file is not the model: for {described} it gives {list(found.shape)}, the model '
            f'{list(expected.shape)}.'
        )
    for whose, outputs in (('model', expected), ('file', found)):
        if not outputs.isfinite().all():
            raise ExportError(f'For {described} the {whose} gives values that are not finite.')
    return found


def _is_undecided(model: nn.Module, image: Tensor, found: Tensor, generator: torch.Generator) -> bool:
    """Whether the model gives what was found for this one image, once it is altered by as much as rounding does."""
    for _ in range(_ALTERATIONS):
        altered = image + _ROUNDING * torch.randn(image.shape, generator=generator)
        if (model(altered) - found).abs().max() <= TOLERANCE:
            return True
    return False


def little_scales(model: nn.Module) -> list[Tensor]:
    """Layer scales behind which a branch hardly counts, as before training; behind one of zero there is none at all."""
    scales = [value for name, value in model.named_parameters() if name.rpartition('.')[2] == 'gamma']
    return [scale.detach().clone() for scale in scales if 0 < scale.abs().mean() < _LITTLE]


def raise_scales(tensors: Iterable[Tensor], scales: Sequence[Tensor]) -> None:
    """Raises those tensors that are one of these scales, told by their values: ONNX keeps neither name nor shape."""
    for tensor in tensors:
        if any(tensor.numel() == scale.numel() and torch.equal(tensor.flatten(), scale) for scale in scales):
            tensor.fill_(RAISED)


def _described(shape: tuple[int, ...]) -> str:
    return f'{shape[0]} image{"s" * (shape[0] > 1)} of {shape[1]} x {shape[2]} px'


def first_line(error: Exception) -> str:
    """Of its message, or its type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
