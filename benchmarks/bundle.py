"""Converts a training checkpoint to small weights for the package: half precision, safetensors, model only.

A classifier becomes a weight file, a segmenter a model folder:

python benchmarks/bundle.py output/train/cifar10/model_best.pth.tar cluster_zoo/assets/coc_tiny_plain.cifar10.safetensors
python benchmarks/bundle.py output/segmentation/camvid-bundled-semantic_fpn-coc_tiny-42/last.pth.tar segmentation/assets/semantic_fpn_coc_tiny.camvid --scale 480 360 --origin 'CamVid, benchmarks/camvid.sh bundled'
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
    parser.add_argument('--scale', type=int, nargs=2, help='long and short side that a segmenter resizes images into')
    parser.add_argument('--origin', default='', help='training data and command, for the model card of a segmenter')
    args = parser.parse_args()
    if args.output.suffix != '.safetensors':
        model = load_segmenter(args.checkpoint)
        test = model.config['test'] | (dict(scale=args.scale) if args.scale else {})
        save_pretrained(model.half(), args.output, test=test, source=dict(training=args.origin))
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
