"""A host that is added as CONTRIBUTING.md describes works everywhere.

Four of its five files are in tests/toy_host; the fifth, its test, is this one.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, relative_error
from helpers.stack import needs_export
from mmengine.registry import MODELS

SIZES = dict(embed_dims=16, depths=(1, 2))


@pytest.fixture(scope='module', autouse=True)
def toy():
    """The backbone class of the toy host, registered while the tests of this file run."""
    from toy_host.backbone import ACmixToyNet

    from acmix_mm.backbones.base import BACKBONES
    from acmix_mm.checkpoints.host import HOSTS
    yield ACmixToyNet
    del MODELS.module_dict['ACmixToyNet'], BACKBONES['Toy'], HOSTS['Toy']
    for name in [name for name in sys.modules if name.split('.')[0] == 'toy_host']:
        del sys.modules[name]


@pytest.fixture
def cfg():
    from acmix_mm.engine.config import load_config
    return load_config(str(ROOT / 'tests/toy_host/config.py'))


@pytest.fixture
def plain(toy, tmp_path):
    """The plain host and its checkpoint."""
    model = toy(**SIZES, **toy.plain_arguments).eval()
    path = tmp_path / 'plain.pth'
    torch.save(model.state_dict(), path)
    return SimpleNamespace(model=model, path=str(path))


def test_loads_and_freezes(toy, plain, log_text):
    model = toy(**SIZES, frozen_stages=1, init_cfg=dict(type='Pretrained', checkpoint=plain.path))
    model.init_weights()
    assert 'plain Toy' in log_text() and 'rate1 = 1' in log_text()
    for out, expected in zip(model.eval()(image := torch.randn(1, 3, 45, 52)), plain.model(image)):
        assert relative_error(out, expected) < 1e-5
    model.train()
    assert [stage.training for stage in model.toy_stages] == [False, True]
    assert not any(each.requires_grad for each in model.toy_stages[0].parameters())


def test_is_converted(toy, plain, tmp_path):
    from acmix_mm.engine.convert import convert
    converted = tmp_path / 'acmix.pth'
    report = convert(plain.path, str(converted))
    assert "type='ACmixToyNet', depths=(1, 2)" in report and 'Difference' in report
    model = toy(**SIZES, init_cfg=dict(type='Pretrained', checkpoint=str(converted)))
    model.init_weights()
    assert model.toy_stages[0][0].mixer.rate1 == 1


def test_is_counted(cfg):
    from acmix_mm.analysis.complexity import complexity_report
    from acmix_mm.analysis.flops import count
    model = MODELS.build(dict(cfg.model.backbone, **SIZES)).eval()
    counts = count(model, lambda: model(torch.zeros(1, 3, 32, 32)))
    assert counts['projections'].parameters == 3 * 16 * 17 + 2 * 3 * 32 * 33
    assert counts['projections'].multiply_adds == 64 * 3 * 16**2 + 2 * 16 * 3 * 32**2
    assert counts['attention'].multiply_adds == 2 * 64**2 * 16 + 2 * 2 * 16**2 * 32
    assert counts['convolution path'].parameters == 3 * 54 + 81 * (16 + 2 * 32)
    assert 'backbone, multiply-adds' in complexity_report(cfg)


def test_is_analysed(toy, cfg, tmp_path):
    from acmix_mm.analysis.paths import inputs_of, last_layers, path_energies
    from acmix_mm.analysis.rates import read_rates
    from acmix_mm.analysis.receptive_field import config_receptive_fields, mixer_variants
    model = toy(**SIZES).eval()
    names = last_layers(model)
    assert names == {'stage 0': 'toy_stages.0.0.mixer', 'stage 1': 'toy_stages.1.1.mixer'}
    layers = {stage: model.get_submodule(name) for stage, name in names.items()}
    inputs = inputs_of(model, layers, lambda: model(torch.randn(1, 3, 32, 40)))
    for stage, layer in layers.items():
        assert path_energies(layer, inputs[stage]).shape == (2, *layer.map_size(inputs[stage]))
        weights = layer.attention_of_point(inputs[stage], 1, 2).weights
        torch.testing.assert_close(weights.sum((1, 2)), torch.ones(2))

    torch.save(model.state_dict(), tmp_path / 'toy.pth')
    rates, = read_rates(str(tmp_path / 'toy.pth'))
    assert rates.network == 'ACmix-Toy' and len(rates.layers) == 3

    seen = {}
    for mixer, variant in mixer_variants(cfg, ['attn', 'acmix-conv']):
        field = config_receptive_fields(variant, (64, 64), samples=1)[0]
        seen[mixer] = int((field.energy > 0).sum())
    assert seen == {'attn': 64**2, 'acmix-conv': 15**2}


def test_is_matched_for_a_comparison(cfg):
    from acmix_mm.comparison.matching import Family, match
    families = {mixer: Family(cfg.model, mixer, (64, 64)) for mixer in ('acmix', 'attn')}
    reference = families['acmix'].counts(families['acmix'].own_size)
    tolerance = 0.02 * reference.backbone_params
    size = match(families['attn'], 'params', reference.params, tolerance)
    assert size != families['attn'].own_size
    assert abs(families['attn'].counts(size).params - reference.params) <= tolerance
    model = families['attn'].config(size)
    assert model.backbone.mix == 'attn' and model.decode_head.in_channels == 2 * size.width


@needs_export
def test_is_exported(toy):
    from acmix_mm.deploy.onnx import export_program, smallest_side
    model = toy(**SIZES).eval()
    side = smallest_side(model)
    program = export_program(model).module()
    for size in ((1, side, side), (2, side + 9, side + 4)):
        image = torch.randn(size[0], 3, *size[1:])
        for out, expected in zip(program(image), model(image)):
            assert relative_error(out, expected) < 1e-4


def test_is_a_timm_model(toy):
    import timm

    from acmix_mm.timm import register
    register(toy)
    model = timm.create_model('acmix_toy_tiny', num_classes=5, embed_dims=16).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert 'toy_stages.0.0.mixer.rate1' in model.no_weight_decay()
