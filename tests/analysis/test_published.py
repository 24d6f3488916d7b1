"""Counts of the paper's networks against the published ones."""

import pytest
from helpers import ROOT

from acmix_mm.analysis.published import NETWORKS, count_network

# Millions of parameters, billions of multiply-adds, and of elementwise operations.
COUNTED = {
    'ACmix-ResNet-26': (10.488, 2.217, 0.027), 'ACmix-ResNet-38': (14.411, 2.859, 0.036),
    'ACmix-ResNet-50': (18.334, 3.502, 0.045), 'ACmix-SAN-10': (11.995, 1.888, 0.074),
    'ACmix-SAN-15': (16.414, 2.630, 0.104), 'ACmix-SAN-19': (20.829, 3.317, 0.129),
    'ACmix-PVT-T': (13.395, 1.998, None), 'ACmix-PVT-S': (24.824, 3.941, None),
    'ACmix-Swin-T': (28.650, 4.645, None), 'ACmix-Swin-S': (50.345, 8.993, None),
}


@pytest.mark.parametrize(
    ('backbone', 'network'), NETWORKS, ids=[network.name for _, network in NETWORKS])
def test_paper_networks(backbone, network):
    (parameters, multiply_adds), elementwise = count_network(backbone, network)
    pinned = COUNTED[network.name]
    assert parameters / 1e6 == pytest.approx(pinned[0], abs=0.0005)
    assert multiply_adds / 1e9 == pytest.approx(pinned[1], abs=0.0005)
    assert elementwise is None if pinned[2] is None else (
        elementwise / 1e9 == pytest.approx(pinned[2], abs=0.0005))
    if network.code_parameters:
        assert parameters / 1e6 == pytest.approx(network.code_parameters, abs=0.006)
    # Published counts are rounded to one digit. The notes of the table explain the three outliers.
    if network.name not in ('ACmix-ResNet-26', 'ACmix-ResNet-50', 'ACmix-SAN-10'):
        everything = (multiply_adds + (elementwise or 0)) / 1e9
        assert everything == pytest.approx(network.multiply_adds, abs=0.0505)


def test_documentation_has_the_table(get_flops):
    assert get_flops('--zoo') in (ROOT / 'docs/config-zoo.md').read_text()
