"""Training and testing on two machines, with Slurm and with FSDP, on CPUs over the loopback."""

import json
import os
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from helpers import ROOT
from helpers.tools import (
    DETECTION,
    FAST,
    SMALL_IMAGES,
    epochs,
    free_port,
    logged,
    logged_metric,
)
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.engine.cli import config_from
from acmix_mm.engine.config import load_config, set_data_root
from acmix_mm.engine.fsdp import ACmixFSDPStrategy, backbone_block_policy
from acmix_mm.engine.runner import train
from acmix_mm.environment import TORCH_VERSION
from acmix_mm.utils.errors import UsageError

FSDP = 'configs/maskrcnn_acmix_swin_t_fsdp.py'
METRICS = [f'coco/{kind}_mAP{size}' for kind in ('bbox', 'segm') for size in ('', '_50', '_s')]
OPTIONS = ['--cfg-options', *FAST, *SMALL_IMAGES, 'randomness.seed=0', *epochs(2)]


@pytest.fixture(scope='module')
def run_on_two_nodes(run_tool):
    """Run a launch script on two nodes with one process each; return what the first prints."""
    def run(*arguments):
        port = free_port()

        def run_node(rank):
            return run_tool(*arguments, NNODES='2', NODE_RANK=str(rank), MASTER_ADDR='127.0.0.1',
                            PORT=port)

        with ThreadPoolExecutor(2) as pool:
            nodes = list(pool.map(run_node, range(2)))
        assert [node.returncode for node in nodes] == [0, 0], nodes[0].stderr + nodes[1].stderr
        return nodes[0].stdout
    return run


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config whose settings for parameters depend on their names and shapes."""
    path = tmp_path_factory.mktemp('config') / 'detector.py'
    path.write_text(f'_base_ = {str(ROOT / DETECTION)!r}\n'
                    'optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0., custom_keys={\n'
                    '    "backbone.stages.2.blocks.1.norm1": dict(lr_mult=0.1)}))\n')
    return path


@pytest.fixture(scope='module')
def two_nodes(config, shapes, run_on_two_nodes, tmp_path_factory):
    """Work directory of a detector that two nodes trained for an epoch, resumed, and validated."""
    folder = tmp_path_factory.mktemp('two_nodes')
    script = ['tools/dist_train.sh', config, 1, '--data-root', shapes, '--work-dir', folder]
    printed = run_on_two_nodes(*script, *OPTIONS, 'train_cfg.max_epochs=1')
    assert 'GPU number: 2' in printed
    # Eight images, in batches of two in each of two processes.
    assert len(logged(folder, 'loss')) == 2
    printed = run_on_two_nodes(*script, '--resume', *OPTIONS)
    assert 'resumed epoch: 1, iter: 2' in printed
    return folder


def test_two_nodes_test_like_one_process(config, two_nodes, shapes, run_tool, run_on_two_nodes,
                                         tmp_path):
    def metrics(name):
        return [logged_metric(tmp_path / name, key) for key in METRICS]

    checkpoint = two_nodes / 'epoch_2.pth'
    given = ['--data-root', shapes, '--work-dir']
    run_on_two_nodes('tools/dist_test.sh', config, checkpoint, 1, *given, tmp_path / 'two',
                     *OPTIONS)
    done = run_tool('tools/test.py', config, checkpoint, *given, tmp_path / 'one', *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert max(metrics('one')) > 0
    assert metrics('two') == pytest.approx(metrics('one'))
    validated = [logged(two_nodes, key)[-1] for key in METRICS]
    assert validated == pytest.approx(metrics('one'))


def assert_equal(found, expected):
    """Two checkpoints have the same weights, and the same settings of the optimizer."""
    # After MMEngine's fork has loaded a checkpoint, torch.load refuses its classes again.
    found, expected = (torch.load(path, weights_only=False) for path in (found, expected))
    assert list(found['state_dict']) == list(expected['state_dict'])
    for name, value in expected['state_dict'].items():
        torch.testing.assert_close(found['state_dict'][name], value, rtol=1e-5, atol=1e-6)
    for key in ('lr', 'weight_decay'):
        values = [group[key] for group in expected['optimizer']['param_groups']]
        assert len(set(values)) == 2
        assert [group[key] for group in found['optimizer']['param_groups']] == values


@pytest.mark.skipif(TORCH_VERSION == (2, 1), reason='torch 2.1 has no FSDP on CPUs')
def test_fsdp_trains_like_ddp(config, two_nodes, shapes, run_tool, tmp_path):
    """On the same batches, with a checkpoint in between; the unsharded model loads it."""
    cfg = load_config(FSDP)
    sharded = tmp_path / 'fsdp.py'
    sharded.write_text(f'_base_ = {str(config)!r}\n'
                       f'runner_type = {cfg.runner_type!r}\n'
                       f'strategy = {cfg.strategy.to_dict()!r}\n'
                       'custom_hooks = [dict(type="RateHook", interval=1)]\n')
    script = ['tools/dist_train.sh', sharded, 2, '--data-root', shapes, '--work-dir', tmp_path]
    done = run_tool(*script, *OPTIONS, 'train_cfg.max_epochs=1', PORT=free_port())
    assert done.returncode == 0, done.stderr
    assert_equal(tmp_path / 'epoch_1.pth', two_nodes / 'epoch_1.pth')
    done = run_tool(*script, '--resume', *OPTIONS, PORT=free_port())
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 1, iter: 2' in done.stdout
    assert_equal(tmp_path / 'epoch_2.pth', two_nodes / 'epoch_2.pth')
    for key in METRICS:
        assert logged(tmp_path, key) == pytest.approx(logged(two_nodes, key))

    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    # FSDP names the parameters; an optimizer by itself numbers them.
    assert set(saved['optimizer']['state']) <= set(saved['state_dict'])
    assert saved['meta']['versions']['torch'] == version('torch')
    layer = 'backbone.stages.3.blocks.1.attn.w_msa.rate2'
    assert logged(tmp_path, f'rates/{layer}')[-1] == saved['state_dict'][layer].item()
    build_detector().load_state_dict(saved['state_dict'])


def build_detector():
    cfg = load_config(DETECTION)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def test_policy_shards_the_blocks_of_the_backbone():
    model = build_detector()
    sharded = [name for name, module in model.named_modules()
               if backbone_block_policy(module, recurse=False, nonwrapped_numel=0)]
    assert sharded == [f'backbone.stages.{stage}.blocks.{block}'
                       for stage in range(4) for block in range(2)]
    assert backbone_block_policy(model, recurse=True, nonwrapped_numel=0)


def test_fsdp_needs_a_distributed_job(tmp_path):
    with pytest.raises(UsageError, match=r'tools/dist_train\.sh'):
        ACmixFSDPStrategy(work_dir=str(tmp_path), env_kwargs=dict(launcher='none'))


def test_fsdp_does_not_clip_gradients():
    strategy = ACmixFSDPStrategy.__new__(ACmixFSDPStrategy)
    with pytest.raises(UsageError, match='clip_grad=None'):
        strategy.build_optim_wrapper(dict(
            optimizer=dict(type='SGD', lr=1.), clip_grad=dict(max_norm=1.)), build_detector())


SRUN = '''
import argparse, json, os, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ('partition', 'job-name', 'gres', 'ntasks', 'ntasks-per-node', 'cpus-per-task',
             'kill-on-bad-exit', 'qos'):
    parser.add_argument(f'--{name}')
parser.add_argument('--exclusive', action='store_true')
parser.add_argument('command', nargs=argparse.REMAINDER)
args = parser.parse_args()
with open(os.environ['SRUN_RECORD'], 'w') as file:
    json.dump(vars(args), file)
tasks, per_node = int(args.ntasks), int(args.ntasks_per_node)
variables = dict(SLURM_NTASKS=args.ntasks, SLURM_NODELIST=f'node[1-{tasks // per_node}]')
running = [subprocess.Popen(args.command, env=dict(
    os.environ, **variables, SLURM_PROCID=str(task), SLURM_LOCALID=str(task % per_node)))
    for task in range(tasks)]
sys.exit(max(each.wait() for each in running))
'''
SCONTROL = '''
import sys
assert sys.argv[1:] in (['show', 'hostnames', f'node[1-{nodes}]'] for nodes in (1, 2)), sys.argv
print('127.0.0.1\\nnode2')
'''


@pytest.fixture
def run_slurm(run_tool, tmp_path):
    """Run a script where ``srun`` starts the tasks on this machine, with Slurm's variables.

    Return what it prints, and the arguments of ``srun``.
    """
    for name, source in (('srun', SRUN), ('scontrol', SCONTROL)):
        program = tmp_path / name
        program.write_text(f'#!{sys.executable} -I\n{source}')
        program.chmod(0o755)

    def run(*arguments, **environment):
        record = tmp_path / 'srun.json'
        python = os.path.dirname(sys.executable)
        done = run_tool(*arguments, **environment, MASTER_PORT=free_port(),
                        SRUN_RECORD=str(record),
                        PATH=os.pathsep.join([str(tmp_path), python, os.environ['PATH']]))
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(record.read_text())
    return run


def test_slurm_trains_and_tests(shapes, run_slurm, tmp_path):
    folder = tmp_path / 'work dir'
    printed, srun = run_slurm(
        'tools/slurm_train.sh', 'gpu', 'acmix', DETECTION, folder, '--data-root', shapes, *OPTIONS,
        *epochs(1), GPUS='2', GPUS_PER_NODE='1', SRUN_ARGS='--qos=low --exclusive')
    assert 'Distributed launcher: slurm' in printed
    assert 'GPU number: 2' in printed
    assert len(logged(folder, 'loss')) == 2
    command = srun.pop('command')
    assert command[:5] == ['python', '-u', 'tools/train.py', DETECTION, '--work-dir']
    assert srun == {
        'partition': 'gpu', 'job_name': 'acmix', 'gres': 'gpu:1', 'ntasks': '2',
        'ntasks_per_node': '1', 'cpus_per_task': '5', 'kill_on_bad_exit': '1', 'qos': 'low',
        'exclusive': True}

    printed, srun = run_slurm(
        'tools/slurm_test.sh', 'gpu', 'acmix', DETECTION, folder / 'epoch_1.pth', '--data-root',
        shapes, '--work-dir', tmp_path / 'test', *OPTIONS, GPUS='1', CPUS_PER_TASK='2')
    assert srun['command'][2:5] == ['tools/test.py', DETECTION, str(folder / 'epoch_1.pth')]
    assert (srun['gres'], srun['ntasks'], srun['ntasks_per_node'], srun['cpus_per_task']) == (
        'gpu:1', '1', '1', '2')
    for key in METRICS:
        assert logged_metric(tmp_path / 'test', key) == pytest.approx(logged(folder, key)[-1])


def test_slurm_asks_for_eight_gpus_by_default(run_tool, tmp_path):
    program = tmp_path / 'srun'
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    for gpus, per_node in (({}, 8), (dict(GPUS='16'), 8), (dict(GPUS='4'), 4)):
        done = run_tool('tools/slurm_test.sh', 'gpu', 'acmix', 'c.py', 'c.pth', **gpus, PATH=path)
        assert f'--gres=gpu:{per_node} ' in done.stdout
        assert f'--ntasks={gpus.get("GPUS", 8)} --ntasks-per-node={per_node} ' in done.stdout


@pytest.mark.parametrize(('script', 'usage'), [
    ('dist_train.sh', 'CONFIG GPUS '), ('dist_test.sh', 'CONFIG CHECKPOINT GPUS '),
    ('slurm_train.sh', 'PARTITION JOB_NAME CONFIG WORK_DIR '),
    ('slurm_test.sh', 'PARTITION JOB_NAME CONFIG CHECKPOINT ')])
def test_scripts_print_their_usage(script, usage, run_tool):
    done = run_tool(f'tools/{script}', 'a')
    assert done.returncode == 2
    assert f'usage: tools/{script} {usage}' in done.stderr


def test_only_one_task_per_node_prints_messages(monkeypatch):
    """``run_tool`` of the command line prints them where LOCAL_RANK is 0."""
    monkeypatch.setenv('SLURM_LOCALID', '3')
    # Set first, so that it is restored although config_from sets it.
    monkeypatch.setenv('LOCAL_RANK', '')
    monkeypatch.delenv('LOCAL_RANK')
    config_from(Namespace(config=DETECTION, cfg_options=None, launcher='slurm', local_rank=0,
                          work_dir=None, data_root=None, classes=None))
    assert os.environ['LOCAL_RANK'] == '3'


def test_slurm_launcher_needs_a_slurm_job(shapes):
    cfg = load_config(DETECTION)
    set_data_root(cfg, str(shapes))
    cfg.launcher = 'slurm'
    with pytest.raises(UsageError, match=r'in a Slurm job only: use tools/slurm_train\.sh'):
        train(cfg)
