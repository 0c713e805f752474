# Names that no dict(type=…) shows: put in by assignment, update, append, a loop, a comprehension and a variable.
from mmengine.hooks import CheckpointHook as Save
from torch.optim import AdamW
from xtuner.dataset.intern_repo import build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.utils import PROMPT_TEMPLATE

pretrained_model_name_or_path = 'internlm/internlm2-7b'
dataset_folder = '/path/to/tokens'
max_length: int = 32768
accumulative_counts: int = 1
dataloader_num_workers, max_epochs = 0, 1
lr = 4e-5
warm_up_ratio = 0.025
save_steps = 500
evaluation_freq = 500
optimizer_type = 'AdamW' if AdamW.__name__ else None
scope, wrapper = 'mmengine', 'AmpOptimWrapper'

tokenizer = dict(pretrained_model_name_or_path=pretrained_model_name_or_path)
tokenizer['type'] = 'transformers.' + 'AutoTokenizer.from_pretrained'
model: dict = dict(llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path, torch_dtype='bfloat16'))
model['llm'].update(type='transformers.AutoModelForCausalLM.from_pretrained')
model.update(type='xtuner.model.sft.SupervisedFinetune', use_varlen_attn=True)

train_dataset = dict(packed_length=max_length, seed=1024)
train_dataset['type'] = build_packed_dataset
train_dataset['dataset_cfg'] = dict(folder=dataset_folder)
train_dataset['dataset_cfg']['type'] = load_intern_repo_tokenized_dataset
train_dataloader = dict(batch_size=1, num_workers=dataloader_num_workers, dataset=train_dataset)
train_dataloader['sampler'] = {**dict(shuffle=True), 'type': 'xtuner.dataset.samplers.InternlmRepoSampler'}

optim_wrapper = dict(optimizer=dict(lr=lr, betas=(0.9, 0.95), weight_decay=0.01), clip_grad=dict(max_norm=1))
optim_wrapper['optimizer']['type'] = optimizer_type
optim_wrapper |= dict(type=f'{scope}.{wrapper}', accumulative_counts=accumulative_counts)

warm_up = warm_up_ratio * max_epochs
param_scheduler = [
    dict(by_epoch=True, begin=begin, end=end, convert_to_iter_based=True, **more)
    for begin, end, more in ((0, warm_up, dict(start_factor=1 / 40)), (warm_up, max_epochs, dict(eta_min=lr * 0.15)))
]
param_scheduler[0]['type'] = 'LinearLR'
param_scheduler[-1]['type'] = 'mmengine.optim.scheduler.lr_scheduler.CosineAnnealingLR'
train_cfg = {'max_epochs': max_epochs}
train_cfg['type'] = 'EpochBasedTrainLoop'

default_hooks = {key: dict(type=name) for key, name in (
    ('timer', 'IterTimerHook'), ('logger', 'LoggerHook'), ('sampler_seed', 'mmengine.hooks.DistSamplerSeedHook'),
    ('param_scheduler', 'ParamSchedulerHook'), ('checkpoint', Save))}
default_hooks['logger'].update(interval=1)
default_hooks['checkpoint'].update(by_epoch=False, interval=save_steps, max_keep_ckpts=2)
custom_hooks = []
custom_hooks.append(dict(type='xtuner.engine.EvaluateChatHook', tokenizer=tokenizer, every_n_iters=evaluation_freq,
                         prompt_template=PROMPT_TEMPLATE.internlm2_chat, evaluation_inputs=['Where do rivers begin?']))
for name in ('Throughput', 'VarlenAttnArgsToMessageHub'):
    custom_hooks.insert(0, dict(type=f'xtuner.engine.hooks.{name}Hook'))
