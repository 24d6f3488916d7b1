"""Loading checkpoints as data with torch before 2.6."""

import argparse
import io
import pickle
import pickletools
import tarfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from helpers.tools import Bomb
from mmengine.logging import HistoryBuffer

from acmix_mm.checkpoints import data_pickle, reading
from acmix_mm.utils.errors import CheckpointError


@pytest.fixture(autouse=True)
def _older_torch(monkeypatch):
    monkeypatch.setattr(reading, 'HAS_ALLOW_LIST', False)
    reading.allow_mmengine_checkpoints()


@pytest.mark.parametrize('is_zip', [True, False])
def test_reads_what_training_saves(is_zip, tmp_path):
    history = HistoryBuffer()
    history.update(0.5)
    weights = OrderedDict(a=torch.randn(3, 4)[:, 1], b=torch.nn.Parameter(torch.ones(2).half()))
    weights._metadata = dict(version=2)
    saved = dict(state_dict=weights, milestones=Counter([8, 11]),
                 args=argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
                 message_hub=dict(log_scalars={'train/loss': history},
                                  runtime_info=dict(scale=np.float64(0.25), best=np.int64(3))))
    torch.save(saved, tmp_path / 'run.pth', _use_new_zipfile_serialization=is_zip)
    load = torch.load
    read = reading.read_checkpoint(str(tmp_path / 'run.pth'))
    assert torch.load is load
    assert read['state_dict']._metadata == weights._metadata
    assert isinstance(read['state_dict']['b'], torch.nn.Parameter)
    for key, value in weights.items():
        assert torch.equal(read['state_dict'][key], value)
    assert read['args'] == saved['args']
    assert read['milestones'] == saved['milestones']
    loss = read['message_hub']['log_scalars']['train/loss']
    loss.update(1.5)
    assert (loss.mean(), loss.statistics('max')) == (1., 1.5)
    assert read['message_hub']['runtime_info'] == saved['message_hub']['runtime_info']


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('is_zip', [True, False])
def test_refuses_code(is_zip, nested, tmp_path):
    bomb = Bomb(tmp_path / 'ran')
    torch.save(argparse.Namespace(bomb=bomb) if nested else dict(bomb=bomb),
               tmp_path / 'bomb.pth', _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r'nothing in it was run: .* posix\.system'):
        reading.read_checkpoint(str(tmp_path / 'bomb.pth'))
    assert not (tmp_path / 'ran').exists()


def test_refuses_formats_that_are_not_read_through_a_pickle_module(tmp_path):
    with tarfile.open(tmp_path / 'tar.pth', 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / 'script.pth'))
    for name, kind in (('tar', 'tarfile'), ('script', 'TorchScript')):
        with pytest.raises(CheckpointError, match=f'besides data, it holds {kind}'):
            reading.read_checkpoint(str(tmp_path / f'{name}.pth'))
        with open(tmp_path / f'{name}.pth', 'rb') as file, pytest.raises(pickle.UnpicklingError):
            data_pickle.check_format(file)
        assert file.closed


HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n'


@pytest.mark.parametrize(('program', 'message'), [
    # HistoryBuffer.update = 1
    (HISTORY + b'N}Vupdate\nI1\ns\x86b.', 'type'),
    (TENSOR + b'}V__doc__\nI1\nsb.', 'function'),
    # torch.Tensor()[0] = 1, with both instructions that set items
    (b'ctorch\nTensor\n)RI0\nI1\ns.', 'Tensor'),
    (b'ctorch\nTensor\n)R(I0\nI1\nu.', 'Tensor'),
    (b'cbuiltins\ngetattr\n(' + HISTORY + b'V__init__\ntR.', 'GLOBAL getattr'),
    (b'cbuiltins\ngetattr\n(' + TENSOR + b'V__globals__\ntR.', 'GLOBAL getattr'),
    # A dotted name, which Python's unpickler would resolve.
    (b'\x80\x04\x8c\x0ctorch._utils\x8c\x0ctorch.os.sys\x93.',
     r'GLOBAL torch\._utils\.torch\.os\.sys'),
])
def test_refuses_changes_of_classes_functions_and_tensors(program, message):
    pickletools.dis(program, io.StringIO())
    with pytest.raises(pickle.UnpicklingError, match=f'Unsupported .*{message}'):
        data_pickle.load(io.BytesIO(program))


def test_sets_items_of_dicts():
    assert data_pickle.load(io.BytesIO(b'}(I0\nI1\nu.')) == {0: 1}
