"""Converts a training checkpoint to small weights for the package: half precision, safetensors, model only.

A classifier becomes a weight file, a segmenter a model folder:

python benchmarks/bundle.py output/train/cifar10/model_best.pth.tar cluster_zoo/assets/coc_tiny_plain.cifar10.safetensors
python benchmarks/bundle.py output/segmentation/bundled/last.pth.tar segmentation/assets/semantic_fpn_coc_tiny.camvid
"""  # noqa: E501  a command must be on one line

import argparse
from pathlib import Path

from safetensors.torch import save_file

from cluster_zoo.weights import load_state_dict
from segmentation import save_pretrained
from segmentation.models.importing import load_segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('output', type=Path)
    args = parser.parse_args()
    if args.output.suffix != '.safetensors':
        model = load_segmenter(args.checkpoint)
        save_pretrained(model.half(), args.output)
        print(f'{args.output}: {sum(file.stat().st_size for file in args.output.iterdir()) / 1e6:.1f} MB')
        return
    state_dict = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in load_state_dict(args.checkpoint).items()
    }
    save_file(state_dict, args.output)
    print(f'{args.output}: {len(state_dict)} tensors, {args.output.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
