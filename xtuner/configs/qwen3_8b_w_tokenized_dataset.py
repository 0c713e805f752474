"""Qwen3-8B on data tokenized by InternEvo's tools, in packs of 32,768 tokens."""

from torch.optim import AdamW

from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.tokenizer import load_tokenizer
from xtuner.engine import CosineAnnealingLR, LinearLR, OptimWrapper
from xtuner.model import from_pretrained
from xtuner.train.hooks import (
    CheckpointHook,
    DatasetInfoHook,
    DistSamplerSeedHook,
    EvaluateChatHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    ThroughputHook,
)

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model: a folder, or a hub id
pretrained_model_name_or_path = "Qwen/Qwen3-8B-Base"
use_varlen_attn = True  # attention stays within documents

# Data: a folder of .bin and .bin.meta files, at any depth
dataset_folder = "/path/to/your/dataset"
val_folder = None  # held-out data in the same format; None: no validation
data_order_path = None  # written by get_data_order.py; None: files sorted by path
learn_zero = False  # True: also learn id 0, which is "!" in this vocabulary
prompt_template = PROMPT_TEMPLATE.tokenizer  # for the samples below; tokenizer: the one in its folder
max_length = 32768  # tokens per pack
pack_to_max_length = True

# Parallel
sequence_parallel_size = 1

# Scheduler & Optimizer
batch_size = 1  # packs per device
accumulative_counts = 1  # packs per device and optimizer step
dataloader_num_workers = 0  # 0: a thread prepares packs
max_epochs = 1
optim_type = AdamW
lr = 4e-5
betas = (0.9, 0.95)
weight_decay = 0.01
max_norm = 1  # gradients are clipped to this norm
states = "fp32"  # precision of AdamW's masters and moments; "bf16", "8bit" need less memory
warm_up_ratio = 0.025  # of all iterations

# Save
save_steps = 500  # iterations (optimizer steps)
save_total_limit = 2  # checkpoints to keep, -1 for all
save_optimizer = True  # False: weights only, smaller, cannot be resumed

# Samples while training
val_interval = 500  # iterations between losses on val_folder
evaluation_freq = 500  # iterations
SYSTEM = ""
evaluation_inputs = ["请介绍一下上海的历史。", "What makes a good scientific question?"]

#######################################################################
#                      PART 2  Model & Tokenizer                      #
#######################################################################
tokenizer = dict(type=load_tokenizer, name_or_path=pretrained_model_name_or_path)

model = dict(
    type=from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    use_varlen_attn=use_varlen_attn,
    activation_checkpointing=True,
    # adapter=dict(type="xtuner.model.lora", rank=16, alpha=32),  # LoRA: low-rank terms alone are trained
    # frozen_weights="nf4",  # with an adapter: the matrices under it in 4 bits (QLoRA, docs/en/lora.md)
)

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
# Several sources: from xtuner.data import mixture; dataset_cfg=dict(type=mixture, sources=[
#     dict(type=load_intern_repo_tokenized_dataset, folder="…", weight=0.7), dict(…, weight=0.3, max_repeats=4)])
train_dataset = dict(
    type=build_packed_dataset,
    dataset_cfg=dict(
        type=load_intern_repo_tokenized_dataset,
        data_order_path=data_order_path,
        folder=dataset_folder,
        min_length=0,
        file_type=".bin",
        learn_zero=learn_zero,
    ),
    packed_length=max_length,
    seed=1024,
    # packing="whole",  # documents are not cut at the ends of packs, which have padding instead
)

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    balance=1,  # assign packs to ranks by attention cost: 1 in each iteration, 16 over 16 iterations, 0 never
    dataset=train_dataset,
    sampler=dict(type=InternRepoSampler, shuffle=True, seed=1024),
)

val_dataset = (
    dict(type=load_intern_repo_tokenized_dataset, folder=val_folder, learn_zero=learn_zero) if val_folder else None
)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    # optimizer=dict(type="xtuner.engine.Muon", lr=0.02, adamw=dict(lr=lr, betas=betas)),  # or Muon for matrices
    clip_grad=dict(max_norm=max_norm),
    accumulative_counts=accumulative_counts,
    states=states,
    dtype="auto",  # of the computation: bf16 on GPUs, fp32 on CPUs; for weights and moments see states
)

# the rate rises from lr / 40 during the warm-up, then falls along half a cosine to 0.15 lr
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1 / 40,
        by_epoch=True,
        begin=0,
        end=warm_up_ratio * max_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=lr * 0.15,
        by_epoch=True,
        begin=warm_up_ratio * max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
# instead: a warm-up, the full rate, and a decay over the last tenth
# param_scheduler = dict(
#     type="xtuner.engine.WarmupStableDecayLR", unit="epochs", warmup=warm_up_ratio * max_epochs, decay=0.1 * max_epochs
# )

train_cfg = dict(max_epochs=max_epochs)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook,
        save_optimizer=save_optimizer,
        by_epoch=False,
        interval=save_steps,
        max_keep_ckpts=save_total_limit,
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)

custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=ThroughputHook),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        every_n_iters=evaluation_freq,
        evaluation_inputs=evaluation_inputs,
        system=SYSTEM,
        prompt_template=prompt_template,
    ),
]

log_level = "INFO"
load_from = None  # weights to start from: a Hugging Face folder or an iter_N.pth of another run
resume = False  # True: continue from the newest checkpoint of the work dir
randomness = dict(seed=0, deterministic=False)
