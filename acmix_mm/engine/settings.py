"""Checks of a config against the classes that it names, before any of them is built."""

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Callable, NamedTuple, Optional, Union, get_args

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from acmix_mm.utils.errors import UsageError, suggestion

SPLITS = ('train', 'val', 'test')
# The types that MMEngine uses if a config names none.
LOOP_TYPES = dict(val='ValLoop', test='TestLoop')
DEFAULT_HOOKS = dict(
    runtime_info='RuntimeInfoHook', timer='IterTimerHook', sampler_seed='DistSamplerSeedHook',
    logger='LoggerHook', param_scheduler='ParamSchedulerHook', checkpoint='CheckpointHook')
# Keys that MMEngine removes before it builds the rest.
HOOK_KEYS = ('priority',)
SCHEDULER_KEYS = ('convert_to_iter_based',)
DATALOADER_KEYS = ('collate_fn', 'worker_init_fn', 'num_batch_per_epoch',
                   'disable_subprocess_warning')
WRAPPER_KEYS = ('constructor', 'paramwise_cfg')
DEFAULT_CONSTRUCTOR = 'DefaultOptimWrapperConstructor'
PARAMWISE_KEYS = (
    'custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult',
    'dwconv_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate')
ENVIRONMENT_KEYS = ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit')
# What the tools and MMEngine read at the top level of a config, besides the runner's arguments.
TOP_LEVEL_KEYS = (
    'runner_type', 'strategy', 'model_wrapper_cfg', 'find_unused_parameters', 'custom_imports',
    'vis_backends', 'backend_args', 'tta_model', 'tta_pipeline', 'activation_checkpointing',
    'efficient_conv_bn_eval', 'compile')
# Further parts of a config that are dicts.
SECTIONS = ('default_hooks', 'visualizer', 'log_processor', 'env_cfg', 'randomness')
# Ends of the keys of modules in a model.
MODEL_PARTS = ('backbone', 'neck', 'head', 'data_preprocessor', 'extractor')


class Component(NamedTuple):
    """A part of a config from which an object is built.

    Attributes:
        key: its key in the config, with dots.
        settings: the type and the arguments.
        registries: where to look up the type.
        default_type: type if the settings have none.
        further_keys: keys that the class does not take as arguments.
        passes_on: whether a constructor passes ``**kwargs`` on to that of the base class.
    """

    key: str
    settings: Mapping[str, Any]
    registries: Sequence[Registry]
    default_type: Optional[str] = None
    further_keys: Sequence[str] = ()
    passes_on: bool = True


def check_config(cfg: Config) -> None:
    """Check the types, the names of the arguments, and the numbers in a config.

    Raises:
        UsageError: a type or an argument is unknown, or a number is something else.
    """
    scope = cfg.get('default_scope')
    for component in components(cfg):
        if not isinstance(component.settings, Mapping):
            raise UsageError(f'{component.key} must be a dict, got {component.settings!r}.')
        kind = component.settings.get('type', component.default_type)
        if kind is None:
            known = DEFAULT_HOOKS if component.key.startswith('default_hooks') else ()
            name = component.key.rpartition('.')[2]
            raise UsageError(f"{component.key} has no 'type'{suggestion(name, known)}.")
        built = find(kind, component.registries, component.settings.get('_scope_', scope),
                     f'{component.key}.type')
        accepted = parameters_of(built, component.passes_on)
        if built is CheckpointHook:
            accepted = {**inspect.signature(built).parameters,
                        **inspect.signature(Runner.save_checkpoint).parameters}
        if accepted is not None:
            names = [*accepted, *component.further_keys, 'type', '_scope_']
            check_keys(component.key, component.settings, names,
                       f'{getattr(built, "__name__", kind)} takes')
            check_numbers(component.key, component.settings, accepted)
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader') or {}
        parameters = inspect.signature(DataLoader).parameters
        check_keys(f'{split}_dataloader', loader, [*parameters, *DATALOADER_KEYS],
                   'a DataLoader takes')
        check_numbers(f'{split}_dataloader', loader, parameters)
    check_keys('env_cfg', cfg.get('env_cfg') or {}, ENVIRONMENT_KEYS, 'MMEngine takes')
    check_keys('randomness', cfg.get('randomness') or {},
               inspect.signature(Runner.set_randomness).parameters, 'MMEngine takes')
    if cfg.get('optim_wrapper'):
        check_wrapper(cfg.optim_wrapper)


def check_wrapper(wrapper: Mapping[str, Any]) -> None:
    """Check the settings of an optimizer wrapper that MMEngine reads only in training, or ignores.

    Raises:
        UsageError: one is unknown.
    """
    clip_grad = wrapper.get('clip_grad') or {}
    by_value = isinstance(clip_grad, Mapping) and clip_grad.get('type') == 'value'
    clip = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
    check_keys('optim_wrapper.clip_grad', clip_grad, [*inspect.signature(clip).parameters, 'type'],
               f'torch.nn.utils.{clip.__name__} takes')
    if wrapper.get('constructor', DEFAULT_CONSTRUCTOR) == DEFAULT_CONSTRUCTOR:
        paramwise = wrapper.get('paramwise_cfg') or {}
        check_keys('optim_wrapper.paramwise_cfg', paramwise, PARAMWISE_KEYS,
                   f'{DEFAULT_CONSTRUCTOR} takes')
        custom = paramwise.get('custom_keys') or {}
        key = 'optim_wrapper.paramwise_cfg.custom_keys'
        check_keys(key, custom, custom, '')
        for name, settings in custom.items():
            check_keys(f'{key}.{name}', settings, settings, '')
            for ignored in settings.keys() - {'lr_mult', 'decay_mult'}:
                # Some configs of the libraries have such keys.
                warnings.warn(f'{key}.{name}.{ignored} has no effect; lr_mult and decay_mult have.',
                              stacklevel=2)


def check_sections(cfg: Config) -> None:
    """Check that the sections of a config are dicts, and that its data loaders have a dataset.

    Raises:
        UsageError: one is something else.
    """
    loaders = [f'{split}_dataloader' for split in SPLITS]
    for name in ('model', 'optim_wrapper', *loaders, *SECTIONS):
        section = cfg.get(name)
        if section and not isinstance(section, Mapping):
            raise UsageError(f'{name} must be a dict, got {section!r}.')
        if section and name in loaders and not isinstance(section.get('dataset'), Mapping):
            raise UsageError(f'{name}.dataset must be a dict, got {section.get("dataset")!r}.')


def check_parts(cfg: Config, splits: Sequence[str]) -> None:
    """Check that a config has what a run on the given splits needs.

    Raises:
        UsageError: a part is missing.
    """
    parts = [name for split in splits for name in (
        f'{split}_dataloader', f'{split}_cfg',
        'optim_wrapper' if split == 'train' else f'{split}_evaluator')]
    for part in ('model', *parts):
        if not cfg.get(part):
            raise UsageError(f'The config {cfg.filename} has no {part}; name a config that has '
                             f'{", ".join(parts)}.')


def components(cfg: Config) -> Iterator[Component]:
    """Yield the parts of a config that MMEngine's runner builds."""
    if cfg.get('model'):
        yield from model_components('model', cfg.model)
    for split in SPLITS:
        loop = cfg.get(f'{split}_cfg')
        if loop:
            by_epoch = isinstance(loop, Mapping) and loop.get('by_epoch', True)
            default = LOOP_TYPES.get(
                split, 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
            yield Component(f'{split}_cfg', loop, [LOOPS], default, ('by_epoch',))
        loader = cfg.get(f'{split}_dataloader')
        if loader:
            for name in ('sampler', 'batch_sampler'):
                if loader.get(name):
                    yield Component(f'{split}_dataloader.{name}', loader[name], [DATA_SAMPLERS])
            yield from dataset_components(f'{split}_dataloader.dataset', loader.get('dataset'))
        for key, evaluator in numbered(f'{split}_evaluator', cfg.get(f'{split}_evaluator')):
            yield Component(key, evaluator, [METRICS, EVALUATOR], 'Evaluator')
    if cfg.get('optim_wrapper'):
        wrapper = cfg.optim_wrapper
        yield Component('optim_wrapper', wrapper, [OPTIM_WRAPPERS], 'OptimWrapper', WRAPPER_KEYS)
        if isinstance(wrapper, Mapping) and wrapper.get('optimizer'):
            yield Component('optim_wrapper.optimizer', wrapper['optimizer'], [OPTIMIZERS])
    for key, scheduler in numbered('param_scheduler', cfg.get('param_scheduler')):
        yield Component(key, scheduler, [PARAM_SCHEDULERS], None, SCHEDULER_KEYS)
    for name, hook in (cfg.get('default_hooks') or {}).items():
        if hook is not None:
            yield Component(f'default_hooks.{name}', hook, [HOOKS], DEFAULT_HOOKS.get(name),
                            HOOK_KEYS)
    for key, hook in numbered('custom_hooks', cfg.get('custom_hooks')):
        yield Component(key, hook, [HOOKS], None, HOOK_KEYS)
    if cfg.get('visualizer'):
        yield Component('visualizer', cfg.visualizer, [VISUALIZERS], 'Visualizer')
        backends = cfg.visualizer.get('vis_backends') or []
        for key, backend in numbered('visualizer.vis_backends', backends):
            yield Component(key, backend, [VISBACKENDS])
    if cfg.get('log_processor'):
        yield Component('log_processor', cfg.log_processor, [LOG_PROCESSORS], 'LogProcessor')


def numbered(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a list with their keys, or a single element."""
    if isinstance(node, (list, tuple)):
        for index, each in enumerate(node):
            yield f'{key}.{index}', each
    elif node is not None:
        yield key, node


def dataset_components(key: str, dataset: Any) -> Iterator[Component]:
    """Yield a dataset, the datasets that it wraps, and their transforms."""
    yield Component(key, dataset, [DATASETS])
    if isinstance(dataset, Mapping):
        for name in ('dataset', 'datasets'):
            for each_key, each in numbered(f'{key}.{name}', dataset.get(name)):
                yield from dataset_components(each_key, each)
        for each_key, each in numbered(f'{key}.pipeline', dataset.get('pipeline')):
            yield from transform_components(each_key, each)


def transform_components(key: str, transform: Any) -> Iterator[Component]:
    """Yield a transform and the transforms that it wraps."""
    yield Component(key, transform, [TRANSFORMS])
    # Those of Albu are of another library.
    has_own = isinstance(transform, Mapping) and transform.get('type') != 'Albu'
    wrapped = transform.get('transforms') if has_own else None
    for each_key, each in flattened(f'{key}.transforms', wrapped):
        yield from transform_components(each_key, each)


def flattened(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a nested list with their keys."""
    if isinstance(node, (list, tuple)):
        for index, each in enumerate(node):
            yield from flattened(f'{key}.{index}', each)
    elif node is not None:
        yield key, node


def model_components(key: str, node: Any) -> Iterator[Component]:
    """Yield a model and its backbone, neck and heads.

    Smaller modules, and parts without a type, are left to the constructors of these: their types
    are not always registered, and their keys not always arguments.
    """
    for each_key, each in flattened(key, node):
        if isinstance(each, Mapping) and 'type' in each:
            yield Component(each_key, each, [MODELS], passes_on=False)
            for name, child in each.items():
                if name.endswith(MODEL_PARTS) and child is not None:
                    yield from model_components(f'{each_key}.{name}', child)


def find(kind: Union[str, Callable], registries: Sequence[Registry], scope: Optional[str],
         key: str) -> Callable:
    """Find a type in the first of the registries that has it.

    Raises:
        UsageError: none has it.
    """
    if callable(kind):
        return kind
    if not isinstance(kind, str):
        raise UsageError(f'{key} must be the name of a class, got {kind!r}.')
    names: set[str] = set()
    for registry in registries:
        with registry.switch_scope_and_registry(scope) as switched:
            found = switched.get(kind)
            if found is not None:
                return found
            level: Optional[Registry] = switched
            while level is not None:
                names |= set(level.module_dict)
                level = level.parent
    raise UsageError(f'{key}={kind!r}: there is no {registries[0].name} of this name'
                     f'{suggestion(kind, names)}; check the spelling, or import the module that '
                     'registers it with custom_imports.')


def parameters_of(built: Callable,
                  passes_on: bool = True) -> Optional[dict[str, inspect.Parameter]]:
    """Return the keyword arguments of a class or a function, or None if they are not known.

    Where a constructor takes ``**kwargs``, the arguments of the next class in the method resolution
    order are added, or those of all classes if there are several base classes, which a constructor
    may call in any order. If no constructor is left, or one ignores ``**kwargs``, the arguments are
    not known.

    Args:
        built: the class or function.
        passes_on: whether ``**kwargs`` are passed on to the next class; otherwise, the arguments
            of a constructor that takes them are not known.
    """
    if not inspect.isclass(built):
        parameters = inspect.signature(built).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return None if takes_any else dict(parameters)
    found: dict[str, inspect.Parameter] = {}
    is_known = has_branches = False
    for owner in built.__mro__[:-1]:
        has_branches = has_branches or len(owner.__bases__) > 1
        if '__init__' not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters
        rest = [name for name, each in parameters.items() if each.kind is each.VAR_KEYWORD]
        is_known = not rest
        if (is_known and not found) or not passes_on:
            return dict(parameters) if is_known else None
        # Some constructors ignore other arguments, which then must remain allowed.
        if rest and inspect.getsource(owner.__init__).count(f'**{rest[0]}') < 2:
            return None
        found = {**parameters, **found}
        if is_known and not has_branches:
            break
    return found if is_known else None


def check_keys(key: str, settings: Mapping[str, Any], accepted: Collection[str],
               taker: str) -> None:
    """Check the keys of settings.

    Raises:
        UsageError: a key is unknown, or the settings are not a dict.
    """
    if not isinstance(settings, Mapping):
        raise UsageError(f'{key} must be a dict, got {settings!r}.')
    for name in settings:
        if name not in accepted:
            hidden = {'self', 'args', 'kwargs', 'type', '_scope_'}
            listed = ', '.join(sorted(set(accepted) - hidden))
            raise UsageError(f'{key}.{name} is unknown{suggestion(name, accepted)}: {taker} '
                             f'{listed}.')


def check_numbers(key: str, settings: Mapping[str, Any],
                  parameters: Mapping[str, inspect.Parameter]) -> None:
    """Check that no argument that is annotated as a number is a string.

    Raises:
        UsageError: one is.
    """
    for name, value in settings.items():
        number = number_type(parameters[name].annotation) if name in parameters else None
        if number and isinstance(value, str):
            raise UsageError(f'{key}.{name} must be of type {number}, got {value!r}.')


def number_type(annotation: Any) -> Optional[str]:
    """Name the type of an argument that must be a number, or may also be None; otherwise None."""
    if isinstance(annotation, str):
        kinds = re.sub(r'^Optional\[(.*)\]$', r'\1', annotation).split(' | ')
    else:
        kinds = [getattr(kind, '__name__', '') for kind in get_args(annotation) or (annotation,)]
    numbers = [kind for kind in kinds if kind in ('int', 'float', 'bool')]
    return ' or '.join(numbers) if numbers and 'str' not in kinds else None


def check_option_names(options: Mapping[str, Any], cfg: Config) -> None:
    """Check that ``--cfg-options`` change settings that the config or MMEngine has.

    Raises:
        UsageError: the first part of a key is unknown.
    """
    known = {*cfg, *TOP_LEVEL_KEYS, *inspect.signature(Runner).parameters}
    for option in options:
        name = option.partition('.')[0]
        if name not in known:
            raise UsageError(f'--cfg-options {option}: neither the config nor MMEngine has a '
                             f'setting {name}{suggestion(name, known)}.')


def warn_of_misspelt_settings(cfg: Config) -> None:
    """Warn of variables at the top level of a config that look like misspelt settings.

    A config may have variables of its own, which MMEngine ignores.
    """
    known = {*TOP_LEVEL_KEYS, *inspect.signature(Runner).parameters}
    for name in cfg:
        if name not in known and get_close_matches(name, known, 1, cutoff=0.93):
            warnings.warn(f'The setting {name} of the config has no effect'
                          f'{suggestion(name, known)}.', stacklevel=2)
