"""Weights for which every parameter matters, and patch-wise attention with explicit copies."""

import torch
import torch.nn.functional as F

from acmix_mm.ops.reflection import reflection_pad


def randomised(model, scale=0.2):
    """Set every parameter and statistic to a random value, and evaluation mode.

    Norms and rates stay near one, and convolutions preserve the variance of their inputs.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = scale * torch.randn(tensor.shape)
            if name.endswith(('rate1', 'rate2', 'running_var')) or (
                    tensor.dim() == 1 and name.endswith('weight')):
                noise = 1 + noise.clamp(-0.5, 0.5)
            elif tensor.dim() == 4 and 'dep_conv' not in name:
                noise = noise / scale / tensor[0].numel()**0.5
            tensor.copy_(noise)
    # MMDetection's train() does not return the model.
    model.eval()
    return model


def patchwise_attention(layer, x):
    """The attention of a PatchwiseACmix as in the SAN paper, with a copy of every neighbourhood."""
    q, k, v = layer.conv1(x), layer.conv2(x), layer.conv3(x)
    area = layer.kernel_size**2

    def copies(maps):
        return F.unfold(reflection_pad(maps, layer.kernel_size // 2), layer.kernel_size)

    around = torch.cat([q.flatten(2), copies(k)], 1)
    weights = layer.conv_w(around.unsqueeze(2)).squeeze(2).unflatten(1, (1, -1, area))
    values = copies(v).unflatten(1, (-1, weights.shape[2], area))
    return (weights * values).sum(3).flatten(1, 2).view_as(v)
