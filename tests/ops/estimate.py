"""Estimate the time of layers on an H200 without a GPU, kernel by kernel, forward and backward.

The layers run on tensors without data that claim to be on a GPU. A kernel takes as long as the
slowest of these, and 3 µs for its launch: its bytes at 4 TB/s; the operations of cuDNN and cuBLAS
at 60 % of the peak; the instructions of a Triton kernel, compiled for sm_90, at four per clock and
multiprocessor. Each ATen operator that is no view counts as one launch; exceptions are in
kernels_of.

Example: TRITON_INTERPRET=0 python tests/ops/estimate.py ACmixConv2d
"""

import argparse
import contextlib
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.nn.functional as F
import triton
from launches import TARGET, specialize
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.ops.backend import raising_kernel_errors
from acmix_mm.utils import markdown

# Index tables are cached, and belong to a mode.
FAKE_MODE = FakeTensorMode()
TOOLS = Path(triton.__file__).parent / 'backends/nvidia/bin'
# Of an H200: bytes, warp instructions and launches per second.
BANDWIDTH = 4e12
INSTRUCTIONS = 4 * 132 * 1.755e9
LAUNCH = 3e-6
# Operations per second that cuDNN and cuBLAS reach. Outside of tensor cores for float32.
FLOPS = {torch.bfloat16: 0.6 * 989e12, torch.float16: 0.6 * 989e12, torch.float32: 0.6 * 67e12}
# The arguments of kernels that count the iterations of their loop.
ITERATIONS = ('per_program', 'CHUNKS', 'steps', 'NUM_HEADS', 'copies')
# Kernels that move less are listed together.
SMALL = 1e6
PASSES = ('forward', 'backward')
HEADER = ('launches', 'MB', 'GFLOP', 'G instructions', 'µs')
aten = torch.ops.aten
# Operators that take no kernel, besides views.
FREE = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided,
        aten.detach, aten._unsafe_view, aten.promote_types, aten.lift_fresh}
# Of operators in place, those whose operations are counted.
FUNCTIONAL = {aten.addmm_: aten.addmm}
# The operators whose first argument is only written.
WRITES = {aten.copy_, aten.fill_, aten.zero_}


# Functions that autocast runs in half precision, and in float32.
HALF = {'linear', 'conv2d', 'matmul', '__matmul__', 'bmm'}
FULL = {'softmax', 'layer_norm'}


class Kernel(NamedTuple):
    """A launch, or several of the same name together.

    Attributes:
        name: of the ATen operator or the Triton kernel.
        launches: number of launches.
        bytes: read and written.
        flops: of a matrix product or a convolution.
        instructions: of all warps of a Triton kernel.
        seconds: the estimate.
    """

    name: str
    launches: int
    bytes: float
    flops: float = 0.
    instructions: float = 0.
    seconds: float = 0.

    def timed(self, dtype=torch.float32):
        work = max(self.bytes / BANDWIDTH, self.flops / FLOPS.get(dtype, FLOPS[torch.float32]),
                   self.instructions / INSTRUCTIONS)
        return self._replace(seconds=work + self.launches * LAUNCH)


class Trace(TorchDispatchMode):
    """Records the kernels of what runs in this context, in order."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            # Asked for by autograd, which would look for the streams of a GPU.
            return torch.device('cpu')
        if kwargs.get('device') is not None:
            kwargs['device'] = torch.device('cuda')
        with self:
            if func.namespace == 'acmix_mm':
                # What the custom op runs, instead of the shapes that it registers.
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            # Within a custom op, composite operators arrive as a whole.
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in (aten.convolution, aten.convolution_backward):
            # As cuDNN returns it, which torch asks on a GPU only; see layout_copies.
            out = tree_map_only(torch.Tensor, in_channels_last, out)
        if func.namespace == 'aten' and not func.is_view and packet not in FREE:
            self.kernels += kernels_of(packet, args, kwargs, out)
        return out

    def launch(self, kernel, *arguments, grid, warmup, **options):
        """Stands for ``JITFunction.run``."""
        self.kernels.append(triton_kernel(kernel, grid, arguments, options))


def size(*tensors):
    """Bytes of tensors in memory; expanded axes count once."""
    total = 0
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor):
            count = tensor.element_size()
            for extent, stride in zip(tensor.shape, tensor.stride()):
                count *= 1 if stride == 0 else extent
            total += count
    return total


def kernels_of(packet, args, kwargs, out):
    """The kernels that an ATen operator launches on a GPU."""
    name = packet.__name__
    read = size(args[1:] if packet in WRITES else args,
                {key: value for key, value in kwargs.items() if key != 'out'})
    counted = FUNCTIONAL.get(packet, packet)
    flops = flop_registry[counted](*args, **kwargs, out_val=out) if counted in flop_registry else 0
    tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
    dtype = tensors[0].dtype if tensors else torch.float32
    if packet is aten.convolution:
        x, weight, *_ = tensors
        return [*layout_copies(x, weight),
                Kernel(name, 1, read + size(out), flops).timed(dtype)]
    if packet is aten.convolution_backward:
        grad_out, x, weight = tensors[:3]
        pairs = [(grad, other) for grad, other in zip(out, (weight, x)) if grad is not None]
        found = [Kernel(name, 1, size(grad_out, *pair), flops / len(pairs)).timed(dtype)
                 for pair in pairs]
        return [*layout_copies(grad_out, x, weight), *found]
    if packet is aten.roll:
        # One axis after the other.
        return [Kernel(name, 1, read + size(out)).timed() for _ in args[2]]
    if packet in (aten.constant_pad_nd, aten.slice_backward, aten.select_backward):
        # A fill and a copy.
        return [Kernel(name, 1, size(out)).timed(), Kernel(name, 1, 2 * read).timed()]
    return [Kernel(name, 1, read + size(out), flops).timed(dtype)]


def in_channels_last(tensor):
    is_map = tensor.dim() == 4
    return torch.empty_like(tensor, memory_format=torch.channels_last) if is_map else tensor


def layout_copies(*tensors):
    """cuDNN runs channels last, and copies tensors in other layouts."""
    return [Kernel('layout of a convolution', 1, 2 * size(each)).timed() for each in tensors
            if not each.is_contiguous(memory_format=torch.channels_last)]


def triton_kernel(kernel, grid, arguments, options):
    """A launch of a Triton kernel. Each of its tensors is read or written once."""
    source, parsed, bound = specialize(kernel, arguments, options)
    per_warp = executed(source, parsed, *(bound[each] for each in ITERATIONS if each in bound))
    programs = functools.reduce(int.__mul__, grid, 1)
    return Kernel(kernel.__name__, 1, size(arguments),
                  instructions=per_warp * programs * parsed.num_warps).timed()


COUNTED = {}


def executed(source, options, iterations=1):
    """Instructions that a warp executes: all of them once, and loops as often as they iterate.

    Raises:
        NotImplementedError: loops are nested.
    """
    key = source.hash(), str(options)
    if key not in COUNTED:
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
        COUNTED[key] = instructions_and_loops(compiled.asm['cubin'])
    total, loops = COUNTED[key]
    for (_, end), (start, _) in zip(loops, loops[1:]):
        if start <= end:
            raise NotImplementedError(f'{source.name} has nested loops: {loops}')
    return total + (iterations - 1) * sum(end - start + 1 for start, end in loops)


def instructions_and_loops(cubin):
    """The number of instructions, and the first and last instruction of each loop."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([TOOLS / 'nvdisasm', '-c', file.name], capture_output=True, text=True,
                              check=True).stdout
    count, labels, loops = 0, {}, []
    for line in sass.splitlines():
        label = re.match(r'\s*(\.L_x_\w+):', line)
        instruction = re.match(r'\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*)', line)
        if label:
            labels[label[1]] = count
        elif instruction and instruction[1] != 'NOP':
            target = re.search(r'\.L_x_\w+', instruction[2])
            # The code ends with a branch to itself.
            if instruction[1] == 'BRA' and target and labels.get(target[0], count) < count:
                loops.append((labels[target[0]], count))
            count += 1
    return count, sorted(loops)


class Autocast(TorchFunctionMode):
    """Casts where torch.autocast would, which asks tensors for their device; see :class:`Trace`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if torch.is_autocast_enabled('cuda') and name in HALF | FULL:
            dtype = torch.bfloat16 if name in HALF else torch.float32
            args, kwargs = tree_map_only(torch.Tensor, lambda each: each.to(dtype),
                                         (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_gpu(trace):
    """Tensors are without data, and on an H200; Triton's launches are recorded."""
    with contextlib.ExitStack() as stack:
        for patch in (
                mock.patch.object(FakeTensor, 'is_cuda', True, create=True),
                mock.patch.object(torch.cuda, 'get_device_capability', lambda device=None: (9, 0)),
                mock.patch.object(torch.cuda, 'is_bf16_supported', lambda *arguments: True),
                mock.patch.object(torch.cuda, 'device_of', contextlib.nullcontext),
                # Without a GPU, autocast would disable itself.
                mock.patch.object(torch.cuda.amp.common, 'amp_definitely_not_available',
                                  lambda: False),
                mock.patch.object(F, 'scaled_dot_product_attention', memory_efficient_attention),
                mock.patch.object(JITFunction, 'run', lambda kernel, *arguments, **options:
                                  trace.launch(kernel, *arguments, **options)),
                raising_kernel_errors(), FAKE_MODE, torch.device('cuda'), Autocast()):
            stack.enter_context(patch)
        yield


def memory_efficient_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What ``scaled_dot_product_attention`` runs with a mask that requires gradients."""
    if torch.is_autocast_enabled('cuda'):
        q, k, v, attn_mask = (each.to(torch.get_autocast_dtype('cuda'))
                              for each in (q, k, v, attn_mask))
    keys = attn_mask.shape[-1]
    # It reads rows of 16 elements.
    attn_mask = F.pad(attn_mask, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class Layer(NamedTuple):
    """A layer and its input.

    Attributes:
        build: makes the layer.
        shape: of the input.
        arguments: further arguments of the layer.
        autocast: whether layer and input are float32, under autocast to bfloat16; otherwise, they
            are bfloat16.
        channels_last: the memory format of the input.
    """

    build: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    arguments: tuple = ()
    autocast: bool = False
    channels_last: bool = False


def host_block():
    from mmdet.models.backbones.swin import ShiftWindowMSA
    return ShiftWindowMSA(96, 3, 7, shift_size=3, dropout_layer=dict(type='DropPath', drop_prob=0.))


CONV_SHAPE = (8, 64, 200, 336)
LAYERS = {
    'ACmixConv2d': Layer(lambda: ACmixConv2d(64, 64), CONV_SHAPE),
    'ACmixConv2d, channels last': Layer(lambda: ACmixConv2d(64, 64), CONV_SHAPE,
                                        channels_last=True),
    'WindowACmix': Layer(lambda: WindowACmix(96, 3, 7, 3), (8, 200, 336, 96), autocast=True),
    'ShiftWindowMSA': Layer(host_block, (8, 200 * 336, 96), ((200, 336),), autocast=True),
}


def configurations():
    """Layers of several widths, each with the variants that may take other kernels."""
    for channels in (96, 192, 384, 768):
        yield f'WindowACmix, {channels} channels', [
            Layer(functools.partial(WindowACmix, channels, channels // 32, 7, shift),
                  (2, *size, channels), autocast=True)
            # Windows divide the first map.
            for shift in (0, 3) for size in ((14, 21), (16, 20))]
    for channels in (64, 128, 256):
        for name, options in (('', {}), (', stride 2', dict(stride=2)),
                              (', dilation 2', dict(dilation=2))):
            yield f'ACmixConv2d, {channels} channels{name}', [
                Layer(functools.partial(ACmixConv2d, channels, channels, **options),
                      (2, channels, 14, 21), autocast=autocast) for autocast in (False, True)]


def launches_table():
    """The most launches of each configuration, as Markdown. Nothing is compiled."""
    rows = [['layer', *PASSES]]
    with mock.patch(f'{__name__}.executed', lambda *arguments: 0):
        for name, variants in configurations():
            traced = [[sum(each.launches for each in kernels) for kernels in trace_layer(layer)]
                      for layer in variants]
            rows.append([name, *(str(max(each)) for each in zip(*traced))])
    return markdown.table(rows)


def trace_layer(layer):
    """The kernels of its forward and of its backward pass."""
    trace = Trace()
    dtype = torch.float32 if layer.autocast else torch.bfloat16
    with on_gpu(trace):
        torch.set_default_dtype(dtype)
        try:
            module = layer.build()
        finally:
            torch.set_default_dtype(torch.float32)
        x = torch.empty(layer.shape, dtype=dtype)
        if layer.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        # Index tables are cached in the first step.
        for _ in range(2):
            trace.kernels = []
            with trace, torch.autocast('cuda', torch.bfloat16, enabled=layer.autocast):
                out = module(x, *layer.arguments)
            forward, trace.kernels = trace.kernels, []
            grad_out = torch.empty_like(out)
            with trace:
                torch.autograd.grad(out, [x, *module.parameters()], grad_out)
    return forward, trace.kernels


def summary(kernels):
    """Launches of the same name together, those that move little last."""
    groups = {}
    for each in kernels:
        name = each.name if each.bytes >= SMALL else f'below {SMALL / 1e6:.0f} MB'
        groups.setdefault(name, []).append(each)
    rows = [total(name, group) for name, group in groups.items()]
    return sorted(rows, key=lambda row: (row.name.startswith('below'), -row.seconds))


def total(name, kernels):
    sums = (sum(each[1:][field] for each in kernels) for field in range(len(Kernel._fields) - 1))
    return Kernel(name, *sums)


def table(passes):
    """All kernels of both passes, and their sums, as Markdown."""
    rows = [['pass', 'kernel', *HEADER]]
    for name, kernels in zip(PASSES, passes):
        rows += [[name, each.name, *cells(each)] for each in summary(kernels)]
        rows.append([name, '**sum**', *cells(total('', kernels))])
    return markdown.table(rows)


def sums_table(traced):
    """The sums of each layer, forward and backward, as Markdown."""
    return markdown.table([['layer', 'pass', *HEADER], *(
        [layer, name, *cells(total('', kernels))]
        for layer, passes in traced.items() for name, kernels in zip(PASSES, passes))])


def cells(kernel):
    return [f'{kernel.launches}', f'{kernel.bytes / 1e6:.0f}',
            f'{kernel.flops / 1e9:.1f}' if kernel.flops else '',
            f'{kernel.instructions / 1e9:.3f}' if kernel.instructions else '',
            f'{kernel.seconds * 1e6:.0f}']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layers', nargs='*', metavar='LAYER',
                        help=f'any of {"; ".join(LAYERS)} (default: all)')
    parser.add_argument('--launches', action='store_true',
                        help='count the launches of more layers, in bfloat16 and under autocast, '
                        'and print nothing else')
    args = parser.parse_args()
    if args.launches:
        print(launches_table())
        parser.exit()
    traced = {name: trace_layer(LAYERS[name]) for name in args.layers or LAYERS}
    for name, passes in traced.items():
        print(f'{name}\n\n{table(passes)}\n')
    print(f'Sums\n\n{sums_table(traced)}')
