"""Configs in MMEngine's pure Python style, and the configs here as bases of other configs."""

from pathlib import Path

import mmdet
import pytest
import torch
from helpers import CONFIGS
from helpers.samples import image_sample
from helpers.tools import data_options, logged, logged_metric
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS
from mmseg.datasets import ADE20KDataset

from acmix_mm.comparison.plan import make_plan
from acmix_mm.engine.config import build_model, load_config, set_classes, set_data_root
from acmix_mm.utils.errors import UsageError

CONFIG = 'tests/pure_python/retinanet_acmix.py'
CLASSES = ('circle', 'square', 'triangle')
# What MMEngine builds from a config.
BUILT = ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator',
         'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg', 'optim_wrapper', 'param_scheduler',
         'default_hooks', 'custom_hooks', 'visualizer', 'log_processor', 'tta_model',
         'tta_pipeline')


@pytest.fixture(scope='module')
def trained(shapes, run_tool, tmp_path_factory):
    """Work directory of a pure Python config."""
    folder = tmp_path_factory.mktemp('pure_python')
    done = run_tool('tools/train.py', CONFIG, '--data-root', shapes, '--classes', *CLASSES,
                    '--work-dir', folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_mmdetection_evaluates_what_a_pure_python_config_trained(trained, shapes, run_tool,
                                                                 tmp_path):
    assert len(logged(trained, 'loss')) == 2
    done = run_tool(Path(mmdet.__file__).parent / '.mim/tools/test.py', CONFIG,
                    trained / 'epoch_1.pth', '--work-dir', tmp_path, '--cfg-options',
                    'model.bbox_head.num_classes=3', *data_options(shapes),
                    *(f'{split}_dataloader.dataset.metainfo.classes={CLASSES}'.replace(' ', '')
                      for split in ('train', 'val', 'test')))
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path, 'coco/bbox_mAP') == logged(trained, 'coco/bbox_mAP')[-1]


def test_the_config_in_the_work_directory_predicts(trained):
    cfg = load_config(str(trained / 'retinanet_acmix.py'))
    assert cfg.train_dataloader.dataset.type == 'mmdet.datasets.CocoDataset'
    assert cfg.train_dataloader.dataset.metainfo.classes == CLASSES
    model = build_model(cfg)
    assert type(model.backbone).__name__ == 'ACmixSwinTransformer'
    image, sample = image_sample(cfg, 64, 64)
    predicted = model.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_instances
    assert len(predicted) > 0


def test_classes_and_data_of_a_pure_python_config(shapes):
    cfg = load_config(CONFIG)
    assert cfg.default_scope == 'mmdet'
    set_data_root(cfg, str(shapes))
    with pytest.raises(UsageError, match='Labels follow the order of'):
        set_classes(cfg, CLASSES[::-1])
    set_classes(cfg, CLASSES)
    assert cfg.train_dataloader.dataset.type is CocoDataset
    assert cfg.model.bbox_head.num_classes == 3


def test_classes_of_a_pure_python_segmentation_config(tmp_path):
    (tmp_path / 'config.py').write_text('''
from mmseg.datasets import ADE20KDataset
from mmseg.models import EncoderDecoder
model = dict(type=EncoderDecoder, decode_head=dict(num_classes=150))
train_dataloader = dict(dataset=dict(type=ADE20KDataset))
''')
    cfg = load_config(str(tmp_path / 'config.py'))
    assert (cfg.default_scope, cfg.train_dataloader.dataset.type) == ('mmseg', ADE20KDataset)
    set_classes(cfg, ['road', 'car'])
    assert cfg.train_dataloader.dataset == dict(
        type='BaseSegDataset', img_suffix='.jpg', seg_map_suffix='.png', reduce_zero_label=True,
        metainfo=dict(classes=('road', 'car')))
    assert cfg.model.decode_head.num_classes == 2


@pytest.mark.parametrize(('text', 'message'), [
    ('from acmix_mm.backbones import ACmixSwim\nmodel = dict(type=ACmixSwim)',
     'names a class that cannot be imported: .*ACmixSwim'),
    ('from acmix_mm.backbones import ACmixSwim\nmodel = dict(backbone=dict(type=ACmixSwim))',
     'names a class that cannot be imported: .*ACmixSwim'),
    ('from mmengine.config import read_base\nwith read_base():\n    from .absent import *',
     'inherits from a file that does not exist: .*absent.py'),
    ("_base_ = 'acmix_mm::configs/absent.py'",
     'inherits from a file that does not exist: .*absent.py'),
    ("_base_ = 'acmix_mm::maskrcnn_acmix_swin_t.py'",
     'names no folder in it; write acmix_mm::configs/NAME.py'),
])
def test_errors_in_configs(text, message, tmp_path):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(str(tmp_path / 'config.py'))


def test_comparison_of_a_pure_python_config(shapes, tmp_path):
    cfg = load_config(CONFIG)
    set_data_root(cfg, str(shapes))
    set_classes(cfg, CLASSES)
    plan = make_plan(cfg, ['acmix', 'attn'], 'none', None, str(tmp_path))
    assert {mixer: each['iterations'] for mixer, each in plan['variants'].items()} == {
        'acmix': 2, 'attn': 2}
    attention = load_config(str(tmp_path / 'attn/config.py'))
    assert attention.model.backbone.mix == 'attn'
    assert attention.custom_imports.imports == ['acmix_mm.comparison.record']
    build_model(attention)


def scoped(node, *path):
    """Remove the scopes from a config; return the places where this package was the scope."""
    if isinstance(node, dict):
        found = {path} if node.pop('_scope_', None) == 'acmix_mm' else set()
        node = list(node.items())
    elif isinstance(node, (list, tuple)):
        found, node = set(), list(enumerate(node))
    else:
        return set()
    return found.union(*(scoped(child, *path, key) for key, child in node))


@pytest.fixture
def inherit(tmp_path):
    """A function that reads a config which inherits one of this package and changes nothing."""
    def read(name):
        path = tmp_path / 'config.py'
        path.write_text(f"_base_ = 'acmix_mm::{name}'")
        return Config.fromfile(str(path)).to_dict()
    return read


@pytest.mark.parametrize('name', CONFIGS)
def test_no_inherited_type_is_looked_up_in_the_wrong_package(name, inherit):
    """MMDetection's and MMSegmentation's types would not be found in this package's scope."""
    keys = {path[0] for path in scoped(inherit(name))}
    assert keys & set(BUILT) <= {'optim_wrapper', 'param_scheduler'}


def test_configs_are_inherited_by_package(inherit):
    name = 'configs/shapes/maskrcnn_acmix_swin.py'
    inherited, own = inherit(name), Config.fromfile(name).to_dict()
    assert ('param_scheduler', 0) in scoped(inherited)
    assert scoped(own) == set()
    assert inherited == own


def test_what_inherited_configs_state_is_built_without_warnings(log_text):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.)
    OPTIM_WRAPPERS.build(dict(type='OptimWrapper', _scope_='acmix_mm', optimizer=optimizer))
    PARAM_SCHEDULERS.build(dict(type='PolyLR', _scope_='acmix_mm', optimizer=optimizer))
    assert 'is not installed' not in log_text()
    assert 'Failed' not in log_text()


def test_get_config_finds_configs():
    cfg = get_config('acmix_mm::configs/maskrcnn_acmix_swin_t.py')
    assert cfg.model.backbone.type == 'ACmixSwinTransformer'
