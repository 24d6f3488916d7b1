"""Nothing that a checkpoint, an annotation file or a file of proposals contains is run."""

import functools
import pickle
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import mmengine
import numpy as np
import pytest
import torch
import yaml
from helpers.tools import Bomb
from mmengine.config import ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from acmix_mm.commands import errors_as_messages, run_command
from acmix_mm.engine.config import check_data
from acmix_mm.engine.data_only import data_only
from acmix_mm.engine.runner import test as evaluate
from acmix_mm.engine.runner import train
from acmix_mm.utils.errors import UsageError

REFUSED = 'is refused and nothing in it was run'
PLAIN_SWIN = dict(type='SwinTransformer', embed_dims=12, depths=[1, 1, 1, 1],
                  num_heads=[3, 3, 6, 12])
PLAIN_RESNET = dict(type='ResNet', depth=18, base_channels=6)


@pytest.fixture
def server(tmp_path):
    """Address of a server of the files in ``tmp_path``."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = None
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _unsafe_environment(monkeypatch, tmp_path):
    """Set the variable that users of MMEngine set for torch 2.6, and an empty download cache."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))


def write_bomb(folder, kind='zip'):
    """Write a checkpoint that creates the file ``ran`` when it is unpickled."""
    path = folder / 'bomb.pth'
    content = dict(state_dict={'conv.weight': torch.zeros(1)},
                   meta=dict(epoch=1, iter=1, trap=Bomb(folder / 'ran')))
    if kind == 'pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')
    return path


def test_the_bomb_works(tmp_path):
    for kind in ('zip', 'legacy'):
        torch.load(write_bomb(tmp_path, kind), weights_only=False)
        assert (tmp_path / 'ran').exists()
        (tmp_path / 'ran').unlink()


@pytest.mark.parametrize(('place', 'kind'), [
    ('neck', 'zip'), ('neck', 'legacy'), ('neck', 'URL'), ('roi_head.bbox_head', 'pickle'),
    ('rpn_head', 'URL'), ('', 'legacy'), ('SwinTransformer', 'URL'), ('SwinTransformer', 'legacy'),
    ('ResNet', 'URL'), ('ResNet', 'zip'), ('ACmixSwinTransformer', 'URL'), ('load_from', 'zip'),
    ('load_from', 'URL'), ('load_from with Runner', 'legacy'), ('resume', 'legacy'),
    ('resume with Runner', 'zip'), ('test', 'legacy'),
])
def test_checkpoint(place, kind, small_detector, server, tmp_path):
    path = write_bomb(tmp_path, kind.replace('URL', 'zip'))
    source = f'{server}/{path.name}' if kind == 'URL' else str(path)
    cfg = small_detector()
    if place.endswith('with Runner'):
        cfg.runner_type = 'Runner'
    if place == 'test' or 'load_from' in place:
        cfg.load_from = source
    elif 'resume' in place:
        cfg.update(resume=True, load_from=source)
    else:
        pretrained = dict(type='Pretrained', checkpoint=source)
        if place in ('SwinTransformer', 'ResNet'):
            cfg.model.backbone = ConfigDict(PLAIN_SWIN if place[0] == 'S' else PLAIN_RESNET)
            cfg.model.neck.in_channels = [12, 24, 48, 96] if place[0] == 'S' else [6, 12, 24, 48]
        node = cfg.model
        for name in filter(None, place.split('.')):
            node = node['backbone' if name not in node else name]
        node.init_cfg = pretrained
    with pytest.raises(UsageError, match=REFUSED) as caught:
        evaluate(cfg) if place == 'test' else train(cfg)
    assert source in str(caught.value)
    assert not (tmp_path / 'ran').exists()


@RUNNERS.register_module()
class OtherRunner(Runner):
    """A runner that a config may name."""


def test_config_in_a_checkpoint(small_detector, tmp_path):
    """MMEngine's runners execute ``meta['config']`` when they resume."""
    first = small_detector()
    train(first)
    path = f'{first.work_dir}/epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['config'] = f'import os; os.system("touch {tmp_path}/ran")'
    torch.save(checkpoint, path)
    for runner in ('Runner', 'OtherRunner'):
        train(small_detector(resume=True, load_from=path, runner_type=runner))
        assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(('suffix', 'option'), [
    ('pkl', 'ann_file'), ('pickle', 'proposal_file'), ('yaml', 'ann_file')])
def test_annotations(suffix, option, small_detector, tmp_path):
    path = tmp_path / f'data.{suffix}'
    bomb = dict(metainfo={}, data_list=[Bomb(tmp_path / 'ran')])
    path.write_bytes(yaml.dump(bomb).encode() if suffix == 'yaml' else pickle.dumps(bomb))
    assert 'touch' in path.read_text(errors='replace')
    cfg = small_detector(**{f'train_dataloader.dataset.{option}': str(path)})
    if option == 'ann_file':
        cfg.train_dataloader.dataset.type = 'BaseDetDataset'
    with pytest.raises(UsageError, match=f'{path} {REFUSED}.*save it as JSON'):
        train(cfg)
    assert not (tmp_path / 'ran').exists()


def test_data_that_libraries_unpickle_by_themselves(small_detector, tmp_path):
    np.save(tmp_path / 'hierarchy.npy', np.array([Bomb(tmp_path / 'ran')], object),
            allow_pickle=True)
    cfg = small_detector(**{'train_dataloader.dataset.hierarchy_file':
                          str(tmp_path / 'hierarchy.npy')})
    with pytest.raises(UsageError, match=f'hierarchy.npy {REFUSED}'):
        check_data(cfg, ('train',))
    np.save(tmp_path / 'hierarchy.npy', np.eye(2))
    check_data(cfg, ('train',))
    cfg.train_dataloader.dataset.pipeline.insert(0, ConfigDict(
        type='LoadBiomedicalData', decode_backend='pickle'))
    with pytest.raises(UsageError, match='LoadBiomedicalData would load images as pickles'):
        check_data(cfg, ('train',))


def test_any_load_of_a_command(server, tmp_path, monkeypatch):
    def run_function(function):
        command = SimpleNamespace(__doc__='', add_arguments=lambda parser: None,
                                  run=lambda args: function())
        monkeypatch.setitem(sys.modules, 'acmix_mm.commands.load', command)
        with errors_as_messages():
            run_command('load', 'load', [])

    path = write_bomb(tmp_path)
    for load in (lambda: torch.load(path, weights_only=False),
                 lambda: torch.hub.load_state_dict_from_url(f'{server}/{path.name}')):
        with pytest.raises(SystemExit, match='UnpicklingError'):
            run_function(load)
    (tmp_path / 'bomb.pkl').write_bytes(pickle.dumps(Bomb(tmp_path / 'ran')))
    with pytest.raises(SystemExit, match=f'error: The file {tmp_path}/bomb.pkl {REFUSED}'):
        run_function(lambda: mmengine.load(str(tmp_path / 'bomb.pkl')))
    assert not (tmp_path / 'ran').exists()
    # Outside of the commands nothing has changed.
    mmengine.load(str(tmp_path / 'bomb.pkl'))
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_data_is_loaded(protocol, tmp_path):
    proposals = InstanceData(bboxes=np.random.rand(3, 4).astype(np.float32), scores=np.ones(3))
    content = {'a/b.jpg': proposals, 'plain': [1, 2.5, 'text', b'\xff\x00', None, True, {1, 2}],
               'numpy': [np.int64(3), np.float32(0.5), np.array(['x', 'y']), np.arange(6)[::2]]}
    path = str(tmp_path / 'data.pkl')
    mmengine.dump(content, path, protocol=protocol)
    with data_only():
        loaded = mmengine.load(path)
    assert loaded['plain'] == content['plain']
    np.testing.assert_array_equal(loaded['a/b.jpg'].bboxes, proposals.bboxes)
    assert type(loaded['a/b.jpg']) is InstanceData
    for ours, theirs in zip(loaded['numpy'], content['numpy']):
        np.testing.assert_array_equal(ours, theirs)
        assert type(ours) is type(theirs)
