# Every object by its name in mmengine's registries, as mmengine's own tutorials write configs; what they leave to the
# runner is left to it here.
pretrained_model_name_or_path = 'internlm/internlm2-7b'
dataset_folder = '/path/to/tokens'
max_length = 32768
accumulative_counts = 1
dataloader_num_workers = 0
max_epochs = 1
lr = 4e-5
max_norm = 1
warm_up_ratio = 0.025
save_steps = 500
save_total_limit = 2
evaluation_freq = 500
default_scope = 'mmengine'
runner_type = 'Runner'

tokenizer = dict(type='AutoTokenizer.from_pretrained',
                 pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    type='SupervisedFinetune',
    llm=dict(type='AutoModelForCausalLM.from_pretrained',
             pretrained_model_name_or_path=pretrained_model_name_or_path))
train_dataloader = dict(
    batch_size=1,
    num_workers=dataloader_num_workers,
    persistent_workers=False,
    dataset=dict(
        type='build_packed_dataset',
        dataset_cfg=dict(type='load_intern_repo_tokenized_dataset', folder=dataset_folder),
        packed_length=max_length),
    sampler=dict(type='InternRepoSampler', shuffle=True),
    batch_sampler=dict(type='BatchSampler', drop_last=True, batch_size=1),
    collate_fn=dict(type='default_collate_fn', use_varlen_attn=True))
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    clip_grad=dict(max_norm=max_norm),
    accumulative_counts=accumulative_counts)
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 40, end=warm_up_ratio * max_epochs, convert_to_iter_based=True),
    dict(type='mmengine.CosineAnnealingLR', eta_min=lr * 0.15, begin=warm_up_ratio * max_epochs, end=max_epochs,
         convert_to_iter_based=True, _scope_='mmengine'),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1, dynamic_intervals=None)
default_hooks = dict(
    runtime_info=dict(type='RuntimeInfoHook'),
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit))
custom_hooks = [dict(type='EvaluateChatHook', tokenizer=tokenizer, every_n_iters=evaluation_freq,
                     evaluation_inputs='Where do rivers begin?')]
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='Visualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=1, by_epoch=False)
