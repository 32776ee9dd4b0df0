"""cluster_zoo.training.recipes: which recipe a model gets, and that recipes are made of options."""

import pytest
import timm

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.training.parser import Parser
from cluster_zoo.training.recipes import RECIPES, recipe_for
from cluster_zoo.training.train_options import train_parser


@pytest.mark.parametrize(
    ('model', 'recipe'),
    [
        ('coc_tiny', 'coc'),
        ('coc_tiny.cifar10', 'coc'),
        ('fec_large', 'fec'),
        ('dnc_resnet50', 'dnc_resnet'),
        ('dnc_resnet18_cifar', 'dnc_cifar'),
        ('resnet18_cifar', 'dnc_cifar'),
        ('dnc_mobilenetv2_100', 'dnc_resnet'),
        ('dnc_swin_base', 'dnc_swin'),
        ('dnc_coc_small', 'coc'),
        ('dnc_fec_base', 'fec'),
        ('resnet50', 'timm'),
        ('coat_tiny', 'timm'),
        ('swin_tiny_patch4_window7_224', 'timm'),
    ],
)
def test_recipe_for(model, recipe):
    assert recipe_for(model) == recipe
    assert train_parser().resolve(['--model', model]).recipe == recipe


def test_every_model_of_the_package_has_a_paper():
    names = timm.list_models(['coc_*', 'fec_*', 'dnc_*'])
    assert len(names) >= 10
    assert all(recipe_for(name) != 'timm' for name in names)


@pytest.mark.parametrize('name', RECIPES)
def test_recipes_are_made_of_options(name):
    parser = train_parser()
    assert isinstance(parser, Parser)
    actions = {action.dest: action for action in parser._actions}
    for dest, value in RECIPES[name].items():
        kind = actions[dest].type
        values = value if isinstance(value, list) else [value]
        assert all(kind is None or type(v) is kind for v in values), dest


def test_learning_rates_of_the_papers():
    """Batch and rate that the papers name give each other's learning rate."""
    coc = train_parser().resolve(['--model', 'coc_tiny'])
    assert coc.lr == 1e-3  # of 8 x 128 images
    for model, batch, lr in (('dnc_resnet50', 256, 0.1), ('dnc_swin_tiny', 1024, 1e-3)):
        args = train_parser().resolve(['--model', model])
        assert args.lr is None and args.lr_base * batch / args.lr_base_size == pytest.approx(lr)
    cifar = train_parser().resolve(['--model', 'dnc_resnet18', '--recipe', 'dnc_cifar'])
    assert cifar.lr_base * cifar.batch_size / cifar.lr_base_size == pytest.approx(0.1)
    assert (cifar.sched, cifar.decay_milestones, cifar.epochs) == ('multistep', [100, 150], 200)
