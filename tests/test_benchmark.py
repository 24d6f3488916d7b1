"""The benchmark tool, its cases and its bandwidth."""

import functools
import json

import pytest
import torch
from helpers.tools import plain_message

from acmix_mm import benchmark
from acmix_mm.benchmark import (
    CASES,
    DTYPES,
    PASSES,
    Case,
    FirstBlocks,
    Result,
    Setting,
    results_table,
    seconds_of,
    step,
    swin_case,
)


def test_measures_both_implementations_of_a_case(run_tool, tmp_path):
    done = run_tool('tools/benchmark.py', '--cases', 'conv-100x168', '--repeats', 1, '--json',
                    tmp_path / 'results.json')
    assert done.returncode == 0, done.stderr
    results = [Result(*entry.values())
               for entry in json.loads((tmp_path / 'results.json').read_text())]
    assert [(result.passes, result.implementation) for result in results] == [
        (passes, name) for passes in PASSES for name in ('reference', 'ACmixConv2d')]
    assert all(result.seconds > 0 for result in results)
    # The reference copies every map 49 times.
    for reference, fast in (results[:2], results[2:]):
        assert 0 < fast.mebibytes < reference.mebibytes / 8
    assert results_table(results) in done.stdout
    assert 'float32, batch 1, median of 1' in done.stdout


def test_missing_gpu_is_an_error(run_tool):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    message = plain_message(run_tool('tools/benchmark.py', '--device', 'cuda'))
    assert 'needs a GPU that torch can use; there is none' in message


def test_timing_keeps_the_number_of_threads():
    threads = torch.get_num_threads()
    seen = []
    assert seconds_of(lambda: seen.append(torch.get_num_threads()), 'cpu') > 0
    assert set(seen) == {threads}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize('name', [name for name in CASES if name.partition('-')[0] in (
    'sliding', 'shift', 'window', 'conv')])
@pytest.mark.parametrize('dtype', DTYPES)
def test_implementations_compute_the_same(name, dtype):
    """On maps of a hundredth of the pixels. Those of window-acmix differ on purpose."""
    case = CASES[name]
    small = Case(case.implementations, [
        [length // 8 // 7 * 7 if length is not None and length >= 100 else length
         for length in shape] for shape in case.shapes])
    setting = Setting(dtype=dtype, batch=2)
    inputs = setting.inputs(small, requires_grad=True)
    outs = []
    for implementation in small.implementations:
        torch.manual_seed(1)
        outs += step(setting.build(small, implementation), inputs, PASSES[1])
    assert outs[0].shape == outs[1].shape
    if name != 'window-acmix':
        error = (outs[0] - outs[1]).double().abs().max() / outs[0].double().abs().max()
        assert error < {'float32': 1e-5, 'bfloat16': 5e-2, 'float16': 1e-2}[dtype]


@pytest.mark.parametrize('dtype', DTYPES)
def test_swin_blocks_run_in_every_dtype(dtype):
    """In plain half precision, MMDetection's shifted block raises an error."""
    case = swin_case(functools.partial(FirstBlocks, height=8, width=9), None, 72, 96)
    setting = Setting(dtype=dtype)
    inputs = setting.inputs(case, requires_grad=True)
    for implementation in case.implementations:
        out, = step(setting.build(case, implementation), inputs, PASSES[1])
        assert out.isfinite().all()
    assert inputs[0].grad.isfinite().all()


def test_bandwidth_counts_reads_and_writes():
    inputs, outputs = [torch.zeros(6), torch.zeros(2)], [torch.zeros(3, dtype=torch.float16)]
    assert benchmark.bytes_moved(inputs, outputs, PASSES[0]) == 32 + 6
    # The inputs are read twice, and their gradients written; the outputs and their gradients once.
    assert benchmark.bytes_moved(inputs, outputs, PASSES[1]) == 3 * 32 + 2 * 6
    assert benchmark.copy_of(38, 'cpu')().nbytes == 19
    result = Result('case', PASSES[0], 'name', 2., 1., 3., 0.5)
    assert '| GB/s | of a copy |' in results_table([result])


def test_gpus_are_timed_by_events(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.calls = len(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 5. * (end.calls - self.calls)

    calls = []
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    assert seconds_of(lambda: calls.append(1), 'cuda') == pytest.approx(0.005)
    # One call warms up.
    assert len(calls) == benchmark.GPU_CALLS + 1


def test_timed_runs_alternate(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark, 'seconds_of', lambda run, device: run())
    seconds = benchmark.interleaved_seconds(
        {'a': lambda: calls.append('a') or len(calls), 'b': lambda: calls.append('b') or 0.5},
        'cpu', 3)
    assert calls == ['a', 'b', 'a', 'b', 'a', 'b']
    assert seconds == {'a': 3, 'b': 0.5}
