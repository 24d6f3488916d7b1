"""Networks and checkpoints, valid and invalid, for the tests of loading."""

import argparse
import pickle

import mmdet.models.backbones.swin as mmdet_swin
import torch
from helpers.tools import Bomb

SWIN = dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6), strides=(4, 2), out_indices=(0, 1))
PVT = dict(embed_dims=4, num_stages=2, num_layers=(1, 1), num_heads=(1, 2), patch_sizes=(4, 2),
           strides=(4, 2), paddings=(0, 0), sr_ratios=(2, 1), mlp_ratios=(2, 2),
           out_indices=(0, 1), pretrain_img_size=32)


def load_pretrained(network, path, **arguments):
    """Build a backbone that loads a checkpoint, in evaluation mode."""
    model = network(**arguments, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model.eval()


def stage_outputs(plain, x):
    """The outputs of the four stages of a ResNet, which all projects name alike."""
    maps = []
    hooks = [getattr(plain, f'layer{stage}').register_forward_hook(
        lambda module, inputs, out: maps.append(out)) for stage in range(1, 5)]
    plain(x)
    for hook in hooks:
        hook.remove()
    return maps


def entries(node, path=''):
    """Map the path of each tensor, number and text in nested dicts and lists to its value."""
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return {path: node}
    return {key: value for name, child in children
            for key, value in entries(child, f'{path}.{name}').items()}


def training_state(path):
    """The entries of a checkpoint, without the records of its run: dates, paths and logs."""
    # After MMEngine's fork has loaded a checkpoint, torch.load refuses its classes again.
    checkpoint = torch.load(path, weights_only=False)
    kept = {key: value for key, value in checkpoint.items() if key not in ('meta', 'message_hub')}
    return entries({**kept, 'iter': checkpoint['meta']['iter']})


def differing(ours, theirs):
    """The paths of entries that differ, in any bit, or that only one of two checkpoints has."""
    def equal(one, other):
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and torch.equal(one, other)
        return one == other

    return [path for path in sorted({*ours, *theirs})
            if path not in ours or path not in theirs
            or type(ours[path]) is not type(theirs[path]) or not equal(ours[path], theirs[path])]


def write_bad_checkpoint(kind, folder):
    path = folder / f'{kind}.pth'
    good = mmdet_swin.SwinTransformer(**SWIN).state_dict()
    if kind == 'code':
        bomb = Bomb(folder / 'ran')
        torch.save(dict(good, bomb=bomb), path)
    elif kind == 'code in arguments':
        bomb = Bomb(folder / 'ran')
        torch.save(dict(state_dict=good, args=argparse.Namespace(lr=0.1, bomb=bomb)), path)
    elif kind == 'old code':
        bomb = Bomb(folder / 'ran')
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    elif kind == 'truncated':
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('<html>404: not found</html>')
    elif kind == 'no weights':
        torch.save(dict(epoch=3), path)
    elif kind == 'ResNet':
        torch.save({'conv1.weight': torch.zeros(64, 3, 7, 7), 'bn1.weight': torch.zeros(64)}, path)
    elif kind == 'wider':
        torch.save(mmdet_swin.SwinTransformer(**{**SWIN, 'embed_dims': 24}).state_dict(), path)
    elif kind == 'deeper':
        torch.save(mmdet_swin.SwinTransformer(**{**SWIN, 'depths': (2, 4)}).state_dict(), path)
    elif kind == 'shallower':
        torch.save(mmdet_swin.SwinTransformer(**{**SWIN, 'depths': (2, 1)}).state_dict(), path)
    return path
