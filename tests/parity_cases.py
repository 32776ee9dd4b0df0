"""Results of the authors' code (see `parity/recipe.py`), and functions that compare a model with them."""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / 'parity'

_spec = importlib.util.spec_from_file_location('parity_recipe', FOLDER / 'recipe.py')
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def reference_results(case: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f'{case}.safetensors')


def save_released(case: str, path: Path) -> Path:
    """Saves the weights of a case as the authors' training script does, with all entries of timm 0.6's saver."""
    from argparse import Namespace

    state_dict = {f'module.{name}': value for name, value in recipe.state_dict(case).items()}
    checkpoint = dict(
        epoch=309,
        arch=case,
        state_dict=state_dict,
        optimizer=dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=1e-3, params=[0])]),
        version=2,
        args=Namespace(model=case, lr=1e-3, aa='rand-m9-mstd0.5-inc1', distributed=True),
        metric=73.2,
    )
    torch.save(checkpoint, path)
    return path


def relative_error(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return ((value - reference).norm() / reference.norm()).item()


def worst_error(model: torch.nn.Module, case: str) -> float:
    """Largest relative error of logits, stage outputs and gradients of a float64 model with the weights of a case."""
    expected = reference_results(case)
    (images,) = recipe.inputs(case)
    features, stages = model.forward_intermediates(images)
    logits = model.forward_head(features)
    errors = {'logits': relative_error(logits, expected['logits'])}
    for i, stage in enumerate(stages, start=1):
        errors[f'stage{i}_corner'] = relative_error(stage[:, :, :2, :3], expected[f'stage{i}_corner'])
        errors[f'stage{i}_mean'] = relative_error(stage.mean((2, 3)), expected[f'stage{i}_mean'])
    gradients = [name for name in expected if name.startswith('grad/')]
    if gradients:
        logits.square().sum().backward()
        for name in gradients:
            errors[name] = relative_error(_gradient(model, name.removeprefix('grad/')), expected[name])
    assert set(errors) == set(expected), 'a result was not compared'
    return max(errors.values())


def _gradient(model: torch.nn.Module, name: str) -> Tensor:
    """Gradient of a parameter, by its name in the authors' code."""
    from cluster_zoo.weights import conversion

    if name == 'patch_embed.proj.weight':
        return torch.cat([model.stem.proj.weight.grad, model.stem.coord.weight.grad], dim=1)
    marker = {name: torch.empty(0), 'patch_embed.proj.weight': torch.empty(1, 5, 1, 1)}
    (name,) = set(conversion.context_cluster(marker)) - {'stem.proj.weight', 'stem.coord.weight'}
    return model.get_parameter(name).grad
