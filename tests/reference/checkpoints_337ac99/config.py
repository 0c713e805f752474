"""A run of a few kB: 24 iterations of 2 packs, from the data folder `corpus` of the current directory."""

from torch.optim import AdamW

from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.engine import CosineAnnealingLR, OptimWrapper
from xtuner.model import from_scratch
from xtuner.train.hooks import CheckpointHook, DistSamplerSeedHook, LoggerHook, ParamSchedulerHook

accumulative_counts = 2
max_epochs = 2
states = "fp32"
model = dict(
    type=from_scratch,
    vocab_size=400,
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
dataset = dict(type=load_intern_repo_tokenized_dataset, folder="corpus")
train_dataloader = dict(
    dataset=dict(type=build_packed_dataset, dataset_cfg=dataset, packed_length=32, seed=1024),
    sampler=dict(type=InternRepoSampler, shuffle=True, seed=1024),
)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    clip_grad=dict(max_norm=1),
    accumulative_counts=accumulative_counts,
    states=states,
)
param_scheduler = [
    dict(type=CosineAnnealingLR, eta_min=1e-3, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, save_optimizer=True, by_epoch=False, interval=5),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
randomness = dict(seed=0)
