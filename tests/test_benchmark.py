"""What the benchmark prints is what it measured."""

import json

from acmix_mm.benchmark import PASSES, Result, table


def test_measures_both_rivals_of_a_case(run_tool, tmp_path):
    done = run_tool('tools/benchmark.py', '--cases', 'conv-100x168', '--repeats', 1, '--json',
                    tmp_path / 'results.json')
    assert done.returncode == 0, done.stderr
    results = [Result(**entry) for entry in json.loads((tmp_path / 'results.json').read_text())]
    assert [(result.passes, result.rival) for result in results] == [
        (passes, rival) for passes in PASSES for rival in ('reference', 'ACmixConv2d')]
    assert all(result.seconds > 0 for result in results)
    # The reference copies every map 49 times.
    for reference, fast in (results[:2], results[2:]):
        assert 0 < fast.mebibytes < reference.mebibytes / 8
    assert done.stdout.strip() == table(results)
