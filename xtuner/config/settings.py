"""The settings of a config, one declaration each; those of older tools alone are in compat/settings.py.

A setting is what a dotted path of a config leads to. What builds it (`dict(type=…)`) has the same default.
"""

from typing import Any, Literal

from xtuner.config.schema import HARMLESS, IMPOSSIBLE, NEEDED, NOTHING, RESULT, Only, Rule, Schema, Setting

INT32 = 2**31  # ids and borders of documents have 32 bits
LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
MOST_EPOCHS = 1_000_000


def at_least(least: int) -> tuple[Rule, ...]:
    return (Rule(lambda v: v >= least, f"is not at least {least}", f"≥ {least}"),)


def one_of(*names: str, why: str = "") -> tuple[Rule, ...]:
    return (Rule(lambda v: v in names, f"is not one of {', '.join(names)}", ", ".join(names), why),)


ABOVE_0 = (Rule(lambda v: v > 0, "is not above 0", "> 0"),)
SIZE = (
    Rule(lambda v: v > 0, "is not a whole number above 0", "> 0"),
    Rule(lambda v: v < INT32, "is not below 2^31"),
)
SEED = (Rule(lambda v: 0 <= v < 2**32, "is not in 0 … 2^32 - 1", "0 … 2^32 - 1"),)
NUMBER = "a whole number above 0"
KEPT = (Rule(lambda v: v == -1 or v >= 1, "is not -1 (all) or at least 1", "-1 or ≥ 1"),)
SAVED = (Rule(lambda v: v == -1 or v >= 1, "is not -1 (only at the end) or at least 1", "-1 or ≥ 1"),)
PACK = (Rule(lambda v: 1 <= v < INT32, "is not at least 1 and below 2^31", "1 … 2^31 - 1"),)
EPOCHS = (
    Rule(lambda v: v >= 1, "is not an integer of at least 1", "≥ 1"),
    Rule(lambda v: v <= MOST_EPOCHS, f"is above {MOST_EPOCHS:,}", why="so many are taken for a slip of the pen"),
)
LEVEL = (Rule(lambda v: v.upper() in LEVELS, f"is not one of {', '.join(LEVELS)}", ", ".join(LEVELS)),)
PATH = (Rule(lambda v: v != "", "is not a folder or None"),)
RESUME = (Rule(lambda v: v != "", "is not True, False or a checkpoint"),)

_DATA, _FILES = "train_dataloader.dataset", "train_dataloader.dataset.dataset_cfg"
_ONE_PACK = Only((1,), "a batch is one pack; a longer max_length or accumulative_counts does the same", "set it to 1")
_CALLED = "the loader makes batches of packs itself"

OWN_SETTINGS = (
    # The model
    Setting("model", dict, NEEDED, "the model: `from_pretrained`, or `from_scratch` for random weights",
            "模型：`from_pretrained`；随机权重用 `from_scratch`", RESULT, built=True),
    Setting("model.pretrained_model_name_or_path", str, NEEDED, "a folder with config.json and weights, or a hub id",
            "含 config.json 与权重的目录，或 hub id", HARMLESS, of="from_pretrained"),
    Setting("model.use_varlen_attn", bool, True, "documents of a pack do not see each other",
            "同一 pack 内的文档互不可见"),
    Setting("model.activation_checkpointing", bool, False,
            "recompute in the backward what memory cannot hold; on CPUs all but each block's input",
            "反向时重算显存放不下的部分；CPU 上除各层输入外全部重算", HARMLESS),
    Setting("model.attention", str | None, None,
            "a backend by name (flash4, varlen, cudnn, flex, loop); None: the fastest that runs",
            "指定注意力后端（flash4、varlen、cudnn、flex、loop）；None：可用的最快者", HARMLESS),
    Setting("model.products", Literal["own", "fp8"], "own",
            "what blocks multiply with their weights in while they learn", "训练时各层与权重相乘所用的数值格式"),
    Setting("model.family", str, "internlm2", "the family whose config.json the fields below are of",
            "下列字段所属的模型家族", of="from_scratch"),
    Setting("model.seed", int | None, None, "of random weights; None: `randomness.seed`",
            "随机权重的种子；None：`randomness.seed`", rules=SEED, of="from_scratch"),
    *(Setting(f"model.{name}", int | None, None, text, zh, IMPOSSIBLE, SIZE, "from_scratch", words=NUMBER)
      for name, text, zh in (
          ("vocab_size", "rows of the embedding", "词表大小"), ("hidden_size", "width of the model", "隐藏维度"),
          ("intermediate_size", "width of the feed-forward layer", "前馈层维度"),
          ("num_hidden_layers", "blocks", "层数"), ("num_attention_heads", "query heads", "查询头数"),
          ("num_key_value_heads", "key-value heads; None: as many as query heads", "键值头数；None：与查询头数相同"),
          ("head_dim", "width of a head; None: hidden_size ÷ heads", "每个头的维度；None：hidden_size ÷ 头数"))),
    Setting("model.max_position_embeddings", int | None, 2048, "longest text by config.json",
            "config.json 所写的最大长度", rules=SIZE, of="from_scratch", words="a whole number above 0"),
    Setting("model.bias", bool, False, "attention has biases", "注意力层带偏置", IMPOSSIBLE, of="from_scratch"),
    Setting("model.rope_theta", float, 1e6, "base of the rotary positions", "旋转位置编码的底数", rules=ABOVE_0),
    Setting("model.rms_norm_eps", float, 1e-5, "added under the root of norms", "归一化的 epsilon",
            rules=at_least(0)),
    Setting("model.initializer_range", float, 0.02, "standard deviation of random weights", "随机权重的标准差",
            rules=at_least(0)),
    Setting("tokenizer", dict, None, "`load_tokenizer`: of samples and of the export",
            "`load_tokenizer`：采样与导出所用", NOTHING, built=True),
    Setting("load_from", str | None, None,
            "weights to start from: a Hugging Face folder or an iter_N.pth of another run",
            "起始权重：Hugging Face 目录，或其他训练的 iter_N.pth", NOTHING, PATH, words="a folder or None"),
    # Data
    Setting("train_dataloader", dict, NEEDED, "how packs are read", "如何读取 pack", RESULT,
            words="dict(dataset=…, …)"),
    Setting(_DATA, dict, NEEDED, "the packs: `build_packed_dataset`", "pack：`build_packed_dataset`", RESULT,
            built=True),
    Setting(_FILES, dict, NEEDED, "the files: `load_intern_repo_tokenized_dataset`",
            "文件：`load_intern_repo_tokenized_dataset`", RESULT, built=True, of="build_packed_dataset"),
    Setting(f"{_FILES}.folder", str, NEEDED, "holds `.bin` and `.bin.meta`, at any depth; contents are compared",
            "存放 `.bin` 与 `.bin.meta` 的目录，层级不限；比较的是内容", HARMLESS),
    Setting(f"{_FILES}.data_order_path", str | None, None, "the order of files; None: sorted",
            "文件顺序；None：按路径排序", HARMLESS),
    Setting(f"{_FILES}.min_length", int, 0, "documents with fewer tokens are left out",
            "token 数更少的文档不参与训练", rules=at_least(0)),
    Setting(f"{_FILES}.file_type", str, ".bin", "ending of the token files", "token 文件的后缀"),
    Setting(f"{_FILES}.cache_dir", str | None, None, "where indexes are kept; None: beside the data",
            "索引存放处；None：数据旁", HARMLESS),
    Setting(f"{_DATA}.packed_length", int, NEEDED, "tokens of a pack", "一个 pack 的 token 数", rules=PACK),
    Setting(f"{_DATA}.seed", int, 1024, "of the order of documents inside a file", "文件内文档顺序的种子",
            rules=SEED),
    Setting(f"{_DATA}.label_rule", Literal["internevo", "xtuner"], "internevo",
            "targets never cross documents; or \"xtuner\": a plain shift", "目标不跨文档；\"xtuner\" 为简单移位"),
    Setting("train_dataloader.sampler", dict, NEEDED, "the order of packs: `InternRepoSampler`",
            "pack 的顺序：`InternRepoSampler`", RESULT, built=True),
    Setting("train_dataloader.sampler.shuffle", bool, True, "a new permutation each epoch", "每轮重新打乱"),
    Setting("train_dataloader.sampler.seed", int, 1024, "epoch e is drawn from seed + e", "第 e 轮由 seed + e 抽取",
            rules=SEED),
    Setting("train_dataloader.reshuffle", bool, True, "False: every epoch repeats the first one's order",
            "False：每轮都重复第一轮的顺序", RESULT),
    Setting("train_dataloader.num_workers", int, 0, "processes that read; 0: a thread", "读取进程数；0：一个线程",
            HARMLESS, at_least(0)),
    Setting("train_dataloader.balance", int, 1,
            "packs of so many iterations are dealt to ranks by cost; 0: as they come",
            "按计算量在 rank 间分配多少次迭代的 pack；0：按顺序", RESULT, at_least(0), harmless=(None, 0, 1)),
    Setting("train_dataloader.batch_size", int, 1, "always one pack", "始终为一个 pack", only=_ONE_PACK),
    Setting("val_dataset", dict, None, "held-out data, described as `dataset_cfg` is",
            "验证数据，写法同 `dataset_cfg`", NOTHING, built=True),
    Setting("val_interval", int, 500, "iterations between losses on it", "两次验证之间的迭代数", NOTHING,
            at_least(1)),
    # Optimizer and schedule
    Setting("optim_wrapper", dict, NEEDED, "`OptimWrapper`: how an iteration steps",
            "`OptimWrapper`：每次迭代如何更新", RESULT, built=True),
    Setting("optim_wrapper.optimizer", dict, NEEDED, "`torch.optim.AdamW`, or another class of its kind",
            "`torch.optim.AdamW` 或同类优化器", RESULT, built=True),
    Setting("optim_wrapper.optimizer.type", Any, NEEDED, "the optimizer's class", "优化器的类", IMPOSSIBLE),
    Setting("optim_wrapper.optimizer.lr", float, NEEDED, "the highest learning rate", "最高学习率", rules=ABOVE_0),
    Setting("optim_wrapper.optimizer.weight_decay", float, 0.01, "of all parameters (the default is AdamW's)",
            "所有参数的权重衰减（默认值为 AdamW 的）", rules=at_least(0)),
    Setting("optim_wrapper.clip_grad", dict, None, "`dict(max_norm=…)`; None: no clipping",
            "`dict(max_norm=…)`；None：不裁剪"),
    Setting("optim_wrapper.clip_grad.max_norm", float | None, None, "the 2-norm over all parameters",
            "所有参数梯度的 2-范数上限", rules=ABOVE_0),
    Setting("optim_wrapper.accumulative_counts", int, 1,
            "packs each rank takes in an iteration; of all ranks they stay",
            "每个 rank 每次迭代的 pack 数；所有 rank 的总数保持不变", HARMLESS, at_least(1)),
    Setting("optim_wrapper.dtype", str, "auto", "what matrices are multiplied in; auto: bf16 on GPUs, fp32 on CPUs",
            "矩阵乘法的类型；auto：GPU 上 bf16，CPU 上 fp32",
            rules=one_of("auto", "bf16", "fp32", why="fp16 needs loss scaling, which is not built"),
            of="OptimWrapper"),
    Setting("optim_wrapper.states", str, "fp32",
            "how AdamW keeps masters and moments (split: fp32 in less memory on GPUs); not fp32: not with DeepSpeed",
            "AdamW 的主权重与动量（split：GPU 上更省显存的 fp32）；DeepSpeed 只支持 fp32", IMPOSSIBLE,
            one_of("fp32", "split", "bf16", "8bit")),
    Setting("optim_wrapper.sums", str | None, None,
            "sums of gradients that are coarser than those of `states`, in half the memory",
            "比 `states` 更粗的梯度和，显存减半", RESULT, one_of("bf16", "fp32")),
    Setting("optim_wrapper.micro_batch", int | None, None, "most tokens of a micro-batch; None: the fastest",
            "micro-batch 的最大 token 数；None：最快者", HARMLESS, at_least(1)),
    Setting("optim_wrapper.full", str | None, None, "what every rank keeps full over an iteration; None: the fastest",
            "各 rank 在一次迭代中完整保留什么；None：最快者", HARMLESS,
            one_of("all", "weights", "gradients", "blocks")),
    Setting("optim_wrapper.parameter_groups", list, (),
            "learning rates and decay by names of parameters: dict(match=…)",
            "按参数名设置学习率与权重衰减：dict(match=…)"),
    Setting("param_scheduler", list | dict | None, None, "learning rates: a list of schedulers; None: constant",
            "学习率：调度器列表；None：恒定", RESULT, words="a list"),
    Setting("train_cfg", dict, NEEDED, "the length of the run", "训练长度", RESULT, words="dict(max_epochs=…)"),
    Setting("train_cfg.max_epochs", int, NEEDED, "epochs", "训练轮数", RESULT, EPOCHS,
            words="an integer of at least 1"),
    Setting("train_cfg.max_skipped", int, 0, "steps that may be skipped because a loss or gradient is not finite",
            "因损失或梯度非有限而允许跳过的更新数", HARMLESS, at_least(0), words="a whole number of at least 0"),
    Setting("randomness", dict | None, None, "seed and determinism", "种子与确定性", RESULT,
            words="a dict of seed and deterministic"),
    Setting("randomness.seed", int | None, 0, "of random weights (`--seed` has precedence)",
            "随机权重的种子（`--seed` 优先）", RESULT, SEED),
    Setting("randomness.deterministic", bool, False, "the same bits each time on a GPU, more slowly",
            "GPU 上逐位可复现，较慢", HARMLESS),
    # Hooks, logs, checkpoints
    Setting("default_hooks", dict | None, None, "hooks by name", "以名称给出的 hook", RESULT, words="a dict"),
    Setting("default_hooks.timer", dict, None, "`IterTimerHook`: seconds an iteration",
            "`IterTimerHook`：每次迭代的秒数", HARMLESS),
    Setting("default_hooks.logger", dict, None, "`LoggerHook`: log lines and figures", "`LoggerHook`：日志行与指标",
            HARMLESS),
    Setting("default_hooks.checkpoint", dict, None, "`CheckpointHook`", "`CheckpointHook`：检查点", HARMLESS),
    Setting("default_hooks.param_scheduler", dict, None, "another hook than `ParamSchedulerHook`: no schedule",
            "写成 `ParamSchedulerHook` 以外的 hook：不用学习率调度", HARMLESS),
    Setting("default_hooks.sampler_seed", dict, None, "another hook than `DistSamplerSeedHook`: no reshuffling",
            "写成 `DistSamplerSeedHook` 以外的 hook：不重新打乱", HARMLESS),
    Setting("default_hooks.logger.interval", int, 10, "iterations between log lines", "两行日志之间的迭代数",
            rules=at_least(1), of="LoggerHook"),
    Setting("default_hooks.checkpoint.interval", int, -1,
            "iterations (or epochs) between checkpoints; -1: only at the end",
            "两个检查点之间的迭代数（或轮数）；-1：仅在结束时", rules=SAVED, of="CheckpointHook"),
    Setting("default_hooks.checkpoint.by_epoch", bool, False, "interval counts epochs", "interval 以轮计",
            of="CheckpointHook"),
    Setting("default_hooks.checkpoint.max_keep_ckpts", int, -1, "checkpoints that stay; -1: all",
            "保留的检查点数；-1：全部", rules=KEPT, of="CheckpointHook"),
    Setting("default_hooks.checkpoint.save_optimizer", bool, True, "False: weights only, nothing to resume from",
            "False：只存权重，无法恢复训练", of="CheckpointHook"),
    Setting("custom_hooks", list | None, None, "a list of further hooks", "其他 hook 的列表", NOTHING,
            words="a list"),
    Setting("custom_hooks.*.tokenizer", Any, NEEDED, "`load_tokenizer`", "`load_tokenizer`", of="DatasetInfoHook"),
    Setting("custom_hooks.*.tokenizer", Any, NEEDED, "`load_tokenizer`", "`load_tokenizer`", of="EvaluateChatHook"),
    Setting("custom_hooks.*.evaluation_inputs", str | list[str], NEEDED, "what a user says", "用户输入",
            of="EvaluateChatHook"),
    Setting("custom_hooks.*.every_n_iters", int | None, None,
            "iterations between samples; None: before and after only", "两次采样之间的迭代数；None：仅在开始与结束时",
            rules=at_least(1), of="EvaluateChatHook"),
    Setting("custom_hooks.*.system", str, "", "system prompt", "系统提示", of="EvaluateChatHook"),
    Setting("custom_hooks.*.prompt_template", Any, None, "of `PROMPT_TEMPLATE`; None: the text as it is",
            "`PROMPT_TEMPLATE` 之一；None：原文", of="EvaluateChatHook"),
    Setting("custom_hooks.*.max_new_tokens", int, 100, "most tokens of a reply", "回复的最大 token 数",
            rules=at_least(1), of="EvaluateChatHook"),
    Setting("trackers", list | None, None, "a list of what else gets the figures", "额外接收指标的 tracker 列表",
            NOTHING, words="a list"),
    Setting("log_level", str, "INFO", "of the log file and the terminal", "日志文件与终端的级别", NOTHING, LEVEL),
    Setting("resume", bool | str | None, None, "True: from the newest checkpoint of the work dir; or a checkpoint",
            "True：从工作目录最新的检查点恢复；或指定检查点", NOTHING, RESUME, words="True, False or a checkpoint"),
    Setting("work_dir", str | None, None, "where checkpoints and logs go (`--work-dir` has precedence)",
            "检查点与日志的目录（`--work-dir` 优先）", NOTHING, PATH, words="a folder or None"),
    # Of which only one value makes sense
    Setting("use_varlen_attn", bool, True, "documents of a pack do not see each other", "同一 pack 内的文档互不可见",
            NOTHING, only=Only((True,), "without it the documents of a pack see each other", "set it to True")),
    Setting("pack_to_max_length", bool, True, "data are trained in packs", "以 pack 训练", NOTHING,
            only=Only((True,), "tokenized data are always trained in packs", "set it to True")),
    Setting("sequence_parallel_size", int, 1, "ranks that share a pack", "共享一个 pack 的 rank 数", NOTHING,
            only=Only((1,), "sequence parallelism is not built", "set it to 1; long packs fit by recompute")),
    Setting("batch_size", int, 1, "packs of a batch", "一个 batch 的 pack 数", NOTHING, only=_ONE_PACK),
)  # fmt: skip

SCHEMA = Schema(OWN_SETTINGS)
