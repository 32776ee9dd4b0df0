"""Largest relative error of each model to the authors' code, over all values of its parity case.

    python benchmarks/parity.py

A case has logits, corners and means of the stages' outputs, and gradients that the authors' code computed in float64
with the weights and images of tests/parity/recipe.py. The weights are saved in a checkpoint of the authors' format and
loaded with `cluster_zoo.weights.load_checkpoint`. The tests require errors below 1e-9.
"""

import sys
import tempfile
from pathlib import Path

import timm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from parity_cases import reference_results, save_released, worst_error  # noqa: E402

import cluster_zoo  # noqa: E402, F401  registers the models
from cluster_zoo.weights import load_checkpoint  # noqa: E402

CASES = ('coc_tiny', 'coc_tiny_plain', 'coc_small', 'coc_medium', 'fec_small', 'fec_base')


def main() -> None:
    print('| model | values | gradients | largest relative error |\n|---|---:|---:|---:|')
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            model = timm.create_model(case).double().eval()
            load_checkpoint(model, save_released(case, Path(folder) / f'{case}.pth.tar'))
            names = list(reference_results(case))
            gradients = sum(name.startswith('grad/') for name in names)
            print(f'| `{case}` | {len(names)} | {gradients} | {worst_error(model, case):.1e} |', flush=True)


if __name__ == '__main__':
    main()
