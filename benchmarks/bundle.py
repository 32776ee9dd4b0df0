"""Converts a training checkpoint to a small weight file for the package: half precision, safetensors, model only.

python benchmarks/bundle.py output/train/cifar10/model_best.pth.tar cluster_zoo/assets/coc_tiny_plain.cifar10.safetensors
"""  # noqa: E501  a command must be on one line

import argparse
from pathlib import Path

from safetensors.torch import save_file

from cluster_zoo.weights import load_state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('output', type=Path)
    args = parser.parse_args()
    state_dict = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in load_state_dict(args.checkpoint).items()
    }
    save_file(state_dict, args.output)
    print(f'{args.output}: {len(state_dict)} tensors, {args.output.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
