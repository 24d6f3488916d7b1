"""Reading checkpoints as data: where the weights are, and what is refused."""

import argparse
import re

import mmdet.models.backbones.swin as mmdet_swin
import pytest
import torch
from helpers import relative_error
from helpers.checkpoints import SWIN, load_pretrained
from helpers.weights import randomised
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from acmix_mm.backbones import ACmixSwinTransformer
from acmix_mm.utils.errors import CheckpointError


def test_allows_the_arguments_of_a_training_script(tmp_path):
    plain = randomised(mmdet_swin.SwinTransformer(**SWIN))
    arguments = argparse.Namespace(model='swin', lr=5e-4, betas=(0.9, 0.99), model_kwargs=dict(a=1))
    torch.save(dict(state_dict=plain.state_dict(), epoch=2, args=arguments), tmp_path / 'last.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'last.pth', **SWIN)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def training_checkpoint(kind, weights, other):
    """A checkpoint as training scripts save it, with other weights that must not be loaded."""
    history = HistoryBuffer()
    history.update(0.5)
    return {
        'DDP and torch.compile': {f'module._orig_mod.{key}': value
                                  for key, value in weights.items()},
        'DeiT': dict(model=other, model_ema=weights, epoch=3),
        'timm': dict(state_dict=other, state_dict_ema={f'module.{key}': value
                                                       for key, value in weights.items()}),
        'MMEngine': dict(state_dict={f'backbone.{key}': value for key, value in weights.items()},
                         ema_state_dict={f'module.backbone.{key}': value
                                         for key, value in other.items()},
                         message_hub=dict(log_scalars={'train/loss': history})),
    }[kind]


@pytest.mark.parametrize(('kind', 'part'), [
    ('DDP and torch.compile', ''), ('DeiT', ', the averaged weights in model_ema'),
    ('timm', ', the averaged weights in state_dict_ema'), ('MMEngine', ', its backbone'),
])
def test_finds_the_weights_in_the_checkpoint_of_a_training_run(kind, part, tmp_path, log_text):
    plain, other = (randomised(mmdet_swin.SwinTransformer(**SWIN)).state_dict() for _ in range(2))
    torch.save(training_checkpoint(kind, plain, other), tmp_path / 'run.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'run.pth', **SWIN).state_dict()
    for key, value in plain.items():
        assert torch.equal(model[key], value), key
    assert f"recognised as plain Swin, MMDetection's naming{part}." in log_text()


@pytest.mark.parametrize('content', ['good', 'truncated', 'empty', 'text'])
def test_safetensors(content, tmp_path):
    plain = randomised(mmdet_swin.SwinTransformer(**SWIN))
    path = tmp_path / 'swin.safetensors'
    save_file(plain.state_dict(), path)
    if content == 'good':
        model = load_pretrained(ACmixSwinTransformer, path, **SWIN)
        x = torch.randn(1, 3, 84, 68)
        for expected, actual in zip(plain(x), model(x)):
            assert relative_error(actual, expected) < 1e-5
        return
    path.write_bytes({'truncated': path.read_bytes()[:-2000], 'empty': b'',
                      'text': b'<html>404: not found</html>'}[content])
    with pytest.raises(CheckpointError, match=rf'{re.escape(str(path))} cannot be read .*damaged'):
        load_pretrained(ACmixSwinTransformer, path, **SWIN)


def test_failed_download_names_the_address_and_the_remedy():
    url = 'http://127.0.0.1:9/swin.pth'
    model = ACmixSwinTransformer(**SWIN, init_cfg=dict(type='Pretrained', checkpoint=url))
    with pytest.raises(CheckpointError, match=f'{url} could not be downloaded .* name the file'):
        model.init_weights()
