# Baseline: that of maskrcnn_acmix_swin_t.py, which trains without sharding.
_base_ = './maskrcnn_acmix_swin_t.py'
runner_type = 'FlexibleRunner'
strategy = dict(
    type='ACmixFSDPStrategy',
    model_wrapper=dict(auto_wrap_policy='backbone_block_policy'))
