"""Comparison of a backbone without ACmix with the host of another library."""

import torch
from torch import nn


def assert_equal_networks(plain, ours, size=(65, 50)):
    """Check the features, and which parameters and statistics are frozen in training."""
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    ours.load_state_dict(plain.state_dict())
    # In double precision: with random weights, rounding errors grow with the depth.
    plain.double().train()
    ours.double().train()
    x = torch.randn(2, 3, *size, dtype=torch.double)
    expected, actual = plain(x), ours(x)
    assert len(actual) == len(expected)
    for theirs, own in zip(expected, actual):
        torch.testing.assert_close(own, theirs)
    for (name, own), (_, theirs) in zip(ours.named_parameters(), plain.named_parameters()):
        assert own.requires_grad == theirs.requires_grad, name
    theirs = dict(plain.named_modules())
    for name, own in ours.named_modules():
        if isinstance(own, nn.BatchNorm2d):
            assert own.training == theirs[name].training, name
