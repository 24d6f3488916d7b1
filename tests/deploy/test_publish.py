"""Tests of publishing checkpoints."""

import hashlib
from collections import OrderedDict

import pytest
import torch
from helpers import ROOT
from helpers.tools import FAST, SEGMENTATION, Bomb, logged, logged_metric, plain_message

from acmix_mm import __version__
from acmix_mm.checkpoints.reading import read_weights
from acmix_mm.deploy.publish import no_allowed_classes, publish
from acmix_mm.engine.config import build_model, load_config
from acmix_mm.utils.errors import CheckpointError, UsageError


@pytest.fixture(scope='module')
def trained(shapes, run_tool, tmp_path_factory):
    """Work directory of two training steps with EMA and a final evaluation."""
    folder = tmp_path_factory.mktemp('trained')
    config = folder / 'ema.py'
    config.write_text(f"_base_ = '{ROOT / SEGMENTATION}'\n"
                      "custom_hooks = [dict(type='EMAHook', momentum=0.5)]\n")
    done = run_tool('tools/train.py', config, '--data-root', shapes, '--work-dir', folder,
                    '--cfg-options', *FAST, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
                    'default_hooks.checkpoint.interval=2', 'train_dataloader.batch_size=2',
                    'model.data_preprocessor.size=(96,96)')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def published(trained, run_tool, tmp_path_factory):
    """The published file, and the output of the tool."""
    folder = tmp_path_factory.mktemp('published')
    done = run_tool('tools/publish_model.py', trained / 'iter_2.pth', folder / 'upernet.pth')
    assert done.returncode == 0, done.stderr
    file, = folder.iterdir()
    return file, done.stdout


def test_file_name_ends_in_the_hash(published, trained):
    file, output = published
    assert file.name == f'upernet-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth'
    before, after = ((path.stat().st_size / 1e6) for path in (trained / 'iter_2.pth', file))
    assert f'Wrote {file}: {after:.1f} MB, reduced from {before:.1f} MB.' in output
    assert after < before / 3


def test_contains_only_weights_config_classes_and_versions(published, trained):
    with no_allowed_classes():
        checkpoint = torch.load(published[0], weights_only=True)
    assert set(checkpoint) == {'meta', 'state_dict'}
    meta = checkpoint['meta']
    assert 'ACmixSwinTransformer' in meta['cfg']
    assert meta['dataset_meta']['classes'] == ('background', 'circle', 'square', 'triangle')
    assert meta['iter'] == 2
    assert meta['versions'] == meta['published_with']
    assert meta['versions']['acmix_mm'] == __version__
    named = {name.removeprefix('onedl-') for name in meta['versions']}
    assert {'torch', 'mmengine', 'mmcv', 'mmsegmentation'} <= named

    whole = torch.load(trained / 'iter_2.pth', weights_only=False)
    for key, average in whole['state_dict'].items():
        assert torch.equal(checkpoint['state_dict'][key], average)
    # With EMA, MMEngine saves the averages as state_dict and the raw weights as ema_state_dict.
    key = 'decode_head.conv_seg.weight'
    assert not torch.equal(checkpoint['state_dict'][key], whole['ema_state_dict'][f'module.{key}'])


def test_evaluates_like_the_training_checkpoint(published, trained, shapes, run_tool, tmp_path):
    done = run_tool('tools/test.py', SEGMENTATION, published[0], '--data-root', shapes,
                    '--work-dir', tmp_path, '--cfg-options', *FAST)
    assert done.returncode == 0, done.stderr
    assert logged_metric(tmp_path, 'mIoU') == pytest.approx(logged(trained, 'mIoU')[-1])


def test_works_as_init_cfg(published):
    cfg = load_config(str(ROOT / SEGMENTATION))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(published[0]))
    backbone = build_model(cfg).backbone
    backbone.init_weights()
    given = read_weights(str(published[0])).state_dict
    for key, weight in backbone.state_dict().items():
        assert torch.equal(weight, given[key])


def test_preserves_unusual_tensors(tmp_path):
    weights = OrderedDict(
        whole=torch.arange(4), half=torch.randn(3).bfloat16(), flag=torch.tensor(True),
        turned=torch.randn(2, 3).T, part=torch.zeros(10**6)[:2])
    torch.save(dict(state_dict=weights), tmp_path / 'a.pth')
    file = publish(str(tmp_path / 'a.pth'), str(tmp_path / 'b'))
    loaded = torch.load(file, weights_only=True)['state_dict']
    for key, weight in weights.items():
        torch.testing.assert_close(loaded[key], weight, rtol=0, atol=0)
    assert file.stat().st_size < 10**5


@pytest.mark.parametrize(('content', 'target', 'error', 'message'), [
    (None, 'b', CheckpointError, 'a.pth does not exist'),
    (b'PK\x03\x04 torn', 'b', CheckpointError, 'a.pth cannot be read .* damaged'),
    (dict(state_dict={}), 'b', CheckpointError, "has no weights under 'state_dict'"),
    (dict(optimizer={}), 'b', CheckpointError, "has no weights under 'state_dict'"),
    ([1], 'b', CheckpointError, 'no weights|cannot be read'),
    (dict(state_dict=dict(a=torch.zeros(1))), 'none/b', UsageError,
     'none does not exist; create it'),
    ('bomb', 'b', CheckpointError, 'is refused and nothing in it was run'),
])
def test_errors_leave_no_file_behind(content, target, error, message, tmp_path):
    if content == 'bomb':
        content = dict(state_dict=dict(a=torch.zeros(1)), meta=Bomb(tmp_path / 'ran'))
    if isinstance(content, bytes):
        (tmp_path / 'a.pth').write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / 'a.pth')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        publish(str(tmp_path / 'a.pth'), str(tmp_path / target))
    assert sorted(tmp_path.iterdir()) == before


def test_publishes_nothing_if_the_file_reads_back_differently(tmp_path, monkeypatch):
    torch.save(dict(state_dict=dict(a=torch.zeros(3))), tmp_path / 'a.pth')
    save = torch.save
    monkeypatch.setattr(torch, 'save', lambda content, path: save(
        dict(content, state_dict=dict(a=torch.ones(3))), path))
    with pytest.raises(CheckpointError, match='differ from those written; nothing was published'):
        publish(str(tmp_path / 'a.pth'), str(tmp_path / 'b'))
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_tool_prints_one_error_message(run_tool, tmp_path):
    done = run_tool('tools/publish_model.py', tmp_path / 'none.pth', tmp_path / 'b')
    assert f'{tmp_path}/none.pth does not exist' in plain_message(done)
