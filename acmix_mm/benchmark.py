"""Time and peak memory of operators, layers and networks, against their baselines.

The runs of a case are interleaved in one process, so that drift of the machine affects all its
implementations alike. Peak memory is measured in a fresh process for each, above the memory in use
before the call.
"""

import ctypes
import functools
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.ops import shift_conv, sliding_window_attention, use_backend, window_attention
from acmix_mm.utils import markdown

PASSES = ('forward', 'forward + backward')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# Calls per timing on a GPU, where one alone would measure mostly its launch.
GPU_CALLS = 10
# Stands beside the names of implementations.
COPY = 'copy of as many bytes'


class Implementation(NamedTuple):
    """What a case times: a function of the inputs that returns tensors, or a module.

    Args:
        build: makes it.
        backend: of its operators; None for their default.
    """

    build: Callable[[], Callable]
    backend: Optional[str] = None


class Case(NamedTuple):
    """Implementations by name, the baseline first, and the shapes of their inputs.

    A length of None stands for the batch size. With ``autocast``, weights and inputs are float32,
    and half precision is that of ``torch.autocast``, as in training.
    """

    implementations: dict[str, Implementation]
    shapes: Sequence[Sequence[Optional[int]]]
    autocast: bool = False


class Setting(NamedTuple):
    """Device, dtype (a key of ``DTYPES``) and batch size of a run."""

    device: str = 'cpu'
    dtype: str = 'float32'
    batch: int = 1

    def inputs(self, case: Case, requires_grad: bool) -> list[Tensor]:
        """Draw the inputs of a case."""
        return [torch.randn([self.batch if length is None else length for length in shape],
                            device=self.device, dtype=self.storage(case),
                            requires_grad=requires_grad) for shape in case.shapes]

    def build(self, case: Case, name: str) -> Callable:
        """Build an implementation of a case for this device and dtype."""
        implementation = case.implementations[name]
        built = implementation.build()
        if isinstance(built, nn.Module):
            built.to(self.device, self.storage(case))

        def run(*inputs: Tensor) -> object:
            backend = implementation.backend
            selected = nullcontext() if backend is None else use_backend(backend)
            with selected, self.autocast(case):
                return built(*inputs)
        return run

    def storage(self, case: Case) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float32 if case.autocast else DTYPES[self.dtype]

    def autocast(self, case: Case) -> AbstractContextManager:
        """The context that a case runs in."""
        if not case.autocast or self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.dtype])


class Result(NamedTuple):
    """Median seconds per call and peak memory in MiB of an implementation.

    On a GPU, ``gigabytes_per_second`` is the bandwidth of reading every input and writing every
    output once; a backward pass adds reading the inputs and output gradients and writing the input
    gradients. ``of_copy`` is its ratio to the bandwidth of a copy of as many bytes.
    """

    case: str
    passes: str
    implementation: str
    seconds: float
    mebibytes: float
    gigabytes_per_second: Optional[float] = None
    of_copy: Optional[float] = None


def convolve(qkv: Tensor, fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """:func:`shift_conv` of projections as :func:`acmix_mm.ops.project` returns them on a GPU."""
    return shift_conv(qkv.flatten(3, 4).permute(0, 3, 4, 1, 2), fc_weight, shift_weight)


def swin_tiny(acmix: bool) -> nn.Module:
    if acmix:
        from acmix_mm.backbones import ACmixSwinTransformer as Backbone
    else:
        from mmdet.models.backbones.swin import SwinTransformer as Backbone
    return Backbone(drop_path_rate=0.)


class FirstBlocks(nn.Module):
    """The two blocks of the first stage of Swin-T, on (batch, height · width, 96)."""

    def __init__(self, acmix: bool, height: int, width: int) -> None:
        super().__init__()
        self.blocks = swin_tiny(acmix).stages[0].blocks
        self.hw_shape = height, width

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.hw_shape)
        return x


class MaskRCNN(nn.Module):
    """MMDetection's Mask R-CNN with Swin-T, up to the outputs of its heads for each proposal."""

    def __init__(self, acmix: bool) -> None:
        super().__init__()
        from mmdet.utils import register_all_modules
        from mmengine.hub import get_config
        from mmengine.registry import MODELS
        register_all_modules()
        cfg = get_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
        if acmix:
            cfg.model.backbone.type = 'ACmixSwinTransformer'
        cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.)
        self.detector = MODELS.build(cfg.model)

    def forward(self, x: Tensor) -> list[Tensor]:
        from mmdet.structures import DetDataSample
        size = tuple(x.shape[2:])
        samples = [DetDataSample(metainfo=dict(img_shape=size, scale_factor=(1., 1.)))
                   for _ in range(len(x))]
        return [out for out in self.detector(x, samples, mode='tensor') if isinstance(out, Tensor)]


def operator_case(run: Callable, baseline: str, *shapes: Sequence[Optional[int]]) -> Case:
    """A backend of an operator against its default."""
    return Case({baseline: Implementation(lambda: run, baseline),
                 'default': Implementation(lambda: run)}, shapes)


def conv_case(height: int, width: int) -> Case:
    build = functools.partial(ACmixConv2d, 64, 64)
    return Case(dict(reference=Implementation(build, 'reference'),
                     ACmixConv2d=Implementation(build)), [(None, 64, height, width)])


def window_case(*shape: Optional[int]) -> Case:
    build = functools.partial(WindowACmix, 96, 3, window_size=7, shift_size=3)
    return Case({'attention alone': Implementation(functools.partial(build, mix='attn')),
                 'both paths': Implementation(build)}, [shape])


def swin_case(build: Callable, *shape: Optional[int]) -> Case:
    """A network in ACmix's Swin and in MMDetection's, which runs in half precision only under
    autocast: it adds a float32 mask to the logits of shifted windows.
    """
    return Case({'plain Swin': Implementation(functools.partial(build, False)),
                 'ACmix-Swin': Implementation(functools.partial(build, True))}, [shape], True)


# The first seven need torch alone, the blocks and backbones MMDetection, the detector also mmcv's
# compiled operators.
CASES = {
    'sliding-attention': operator_case(functools.partial(sliding_window_attention, kernel_size=7),
                                       'reference', (None, 200, 336, 3, 4, 16), (200, 336, 16)),
    'shift-conv': operator_case(convolve, 'reference', (None, 200, 336, 3, 4, 16), (9, 12),
                                (64, 9, 3, 3)),
    'window-attention': operator_case(
        functools.partial(window_attention, window_size=(7, 7), shift_size=3), 'sdpa',
        (None, 224, 336, 3, 3, 32), (3, 49, 49)),
    'conv-100x168': conv_case(100, 168),
    'conv-200x336': conv_case(200, 336),
    'conv-400x672': conv_case(400, 672),
    'window-acmix': window_case(None, 224, 336, 96),
    'swin-blocks': swin_case(functools.partial(FirstBlocks, height=224, width=336),
                             None, 224 * 336, 96),
    'swin-t-448x672': swin_case(swin_tiny, None, 3, 448, 672),
    'swin-t-896x1344': swin_case(swin_tiny, None, 3, 896, 1344),
    'swin-t-800x1344': swin_case(swin_tiny, None, 3, 800, 1344),
    'mask-rcnn-800x1344': swin_case(MaskRCNN, None, 3, 800, 1344),
}


def step(run: Callable, inputs: Sequence[Tensor], passes: str) -> list[Tensor]:
    """Run once, forward or forward and backward, and return the outputs."""
    for each in inputs:
        # In a network, the gradients of maps are not accumulated over calls either.
        each.grad = None
    with torch.set_grad_enabled(passes != 'forward'):
        out = run(*inputs)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if passes != 'forward':
        torch.autograd.backward(outs, [torch.ones_like(each) for each in outs])
    return outs


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Time one call, after calls that warm up caches and the memory allocator."""
    if not device.startswith('cuda'):
        # Older torch imports numpy here.
        from torch.utils.benchmark import Timer
        timer = Timer('run()', globals=dict(run=run), num_threads=torch.get_num_threads())
        return timer.timeit(1 if device == 'cpu' else GPU_CALLS).mean
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(GPU_CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / GPU_CALLS


def interleaved_seconds(runs: Mapping[str, Callable[[], object]], device: str,
                        repeats: int) -> dict[str, float]:
    """The median seconds per call of each function, whose timed runs alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return {name: statistics.median(each) for name, each in seconds.items()}


def compare(name: str, passes: str, setting: Setting, repeats: int) -> list[Result]:
    """Time the implementations of a case in interleaved runs, and measure their memory."""
    case = CASES[name]
    inputs = setting.inputs(case, requires_grad=passes != 'forward')
    runs: dict[str, Callable[[], object]] = {
        each: functools.partial(step, setting.build(case, each), inputs, passes)
        for each in case.implementations}
    moved = 0
    if setting.device != 'cpu':
        moved = bytes_moved(inputs, next(iter(runs.values()))(), passes)
        runs[COPY] = copy_of(moved, setting.device)
    seconds = interleaved_seconds(runs, setting.device, repeats)
    results = []
    for each in case.implementations:
        result = Result(name, passes, each, seconds[each],
                        peak_memory(name, passes, each, setting))
        if COPY in seconds:
            result = result._replace(gigabytes_per_second=moved / result.seconds / 1e9,
                                     of_copy=seconds[COPY] / result.seconds)
        results.append(result)
    return results


def bytes_moved(inputs: Sequence[Tensor], outputs: Sequence[Tensor], passes: str) -> int:
    """Bytes that an implementation reads and writes at least; see :class:`Result`."""
    read, written = (sum(tensor.nbytes for tensor in tensors) for tensors in (inputs, outputs))
    return read + written if passes == 'forward' else 3 * read + 2 * written


def copy_of(moved: int, device: str) -> Callable[[], Tensor]:
    """A copy that reads and writes as many bytes together."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def peak_memory(name: str, passes: str, implementation: str, setting: Setting) -> float:
    """Run :func:`report_peak_memory` in a process of its own and return the MiB."""
    arguments = f'{name!r}, {passes!r}, {implementation!r}, b.Setting{tuple(setting)!r}'
    code = f'import acmix_mm.benchmark as b; b.report_peak_memory({arguments})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_peak_memory(name: str, passes: str, implementation: str, setting: Setting) -> None:
    """Print by how many MiB a pass raises the memory of this process, or of the GPU."""
    case = CASES[name]
    run = setting.build(case, implementation)
    inputs = setting.inputs(case, requires_grad=passes != 'forward')
    # The first call also loads code, which stays.
    step(run, inputs, passes)
    peak = PeakMemory(setting.device)
    step(run, inputs, passes)
    print(peak.mebibytes())


class PeakMemory:
    """The peak memory of this process, or of the GPU, above that at construction.

    Args:
        device: ``'cpu'``, which requires Linux, or a GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == 'cpu':
            # Freed memory that the allocator keeps would hide new allocations.
            ctypes.CDLL(None).malloc_trim(0)
            with open('/proc/self/clear_refs', 'w') as peak:
                peak.write('5')
            self.idle = resident('VmRSS')
        else:
            torch.cuda.reset_peak_memory_stats()
            self.idle = torch.cuda.memory_allocated() / 2**20

    def mebibytes(self) -> float:
        """The peak so far, in MiB."""
        if self.device == 'cpu':
            return resident('VmHWM') - self.idle
        return torch.cuda.max_memory_allocated() / 2**20 - self.idle


def resident(entry: str) -> float:
    """MiB of an entry of this process's status, ``VmRSS`` or ``VmHWM``."""
    with open('/proc/self/status') as status:
        return int(re.search(rf'{entry}:\s+(\d+) kB', status.read()).group(1)) / 1024


def machine(setting: Setting) -> str:
    """Describe a measurement in one line: date, processor, torch version, dtype, batch."""
    return (f'{time.strftime("%Y-%m-%d")}, {processor(setting.device)}, torch {torch.__version__}, '
            f'{setting.dtype}, batch {setting.batch}')


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU with the number of torch's threads."""
    if device != 'cpu':
        return torch.cuda.get_device_name()
    with open('/proc/cpuinfo') as info:
        names = re.findall(r'model name\s*: (.+)', info.read())
    threads = torch.get_num_threads()
    return f'{names[0] if names else platform.machine()}, {threads} thread{"s" * (threads != 1)}'


def results_table(results: list[Result]) -> str:
    """The results as a Markdown table, with ratios to the first implementation of each case."""
    on_gpu = any(result.of_copy is not None for result in results)
    rows = [['case', 'pass', 'implementation', 'milliseconds', 'ratio', 'peak MiB', 'ratio']]
    rows[0] += ['GB/s', 'of a copy'] if on_gpu else []
    first: dict[tuple[str, str], Result] = {}
    for result in results:
        base = first.setdefault((result.case, result.passes), result)
        rows.append([result.case, result.passes, result.implementation,
                     f'{1000 * result.seconds:.2f}', f'{result.seconds / base.seconds:.3f}',
                     f'{result.mebibytes:.0f}', f'{result.mebibytes / base.mebibytes:.3f}'])
        if on_gpu:
            rows[-1] += [f'{result.gigabytes_per_second:.0f}', f'{result.of_copy:.3f}']
    return markdown.table(rows)
