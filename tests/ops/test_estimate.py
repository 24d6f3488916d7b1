"""The estimate of kernels' times without a GPU."""

import os
import subprocess
import sys

from helpers import ROOT
from helpers.stack import needs_torch, needs_triton

pytestmark = [needs_triton, needs_torch('2.11', 'the estimate, which uses internals of torch')]


def run_python(*arguments):
    """Run Python without the interpreter of kernels; return what it prints."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests/ops')])
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': path},
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LAYERS = ('ACmixConv2d', 'WindowACmix', 'ShiftWindowMSA')


def test_kernels_of_layers():
    """What they are, and that the layers meet their targets."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in run_python('tests/ops/estimate.py', *LAYERS).splitlines()
            if line.startswith('|')]
    found = {}
    for row in rows:
        found.setdefault(tuple(row[:2]), row[2:])
    # Queries, keys, values and output in bfloat16, and the logarithms of sums in float32.
    pixels = 8 * 200 * 336
    launches, megabytes, flops, instructions, microseconds = found['forward', 'attend_kernel']
    assert (launches, megabytes, flops) == ('1', f'{pixels * (4 * 64 * 2 + 4 * 4) / 1e6:.0f}', '')
    assert 0.05 < float(instructions) < 0.5
    assert abs(float(microseconds) - float(instructions) * 1e9 / (528 * 1.755e3) - 3) < 2
    # A dense convolution, and twice as much for its gradients.
    gigaflops = 2 * pixels * 64 * 64 * 9 / 1e9
    assert found['forward', 'convolution'][:3] == ['1', '138', f'{gigaflops:.1f}']
    assert found['backward', 'convolution_backward'][2] == f'{2 * gigaflops:.1f}'
    assert {'grad_queries_kernel', 'grad_keys_kernel'} <= {name for _, name in found}
    # The host casts to bfloat16, pads, rolls twice along each axis, and rolls back.
    assert found['forward', 'roll'][0] == '4'
    assert found['forward', 'constant_pad_nd'][0] == '2'

    sums = {(layer, name): [float(each or 0) for each in row] for layer, name, *row in rows
            if layer in LAYERS}
    assert set(sums) == {(layer, name) for layer in LAYERS for name in ('forward', 'backward')}
    for layer in LAYERS[:2]:
        assert sums[layer, 'forward'][0] <= 12
        assert sums[layer, 'backward'][0] <= 20
    forward, backward = (sums['ACmixConv2d', name][-1] for name in ('forward', 'backward'))
    assert forward <= 600
    assert forward + backward <= 1900
    for name in ('forward', 'backward'):
        # Launches and bytes.
        for ours, host in zip(sums['WindowACmix', name][:2], sums['ShiftWindowMSA', name]):
            assert ours < host


def test_launches_of_layers():
    """At most 12 forward and 20 backward, whichever kernels and composition are chosen."""
    printed = run_python('tests/ops/estimate.py', '--launches')
    rows = [line.split('|')[1:-1] for line in printed.splitlines()[2:]]
    assert len(rows) == 4 + 3 * 3
    for layer, forward, backward in rows:
        assert 0 < int(forward) <= 12, layer
        assert 0 < int(backward) <= 20, layer


def test_instructions_of_loops():
    """The tiles of dilated attention are computed in a loop over chunks of keys."""
    code = '''
import estimate
from acmix_mm.layers import ACmixConv2d
def trace(**options):
    layer = estimate.Layer(lambda: ACmixConv2d(16, 16, num_heads=1, **options), (1, 16, 20, 20))
    forward, _ = estimate.trace_layer(layer)
    return next(each for each in forward if each.name == 'attend_kernel')
trace(dilation=2)
# Of the kernels before, none has a loop.
total, loops = next(each for each in estimate.COUNTED.values() if each[1])
(start, end), = loops
print(total, end - start + 1, trace(dilation=2).instructions)
'''
    total, loop, executed = map(float, run_python('-c', code).split())
    assert 0 < loop < total
    # Tiles of 8×8 queries read 14×14 keys: 16 columns of 4 rows at a time. 4 phases of 2×2 tiles
    # have one program of 4 warps each.
    assert executed == (total + 3 * loop) * 4 * 4 * 4
