"""Selection of backends: precedence, contexts, the environment variable, availability, the log."""

import logging
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.operators import (
    attend_padded,
    conv_tensors,
    padded_window_tensors,
    sliding_tensors,
    window_tensors,
)
from helpers.stack import needs_custom_ops, needs_torch, needs_triton

from acmix_mm.ops import (
    available_backends,
    backend,
    shift_conv,
    sliding_window_attention,
    use_backend,
    window_attention,
)

BACKENDS = {
    'sliding_window_attention': {'reference', 'tiled', 'dense', 'triton'},
    'window_attention': {'reference', 'sdpa', 'chunked', 'triton'},
    'global_attention': {'reference', 'sdpa'},
    'block_attention': {'reference', 'sdpa'},
    'add_paths': {'reference', 'triton'},
    'compose_paths': {'reference', 'triton'},
    'position_encoding': {'reference', 'triton'},
    'position_bias': {'reference', 'triton'},
    'roll_map': {'reference', 'triton'},
    'projected_shift_conv': {'reference', 'separate', 'composed', 'grouped'},
    'shift_conv': {'reference', 'two_step', 'folded', 'conv2d', 'triton'},
    'patch_features': {'reference', 'chunked'},
    'patch_aggregation': {'reference', 'chunked', 'kernel_rows'},
    'involution': {'reference', 'chunked'},
}
needs_logged_choices = needs_torch('2.3', 'logging the choice of a backend')


@pytest.fixture
def selected(monkeypatch):
    """The backends that run, in order, as 'operator: backend'; reset by clear()."""
    names = []
    for operator, backends in backend._operators.items():
        for each in backends.values():
            def run(*arguments, each=each, operator=operator):
                names.append(f'{operator}: {each.name}')
                return each.run(*arguments)
            monkeypatch.setitem(backends, each.name, each._replace(run=run))
    return names


def attend(**options):
    return window_attention(*window_tensors(1, (1, 2), (4, 4), 2, 4), (4, 4), **options)


def slide(*tensors, **options):
    return sliding_window_attention(*(tensors or sliding_tensors(1, 1, 4, 3, 3)), 3, **options)


def convolve(**options):
    return shift_conv(*conv_tensors(1, 2, 4, 3, 3, 3, True, False), **options)


def test_precedence(selected, monkeypatch):
    attend()
    monkeypatch.setattr(backend, '_preferred', ('sdpa',))
    attend()
    with use_backend('chunked'):
        attend()
        attend(backend='reference')
        with use_backend(None):
            attend(dropout_p=0.5)
    attend()
    assert selected == [f'window_attention: {name}'
                        for name in ('chunked', 'sdpa', 'chunked', 'reference', 'sdpa', 'sdpa')]


def test_operators_without_the_backend_choose_as_usual(selected):
    with use_backend('reference'):
        with use_backend('tiled'):
            slide()
            convolve()
        slide()
    with use_backend('tiled'):
        convolve()
    assert selected == ['sliding_window_attention: tiled', 'shift_conv: reference',
                        'sliding_window_attention: reference', 'shift_conv: folded']


def test_context_ends_after_an_exception(selected):
    with pytest.raises(RuntimeError, match='inside'), use_backend('reference'):
        raise RuntimeError('inside')
    attend()
    assert selected == ['window_attention: chunked']


def test_unknown_names():
    message = "use_backend: no operator has a backend 'fast'; known backends are chunked, composed"
    with pytest.raises(ValueError, match=message), use_backend('fast'):
        pass
    with pytest.raises(ValueError, match="'softmax'; operators with backends are add_paths, "):
        available_backends('softmax')
    with pytest.raises(ValueError, match=r"has no backend 'tiled'; it has chunked, reference"):
        attend(backend='tiled')


def test_a_backend_that_cannot_run_is_an_error(monkeypatch):
    with use_backend('chunked'), pytest.raises(ValueError, match=r"has no dropout.*use 'sdpa'"):
        attend(dropout_p=0.5)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with use_backend('triton'), pytest.raises(ValueError, match='Leave out backend'):
        slide()


def run_python(code, **environment):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                          check=False, env={'PYTHONPATH': str(ROOT), 'PATH': '', **environment})


@needs_logged_choices
def test_environment_variable():
    code = '''
import logging
import torch
logging.basicConfig(level=logging.DEBUG, format='%(name)s %(message)s')
from acmix_mm.ops import shift_conv, use_backend
arguments = torch.randn(1, 3, 4, 3, 3), torch.randn(9, 3), torch.randn(4, 9, 3, 3)
shift_conv(*arguments)
with use_backend('reference'):
    shift_conv(*arguments)
with use_backend(None):
    shift_conv(*arguments)
'''
    for name, expected in (('two_step', 'two_step'), ('tiled', 'folded'), ('', 'folded')):
        done = run_python(code, ACMIX_BACKEND=name)
        log = [line for line in done.stderr.splitlines() if line.startswith('acmix_mm')]
        names = dict.fromkeys((expected, 'reference', 'folded'))
        assert log == [f"acmix_mm shift_conv runs on backend '{each}' (cpu)" for each in names]


def test_environment_variable_of_unknown_value():
    done = run_python('import acmix_mm.ops', ACMIX_BACKEND='fastest')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: ACMIX_BACKEND: no operator has a backend 'fastest'; known backends are ")


def arguments_of_operators_with_kernels():
    return ((slide, 'attend_triton', sliding_tensors(1, 1, 4, 3, 3)),
            (attend_padded((4, 4), 2), 'attend_windows_triton',
             padded_window_tensors(1, (5, 6), (4, 4), 2, 4)),
            (shift_conv, 'convolve_triton', conv_tensors(1, 2, 4, 3, 3, 3, False, False)))


@needs_triton
@needs_custom_ops
@pytest.mark.usefixtures('_fake_gpu')
def test_kernels_are_compiled_without_graph_breaks():
    """On a GPU, the choice of the backend is traced, too."""
    for run, name, tensors in arguments_of_operators_with_kernels():
        targets = set()

        def record(graph, inputs, targets=targets):
            targets.update(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        torch.compile(run, backend=record, fullgraph=True)(
            *(each if each is None else each.cuda() for each in tensors))
        assert f'acmix_mm.{name}.default' in targets


@needs_triton
@pytest.mark.usefixtures('_fake_gpu')
def test_amd_gpus_run_torch_backends(monkeypatch):
    """They are CUDA devices to torch, with capabilities of their own."""
    tensor = torch.empty(1, device='cuda')
    assert backend.runs_triton(tensor)
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert not backend.runs_triton(tensor)
    assert available_backends('shift_conv')['triton'] == (
        'needs an NVIDIA GPU; torch is built for ROCm 6.4')


@needs_torch('2.9', 'fp32_precision')
def test_precision_of_matrix_products():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert backend.matmul_precision() == 'tf32x3'
        matmul.allow_tf32 = True
        assert backend.matmul_precision() == 'tf32'
        matmul.allow_tf32 = False
        # Now reading allow_tf32 raises.
        matmul.fp32_precision = 'tf32'
        assert backend.matmul_precision() == 'tf32'
    finally:
        matmul.fp32_precision = before


def test_available_backends(monkeypatch):
    for operator, names in BACKENDS.items():
        assert set(available_backends(operator)) == names
    assert set(backend._operators) == set(BACKENDS)
    assert not any(available_backends('involution').values())

    def reason(dtype=torch.float32):
        return available_backends('shift_conv', dtype)['triton']
    monkeypatch.setattr(backend, 'TRITON_VERSION', None)
    assert reason() == 'needs the package triton in version 3 or newer; it is not installed'
    monkeypatch.setattr(backend, 'TRITON_VERSION', '2.1.0')
    assert reason() == 'needs the package triton in version 3 or newer; found 2.1.0'
    monkeypatch.setattr(backend, 'TRITON_VERSION', '3.2.0')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert reason() is None
    assert reason(torch.bfloat16) == ("takes float32 or float16 in Triton's interpreter; got "
                                      'torch.bfloat16')
    assert reason(torch.float64) == 'takes float32, bfloat16 or float16; got torch.float64'
    monkeypatch.delenv('TRITON_INTERPRET')
    for capabilities, found in (([], 'no GPU'), ([(7, 5), (6, 1)], '7.5, 6.1'), ([(9, 0)], None)):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda each=capabilities: len(each))
        monkeypatch.setattr(torch.cuda, 'get_device_capability', capabilities.__getitem__)
        assert reason(torch.bfloat16) == (
            found and f'needs an NVIDIA GPU of compute capability 8.0 or higher; found {found}')


@needs_logged_choices
def test_choice_is_logged_once(caplog):
    backend._log_once.cache_clear()
    with caplog.at_level(logging.DEBUG, logger='acmix_mm'):
        for _ in range(2):
            attend()
        attend(backend='sdpa')
    assert [record.getMessage() for record in caplog.records] == [
        "window_attention runs on backend 'chunked' (cpu)",
        "window_attention runs on backend 'sdpa' (cpu)"]


@needs_torch('2.5', 'torch.compile of contexts')
@pytest.mark.parametrize('where', ['outside', 'inside'])
def test_compiled_functions_follow_the_context(where):
    """Around a compiled function or within it, without a graph break."""
    qkv, positions = sliding_tensors(1, 1, 4, 3, 3)
    targets = set()

    def record(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(name):
        if where == 'inside':
            with use_backend(name):
                return sliding_window_attention(qkv, positions, 3)
        return sliding_window_attention(qkv, positions, 3)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=record, fullgraph=True)
    for name, is_tiled in (('tiled', True), ('reference', False), (None, True)):
        targets.clear()
        torch._dynamo.reset()
        with use_backend(name):
            compiled(name)
        assert ('acmix_mm.attend_tiled.default' in targets) == is_tiled
        # Once more, from the cache.
        with use_backend(name):
            torch.testing.assert_close(compiled(name), sliding_window_attention(qkv, positions, 3))
    if where == 'outside':
        # A change of the context compiles the function again.
        for name in (None, 'reference'):
            targets.clear()
            with use_backend(name):
                compiled(None)
        assert targets
        assert 'acmix_mm.attend_tiled.default' not in targets


class Attention(torch.nn.Module):

    def forward(self, qkv, positions):
        return sliding_window_attention(qkv, positions, 3)


@needs_torch('2.7', 'telling an export from torch.compile')
@pytest.mark.parametrize(('name', 'target'), [
    (None, 'aten.scaled_dot_product_attention.default'),
    ('tiled', 'acmix_mm.attend_tiled.default'),
    ('reference', 'aten.im2col.default'),
])
def test_exports_follow_the_context(name, target):
    with use_backend(name):
        program = torch.export.export(Attention(), tuple(sliding_tensors(1, 1, 4, 3, 3)))
    assert target in {str(node.target) for node in program.graph.nodes}
