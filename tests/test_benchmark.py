"""What the benchmark prints is what it measured."""

import json

import pytest
import torch

from acmix_mm import benchmark
from acmix_mm.benchmark import CASES, DTYPES, PASSES, Case, Result, Setting, step, table


def test_measures_both_rivals_of_a_case(run_tool, tmp_path):
    done = run_tool('tools/benchmark.py', '--cases', 'conv-100x168', '--repeats', 1, '--json',
                    tmp_path / 'results.json')
    assert done.returncode == 0, done.stderr
    results = [Result(*entry.values())
               for entry in json.loads((tmp_path / 'results.json').read_text())]
    assert [(result.passes, result.rival) for result in results] == [
        (passes, rival) for passes in PASSES for rival in ('reference', 'ACmixConv2d')]
    assert all(result.seconds > 0 for result in results)
    # The reference copies every map 49 times.
    for reference, fast in (results[:2], results[2:]):
        assert 0 < fast.mebibytes < reference.mebibytes / 8
    assert table(results) in done.stdout
    assert 'float32, batch 1, median of 1' in done.stdout


def test_refuses_a_gpu_that_is_not_there(run_tool):
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    done = run_tool('tools/benchmark.py', '--device', 'cuda')
    assert done.returncode == 2
    assert 'needs a GPU that torch can use; there is none' in done.stderr


@pytest.mark.parametrize('name', [name for name in CASES if name.partition('-')[0] in (
    'sliding', 'shift', 'window', 'conv')])
@pytest.mark.parametrize('dtype', DTYPES)
def test_rivals_compute_the_same(name, dtype):
    """On maps of a hundredth of the pixels; those of window-acmix differ on purpose."""
    case = CASES[name]
    small = Case(case.rivals, [[axis // 8 // 7 * 7 if axis is not None and axis >= 100 else axis
                                for axis in shape] for shape in case.shapes])
    setting = Setting(dtype=dtype, batch=2)
    inputs = setting.inputs(small, requires_grad=True)
    outs = []
    for rival in small.rivals.values():
        torch.manual_seed(1)
        outs += step(setting.build(rival), inputs, PASSES[1])
    assert outs[0].shape == outs[1].shape
    if name != 'window-acmix':
        error = (outs[0] - outs[1]).double().abs().max() / outs[0].double().abs().max()
        assert error < {'float32': 1e-5, 'bfloat16': 5e-2, 'float16': 1e-2}[dtype]


def test_bandwidth_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(benchmark, 'seconds_of', lambda run, device: 0.5)
    monkeypatch.setattr(torch, 'empty', lambda *size, **options: torch.zeros(1))
    result = benchmark.with_bandwidth(Result('case', PASSES[0], 'rival', 2., 1.), 10**9, 10**9)
    assert (result.gigabytes_per_second, result.of_copy) == (1.0, 0.25)
    result = benchmark.with_bandwidth(Result('case', PASSES[1], 'rival', 5., 1.), 10**9, 10**9)
    assert result.gigabytes_per_second == 1.0
    assert '| GB/s | of a copy |' in table([result])
