"""Time of torch-scatter and of torch's own operations that sum the values of each center's members.

    python benchmarks/scatter.py [--device cuda] [--rounds 40]

The operation is the aggregation of FEC's cluster pooling: B x C x N values, where each point belongs to one of M
centers, are summed to B x C x M. All implementations start and end in the channels-first layout of the surrounding
convolutions, must agree within rounding errors, and take turns in each round. The table has the time of torch's
`scatter_add`, and the times of the others relative to it (above 1 is slower). The best of many rounds is used, because
other work on the machine affects it least. Without torch-scatter its columns are left out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from measuring import interleaved_seconds

try:
    import torch_scatter
except ImportError:
    torch_scatter = None

BATCH = 8
# Channels, points and centers of the three poolings of fec_small and fec_base at 224 px.
SIZES = [(64, 3136, 784), (128, 3136, 784), (196, 784, 196), (320, 784, 196), (320, 196, 49), (512, 196, 49)]


def scatter_add(v: Tensor, index: Tensor, centers: int) -> Tensor:
    return v.new_zeros(*v.shape[:2], centers).scatter_add(-1, index.unsqueeze(1).expand_as(v), v)


def index_add(v: Tensor, index: Tensor, centers: int) -> Tensor:
    rows = v.transpose(1, 2).flatten(0, 1)
    total = v.new_zeros(len(v) * centers, v.shape[1]).index_add(0, _across_batch(index, centers), rows)
    return total.unflatten(0, (len(v), centers)).transpose(1, 2).contiguous()


def one_hot_matmul(v: Tensor, index: Tensor, centers: int) -> Tensor:
    members = v.new_zeros(len(v), centers, v.shape[-1]).scatter_(1, index.unsqueeze(1), 1.0)
    return v @ members.transpose(1, 2)


def torch_scatter_sum(v: Tensor, index: Tensor, centers: int) -> Tensor:
    return torch_scatter.scatter_sum(v, index.unsqueeze(1), dim=-1, dim_size=centers)


def torch_scatter_csr(v: Tensor, index: Tensor, centers: int) -> Tensor:
    order = _across_batch(index, centers).argsort()
    bounds = torch.zeros(len(v) * centers + 1, dtype=torch.int64, device=v.device)
    bounds[1:] = _across_batch(index, centers).bincount(minlength=len(v) * centers).cumsum(0)
    total = torch_scatter.segment_csr(v.transpose(1, 2).flatten(0, 1)[order], bounds, reduce='sum')
    return total.unflatten(0, (len(v), centers)).transpose(1, 2).contiguous()


def _across_batch(index: Tensor, centers: int) -> Tensor:
    """[B, N] -> [B * N], with different indices for the centers of different images."""
    return (index + centers * torch.arange(len(index), device=index.device).unsqueeze(1)).flatten()


WAYS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    'scatter_add': scatter_add,
    'index_add': index_add,
    'one-hot matmul': one_hot_matmul,
}
if torch_scatter is not None:
    WAYS |= {'torch-scatter sum': torch_scatter_sum, 'torch-scatter csr': torch_scatter_csr}


def measure(channels: int, points: int, centers: int, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Returns the best seconds of each implementation: forward, and forward and backward."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(BATCH, channels, points, generator=generator).to(device).requires_grad_()
    index = torch.randint(centers, (BATCH, points), generator=generator).to(device)
    gradient = torch.randn(BATCH, channels, centers, generator=generator).to(device)
    expected = scatter_add(v, index, centers)
    expected_gradient = torch.autograd.grad(expected, v, gradient)[0]

    calls = {}
    for name, way in WAYS.items():
        torch.testing.assert_close(way(v, index, centers), expected, rtol=1e-4, atol=1e-4)
        found_gradient = torch.autograd.grad(way(v, index, centers), v, gradient)[0]
        torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-4, atol=1e-4)
        calls[name, 0] = lambda way=way: way(v.detach(), index, centers)
        calls[name, 1] = lambda way=way: torch.autograd.grad(way(v, index, centers), v, gradient)
    times = interleaved_seconds(calls, device, rounds)
    return {name: [min(times[name, part]) for part in (0, 1)] for name in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', type=torch.device, help='where to measure (default: %(default)s)')
    parser.add_argument('--rounds', default=40, type=int, help='calls per implementation (default: %(default)s)')
    args = parser.parse_args()
    where = (
        torch.cuda.get_device_name(args.device) if args.device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    )
    print(f'torch {torch.__version__}, {args.device} ({where}), batch {BATCH}, float32, best of {args.rounds} rounds')
    print('forward | forward and backward, relative to scatter_add\n')
    names = list(WAYS)[1:]
    print(f'{"C":>4} {"N":>5} {"M":>4}  {"scatter_add, ms":>17}  ' + '  '.join(f'{name:>17}' for name in names))
    for channels, points, centers in SIZES:
        times = measure(channels, points, centers, args.device, args.rounds)
        base = times['scatter_add']
        cells = [' | '.join(f'{1e3 * t:7.2f}' for t in base)]
        cells += [' | '.join(f'{t / b:7.2f}' for t, b in zip(times[name], base)) for name in names]
        print(f'{channels:4} {points:5} {centers:4}  ' + '  '.join(cells), flush=True)


if __name__ == '__main__':
    main()
