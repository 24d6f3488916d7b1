"""model-index.yml lists all configs, with their counts and the published results."""

import pytest
import yaml
from helpers import ROOT

from acmix_mm.analysis.complexity import complexity_report
from acmix_mm.analysis.published import NETWORKS, count_network
from acmix_mm.engine.config import load_config


def read_models():
    """The models, and the names of the collections, that model-index.yml imports."""
    models, collections = [], []
    for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        metafile = yaml.safe_load((ROOT / path).read_text())
        models += metafile['Models']
        collections += [collection['Name'] for collection in metafile['Collections']]
    return models, collections


def test_lists_all_configs():
    models, collections = read_models()
    named = [model['Config'] for model in models if model['Config'] is not None]
    assert sorted(named) == sorted(f'configs/{path.name}' for path in ROOT.glob('configs/*.py'))
    names = [model['Name'] for model in models]
    assert len(set(names)) == len(names)
    assert {model['In Collection'] for model in models} == set(collections)
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert sorted(index) == sorted(f'configs/{path.name}' for path in ROOT.glob('configs/*.yml'))


# ImageNet accuracies from the authors' table.
TOP1 = {
    'acmix-resnet-26': 76.1, 'acmix-resnet-38': 77.4, 'acmix-resnet-50': 77.8,
    'acmix-san-10': 77.6, 'acmix-san-15': 78.4, 'acmix-san-19': 78.7,
    'acmix-pvt-t': 78.0, 'acmix-pvt-s': 81.7, 'acmix-swin-t': 81.9, 'acmix-swin-s': 83.5,
}


def test_results_are_the_published_ones():
    quoted = {}
    for model in read_models()[0]:
        if 'Results' in model:
            result, = model['Results']
            assert (result['Task'], result['Dataset']) == ('Image Classification', 'ImageNet-1k')
            assert model['Results From'].startswith('the authors of ACmix')
            quoted[model['Name'].removesuffix('_3rdparty_in1k')] = result['Metrics']
    assert quoted == {name: {'Top 1 Accuracy': accuracy} for name, accuracy in TOP1.items()}


@pytest.mark.parametrize(
    ('backbone', 'network'), NETWORKS, ids=[network.name for _, network in NETWORKS])
def test_counts_of_the_paper_networks(backbone, network):
    model, = (model for model in read_models()[0] if model['Config'] is None
              and model['Name'] == f'{network.name.lower()}_3rdparty_in1k')
    counted = count_network(backbone, network).count
    assert (model['Metadata']['Parameters'], model['Metadata']['FLOPs']) == counted


@pytest.mark.parametrize('name', ['maskrcnn_acmix_r50', 'retinanet_acmix_san19',
                                  'rtmdet_acmix_s', 'semfpn_acmix_pvt_t', 'upernet_acmix_swin_t',
                                  'yolox_acmix_s'])
def test_counts_of_the_configs(name):
    model, = (model for model in read_models()[0] if model['Name'] == name)
    report = complexity_report(load_config(model['Config']), None)
    assert f"{model['Metadata']['Parameters'] / 1e6:.2f}M |" in report
    assert f"{model['Metadata']['FLOPs'] / 1e9:.2f}G |" in report


def test_every_config_names_its_baseline():
    for path in ROOT.glob('configs/*.py'):
        assert '# Baseline: ' in path.read_text(), path
