# Names as the old tool wrote them into the config of a work dir: dotted, some by the module that defines them.
SYSTEM = ''
accumulative_counts = 1
dataloader_num_workers = 0
dataset_folder = '/path/to/tokens'
evaluation_freq = 500
launcher = 'none'
lr = 4e-05
max_epochs = 1
max_length = 32768
pretrained_model_name_or_path = 'internlm/internlm2-7b'
save_steps = 500
warm_up_ratio = 0.025
optim_type = 'torch.optim.AdamW'
prompt_template = 'xtuner.utils.PROMPT_TEMPLATE.internlm2_chat'
tokenizer = dict(
    padding_side='right',
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    trust_remote_code=True,
    type='transformers.models.auto.tokenization_auto.AutoTokenizer.from_pretrained')
custom_hooks = [
    dict(
        is_intern_repo_dataset=True,
        tokenizer=tokenizer,
        type='xtuner.engine.DatasetInfoHook'),
    dict(
        evaluation_inputs=['Where do rivers begin?'],
        every_n_iters=evaluation_freq,
        prompt_template=prompt_template,
        system=SYSTEM,
        tokenizer=tokenizer,
        type='xtuner.engine.hooks.evaluate_chat_hook.EvaluateChatHook'),
    dict(type='xtuner.engine.ThroughputHook'),
    dict(type='xtuner.engine.VarlenAttnArgsToMessageHubHook'),
]
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False, interval=save_steps, max_keep_ckpts=2, type='mmengine.hooks.checkpoint_hook.CheckpointHook'),
    logger=dict(interval=1, log_metric_by_epoch=False, type='mmengine.hooks.LoggerHook'),
    param_scheduler=dict(type='mmengine.hooks.ParamSchedulerHook'),
    sampler_seed=dict(type='mmengine.hooks.DistSamplerSeedHook'),
    timer=dict(type='mmengine.hooks.IterTimerHook'))
model = dict(
    llm=dict(
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        trust_remote_code=True,
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    type='xtuner.model.SupervisedFinetune',
    use_varlen_attn=True)
optim_wrapper = dict(
    accumulative_counts=accumulative_counts,
    clip_grad=dict(error_if_nonfinite=False, max_norm=1),
    loss_scale='dynamic',
    optimizer=dict(betas=(0.9, 0.95), lr=lr, type=optim_type, weight_decay=0.01),
    type='mmengine.optim.optimizer.amp_optimizer_wrapper.AmpOptimWrapper')
param_scheduler = [
    dict(
        begin=0,
        by_epoch=True,
        convert_to_iter_based=True,
        end=warm_up_ratio * max_epochs,
        start_factor=0.025,
        type='LinearLR'),
    dict(
        begin=warm_up_ratio * max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
        end=max_epochs,
        eta_min=lr * 0.15,
        type='mmengine.optim.CosineAnnealingLR'),
]
train_cfg = dict(max_epochs=max_epochs, type='xtuner.engine.runner.TrainLoop')
train_dataloader = dict(
    batch_sampler=dict(batch_size=1, drop_last=True, type='torch.utils.data.BatchSampler'),
    batch_size=1,
    collate_fn=dict(type='xtuner.dataset.collate_fns.default_collate_fn', use_varlen_attn=True),
    dataset=dict(
        dataset_cfg=dict(
            data_order_path=None,
            file_type='.bin',
            folder=dataset_folder,
            min_length=0,
            type='xtuner.dataset.intern_repo.load_intern_repo_tokenized_dataset'),
        packed_length=max_length,
        seed=1024,
        type='xtuner.dataset.intern_repo.build_packed_dataset'),
    num_workers=dataloader_num_workers,
    sampler=dict(seed=1024, shuffle=True, type='xtuner.dataset.samplers.InternRepoSampler'))
visualizer = None
