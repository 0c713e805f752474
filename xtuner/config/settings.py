"""The settings of a config, one declaration each. Settings of older tools only are in compat/settings.py.

A setting is a dotted path in a config. Where it is an argument of a class, the class has the same default (a test
compares them).
"""

from typing import Any, Literal

from xtuner.config.schema import HARMLESS, IMPOSSIBLE, NOT_COMPARED, REQUIRED, RESULT, Allowed, Rule, Schema, Setting
from xtuner.core.remote.url import is_remote

INT32 = 2**31  # ids and borders of documents have 32 bits
LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
MOST_EPOCHS = 1_000_000


def at_least(least: int) -> tuple[Rule, ...]:
    return (Rule(lambda v: v >= least, f"is not at least {least}", f"≥ {least}"),)


def one_of(*names: str, why: str = "") -> tuple[Rule, ...]:
    return (Rule(lambda v: v in names, f"is not one of {', '.join(names)}", ", ".join(names), why, names),)


ABOVE_0 = (Rule(lambda v: v > 0, "is not above 0", "> 0"),)
SHARE = (Rule(lambda v: 0 < v <= 1, "is not above 0 and at most 1", "> 0, ≤ 1"),)
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
    Rule(
        lambda v: v <= MOST_EPOCHS, f"is above {MOST_EPOCHS:,}", why="so large a number is most likely a typing mistake"
    ),
)
LEVEL = (Rule(lambda v: v.upper() in LEVELS, f"is not one of {', '.join(LEVELS)}", ", ".join(LEVELS)),)
SHARERS = (
    Rule(lambda v: v == "auto" or (isinstance(v, int) and v >= 1), 'is not 1 or more, or "auto"', '≥ 1, "auto"'),
)
NAME = (Rule(lambda v: bool(v.strip()) and "/" not in v, "is not a name: text without a slash"),)
PATH = (Rule(lambda v: v != "", "is not a folder or None"),)
REMOTE = (Rule(is_remote, "is not an address in object storage", "s3://… or oss://…"),)
RESUME = (Rule(lambda v: v != "", "is not True, False or a checkpoint"),)

_DATA, _FILES = "train_dataloader.dataset", "train_dataloader.dataset.dataset_cfg"
_ONE_PACK = Allowed(
    (1,), "a batch is one pack; a longer max_length or accumulative_counts does the same", "set it to 1"
)

MIXTURE_KEYS = ("weight", "name", "max_repeats")  # of a source in a mixture, not of what is built

OWN_SETTINGS = (
    # The model
    Setting("model", dict, REQUIRED, "the model: `from_pretrained`, or `from_scratch` for random weights",
            "模型：`from_pretrained`；随机权重用 `from_scratch`", RESULT, built=True),
    Setting("model.pretrained_model_name_or_path", str, REQUIRED, "a folder with config.json and weights, or a hub id",
            "含 config.json 与权重的目录，或 hub id", HARMLESS, owner="from_pretrained"),
    Setting("model.use_varlen_attn", bool, True, "documents of a pack do not see each other",
            "同一 pack 内的文档互不可见"),
    Setting("model.activation_checkpointing", bool, False,
            "recompute in the backward pass what memory cannot hold; on CPUs all but each block's input",
            "反向时重算显存放不下的部分；CPU 上除各层输入外全部重算", HARMLESS),
    Setting("model.attention", str | None, None,
            "a backend by name (flash4, varlen, cudnn, flex, loop); None: the fastest that runs",
            "指定注意力后端（flash4、varlen、cudnn、flex、loop）；None：可用的最快者", HARMLESS),
    Setting("model.products", Literal["own", "fp8", "fp8_full"], "own",
            "format of the blocks' matrix products in training; own: as `optim_wrapper.dtype`",
            "训练时各层矩阵乘法的数值格式；own：同 `optim_wrapper.dtype`"),
    Setting("model.adapter", dict, None, "None: all weights are trained; `lora`: low-rank terms on frozen matrices",
            "None：训练全部权重；`lora`：在冻结的矩阵上训练低秩项", IMPOSSIBLE, owner="from_pretrained", built=True),
    Setting("model.adapter.rank", int, 16, "columns of the factors", "低秩因子的秩", rules=at_least(1), owner="lora"),
    Setting("model.adapter.alpha", float, 32.0, "a term is multiplied by `scaling` of it", "缩放系数，见 `scaling`",
            RESULT, ABOVE_0, owner="lora"),
    Setting("model.adapter.targets", str | list[str], "all",
            "matrices: q, k, v, o, gate, up, down, or their names in the model's files; \"all\"",
            "矩阵：q、k、v、o、gate、up、down，或模型文件中的名称；\"all\" 为全部", owner="lora"),
    Setting("model.adapter.dropout", float, 0.0, "share of a term's inputs that training sets to zero",
            "训练时低秩项输入中置零的比例", RESULT,
            (Rule(lambda v: 0 <= v < 1, "is not at least 0 and below 1", "0 … 1"),), owner="lora"),
    Setting("model.adapter.scaling", Literal["alpha/rank", "alpha/sqrt(rank)"], "alpha/rank",
            "factor of a term; alpha/sqrt(rank): rsLoRA", "低秩项的系数；alpha/sqrt(rank) 即 rsLoRA", RESULT,
            owner="lora"),
    Setting("model.adapter.dora", bool, False, "also train the length of each row (DoRA)",
            "同时训练每一行的长度（DoRA）", owner="lora"),
    Setting("model.adapter.train", list[str], (), "parts that are trained in full: norms, embedding, output",
            "完整训练的其他部分：norms、embedding、output", owner="lora"),
    Setting("model.frozen_weights", Literal["own", "int8", "nf4"], "own",
            "format of the blocks' matrices under an adapter; nf4: 4 bits (QLoRA); own: as `optim_wrapper.dtype`",
            "有 adapter 时各层矩阵的保存格式；nf4：4 比特（QLoRA）；own：同 `optim_wrapper.dtype`",
            owner="from_pretrained"),
    Setting("model.family", str, "internlm2", "model family; its config.json has the fields below",
            "下列字段所属的模型家族", owner="from_scratch"),
    Setting("model.seed", int | None, None, "seed of random weights; None: `randomness.seed`",
            "随机权重的种子；None：`randomness.seed`", rules=SEED, owner="from_scratch"),
    *(Setting(f"model.{name}", int | None, None, text, zh, IMPOSSIBLE, SIZE, "from_scratch", expected=NUMBER)
      for name, text, zh in (
          ("vocab_size", "rows of the embedding", "词表大小"), ("hidden_size", "width of the model", "隐藏维度"),
          ("intermediate_size", "width of the feed-forward layer", "前馈层维度"),
          ("num_hidden_layers", "blocks", "层数"), ("num_attention_heads", "query heads", "查询头数"),
          ("num_key_value_heads", "key-value heads; None: as many as query heads", "键值头数；None：与查询头数相同"),
          ("head_dim", "width of a head; None: hidden_size ÷ heads", "每个头的维度；None：hidden_size ÷ 头数"))),
    Setting("model.max_position_embeddings", int | None, 2048, "longest sequence, for config.json",
            "config.json 所写的最大长度", rules=SIZE, owner="from_scratch", expected="a whole number above 0"),
    *(Setting(f"model.{name}", bool, False, text, zh, IMPOSSIBLE, owner="from_scratch") for name, text, zh in (
        ("bias", "attention has biases (internlm3: its output and the MLP)", 
         "注意力层带偏置（internlm3：输出层与 MLP）"),
        ("attention_bias", "attention has biases (llama, qwen3)", "注意力层带偏置（llama、qwen3）"),
        ("qkv_bias", "q, k and v have biases (internlm3)", "q、k、v 带偏置（internlm3）"),
        ("mlp_bias", "the feed-forward layer has biases (llama)", "前馈层带偏置（llama）"),
        ("tie_word_embeddings", "one weight for embedding and output layer", "词嵌入与输出层共享权重"))),
    Setting("model.sliding_window", int | None, None, "tokens that a token attends to; None: all before it (mistral)",
            "每个 token 关注的 token 数；None：之前的全部（mistral）", rules=SIZE, owner="from_scratch"),
    Setting("model.rope_scaling", dict | None, None, "positions beyond the first context: dict(rope_type=…, factor=…)",
            "超出最初上下文的位置：dict(rope_type=…, factor=…)", owner="from_scratch"),
    *(Setting(f"model.{name}_token_id", kind, default, text, zh, resume, owner="from_scratch")
      for name, kind, default, text, zh, resume in (
          ("bos", int | None, 1, "id that begins a text; None: none", "文本开头的 id；None：无", HARMLESS),
          ("eos", int | list[int] | None, 2, "id, or ids, that end a text", "结束文本的一个或多个 id", HARMLESS),
          ("pad", int | None, 2, "id whose embedding is not trained; None: none", "其词嵌入不训练的 id；None：无",
           None))),
    Setting("model.rope_theta", float, 1e6, "base of the rotary position encoding",
            "旋转位置编码的底数", rules=ABOVE_0),
    Setting("model.rms_norm_eps", float, 1e-5, "epsilon of the RMS norms", "归一化的 epsilon",
            rules=at_least(0)),
    Setting("model.initializer_range", float, 0.02, "standard deviation of random weights", "随机权重的标准差",
            rules=at_least(0)),
    Setting("tokenizer", dict, None, "`load_tokenizer`: for samples and the export",
            "`load_tokenizer`：采样与导出所用", NOT_COMPARED, built=True),
    Setting("load_from", str | None, None,
            "weights to start from: a Hugging Face folder or an iter_N.pth of another run",
            "起始权重：Hugging Face 目录，或其他训练的 iter_N.pth", NOT_COMPARED, PATH, expected="a folder or None"),
    # Data
    Setting("train_dataloader", dict, REQUIRED, "how packs are read", "如何读取 pack", RESULT,
            expected="dict(dataset=…, …)"),
    Setting(_DATA, dict, REQUIRED, "the packs: `build_packed_dataset`", "pack：`build_packed_dataset`", RESULT,
            built=True),
    Setting(_FILES, dict, REQUIRED, "the files: `load_intern_repo_tokenized_dataset`",
            "文件：`load_intern_repo_tokenized_dataset`", RESULT, built=True, owner="build_packed_dataset"),
    Setting(f"{_FILES}.folder", str, REQUIRED, "folder of `.bin` and `.bin.meta`, at any depth; contents are compared",
            "存放 `.bin` 与 `.bin.meta` 的目录，层级不限；比较的是内容", HARMLESS),
    Setting(f"{_FILES}.data_order_path", str | None, None, "the order of files; None: sorted",
            "文件顺序；None：按路径排序", HARMLESS),
    Setting(f"{_FILES}.min_length", int, 0, "documents with fewer tokens are left out",
            "token 数更少的文档不参与训练", rules=at_least(0)),
    Setting(f"{_FILES}.file_type", str, ".bin", "ending of the token files", "token 文件的后缀"),
    Setting(f"{_FILES}.learn_zero", bool, False,
            "id 0, which has no sign in a `.bin`, is learned like its neighbours; False: never",
            "`.bin` 中 id 0 没有符号：True 时与相邻 token 一致，False 时从不学习"),
    Setting(f"{_FILES}.cache_dir", str | None, None, "where indexes are kept; None: next to the data",
            "索引存放处；None：数据旁", HARMLESS),
    Setting(f"{_FILES}.kind", Literal["auto", "internevo", "megatron", "parquet", "arrow", "jsonl"], "auto",
            "the kind of files; \"auto\": by the files", "文件类型；\"auto\"：由文件判断", HARMLESS,
            owner="load_token_files"),
    Setting(f"{_FILES}.ids", str, "auto", "column of token ids; \"auto\": input_ids, tokens, ids, or the only one",
            "token id 所在列；\"auto\"：input_ids、tokens、ids 或唯一的一列", HARMLESS, owner="load_token_files"),
    Setting(f"{_FILES}.labels", str | None, "auto",
            "column of labels, -100 where a token is not learned; \"auto\": `labels` if it exists; None: none",
            "标签列，-100 处不学习；\"auto\"：有 `labels` 则用；None：无", HARMLESS, owner="load_token_files"),
    Setting(f"{_FILES}.mask", str | None, "auto",
            "column with 1 where a token is learned; \"auto\": loss_mask or mask if it exists; None: none",
            "学习处为 1 的列；\"auto\"：有 loss_mask 或 mask 则用；None：无", HARMLESS, owner="load_token_files"),
    Setting(f"{_FILES}.sources", list, REQUIRED, "sources of a mixture: `dict(type=…, …, weight=…)` each",
            "混合的各数据源，每个写作 `dict(type=…, …, weight=…)`", RESULT, owner="mixture"),
    Setting(f"{_FILES}.sources.*.weight", float, 1.0, "share of this source, relative to the other weights",
            "该数据源的份额，相对于其他权重", rules=ABOVE_0, owner="mixture source"),
    Setting(f"{_FILES}.sources.*.name", str | None, None, "for logs and metrics; None: the last part of its folder",
            "用于日志与指标；None：目录的最后一段", HARMLESS, NAME, owner="mixture source"),
    Setting(f"{_FILES}.sources.*.max_repeats", int | None, None,
            "how often an epoch may visit its documents; None: once, or any number of times with epoch=\"all\"",
            "一轮中其文档最多被访问的次数；None：一次，epoch=\"all\" 时不限",
            rules=at_least(1), owner="mixture source"),
    Setting(f"{_FILES}.sources.*.folder", str, None, "contents are compared, not the path", "比较的是内容，不是路径",
            HARMLESS, owner="mixture source"),
    Setting(f"{_FILES}.sources.*.data_order_path", str | None, None, "contents are compared, not the path",
            "比较的是内容，不是路径", HARMLESS, owner="mixture source"),
    Setting(f"{_FILES}.sources.*.cache_dir", str | None, None, "where indexes are kept", "索引存放处", HARMLESS,
            owner="mixture source"),
    Setting(f"{_FILES}.by", Literal["tokens", "documents", "packs"], "tokens", "what the weights of a mixture count",
            "混合的权重按什么计", owner="mixture"),
    Setting(f"{_FILES}.epoch", Literal["first", "all"], "first",
            "an epoch ends when the \"first\" source is exhausted, or when \"all\" have been visited",
            "一轮在首个数据源用尽时（first）或全部访问过时（all）结束", owner="mixture"),
    Setting(f"{_DATA}.packed_length", int, REQUIRED, "tokens of a pack", "一个 pack 的 token 数", rules=PACK),
    Setting(f"{_DATA}.seed", int, 1024, "seed of the order of documents in a file", "文件内文档顺序的种子",
            rules=SEED),
    Setting(f"{_DATA}.label_rule", Literal["internevo", "xtuner"], "internevo",
            "targets never cross documents; \"xtuner\": a plain shift", "目标不跨文档；\"xtuner\" 为简单移位"),
    Setting("train_dataloader.sampler", dict, REQUIRED, "the order of packs: `InternRepoSampler`",
            "pack 的顺序：`InternRepoSampler`", RESULT, built=True),
    Setting("train_dataloader.sampler.shuffle", bool, True, "a new permutation each epoch", "每轮重新打乱"),
    Setting("train_dataloader.sampler.seed", int, 1024, "epoch e is drawn from seed + e", "第 e 轮由 seed + e 抽取",
            rules=SEED),
    Setting("train_dataloader.reshuffle", bool, True, "False: every epoch repeats the first one's order",
            "False：每轮都重复第一轮的顺序", RESULT),
    Setting("train_dataloader.num_workers", int, 0, "reader processes; 0: a thread", "读取进程数；0：一个线程",
            HARMLESS, at_least(0)),
    Setting("train_dataloader.balance", int, 1,
            "iterations whose packs are distributed over ranks by cost; 0: in the order of the sampler",
            "按计算量在 rank 间分配多少次迭代的 pack；0：按顺序", RESULT, at_least(0), harmless=(None, 0, 1)),
    Setting("train_dataloader.batch_size", int, 1, "always one pack", "始终为一个 pack", allowed=_ONE_PACK),
    Setting("val_dataset", dict, None, "held-out data, in the form of `dataset_cfg`",
            "验证数据，写法同 `dataset_cfg`", NOT_COMPARED, built=True),
    Setting("val_interval", int, 500, "iterations between two losses on `val_dataset`", "两次验证之间的迭代数",
            NOT_COMPARED, at_least(1)),
    # Optimizer and schedule
    Setting("optim_wrapper", dict, REQUIRED, "`OptimWrapper`: how weights are updated",
            "`OptimWrapper`：每次迭代如何更新", RESULT, built=True),
    Setting("optim_wrapper.optimizer", dict, REQUIRED, "`torch.optim.AdamW`, or another class of its kind",
            "`torch.optim.AdamW` 或同类优化器", RESULT, built=True),
    Setting("optim_wrapper.optimizer.type", Any, REQUIRED, "the optimizer's class", "优化器的类", IMPOSSIBLE),
    Setting("optim_wrapper.optimizer.lr", float, REQUIRED, "the highest learning rate", "最高学习率", rules=ABOVE_0),
    *(Setting(f"optim_wrapper.optimizer.{name}", kind, default, text, zh, rules=rules, owner="Muon")
      for name, kind, default, text, zh, rules in (
          ("momentum", float, 0.95, "share of the earlier momentum", "动量中旧值所占的比例",
           (Rule(lambda v: 0 <= v < 1, "is not at least 0 and below 1", "0 … 1"),)),
          ("nesterov", bool, True, "the update looks one step ahead", "使用 Nesterov 动量", ()),
          ("ns_steps", int, 5, "steps of the orthogonalization", "正交化的迭代次数",
           (Rule(lambda v: 1 <= v < 100, "is not from 1 to 99", "1 … 99"),)),
          ("ns_coefficients", list[float], (3.4445, -4.775, 2.0315), "of a step of the orthogonalization",
           "正交化每步的系数", ()),
          ("eps", float, 1e-7, "smallest norm that an update is divided by", "更新除以范数时的下限", ABOVE_0),
          ("adjust_lr_fn", str | None, None,
           'how a matrix\'s shape changes its rate: original (None) or match_rms_adamw',
           "学习率如何随矩阵形状变化：original（None）或 match_rms_adamw", ()),
          ("adamw", dict, {}, "lr, betas, eps, weight_decay of AdamW for all other parameters",
           "其余参数所用 AdamW 的 lr、betas、eps、weight_decay", ()))),
    Setting("optim_wrapper.optimizer.weight_decay", float, 0.01,
            "for all parameters (the default is AdamW's; Muon's is 0.1)",
            "所有参数的权重衰减（默认值为 AdamW 的；Muon 为 0.1）", rules=at_least(0)),
    Setting("optim_wrapper.clip_grad", dict, None, "`dict(max_norm=…)`; None: no clipping",
            "`dict(max_norm=…)`；None：不裁剪"),
    Setting("optim_wrapper.clip_grad.max_norm", float | None, None, "the 2-norm over all parameters",
            "所有参数梯度的 2-范数上限", rules=ABOVE_0),
    Setting("optim_wrapper.accumulative_counts", int, 1,
            "packs per rank in an iteration; a resume keeps the total of all ranks",
            "每个 rank 每次迭代的 pack 数；恢复训练时所有 rank 的总数保持不变", HARMLESS, at_least(1)),
    Setting("optim_wrapper.dtype", str, "auto", "dtype of matrix products; auto: bf16 on GPUs, fp32 on CPUs",
            "矩阵乘法的类型；auto：GPU 上 bf16，CPU 上 fp32",
            rules=one_of("auto", "bf16", "fp32", why="fp16 needs loss scaling, which is not built"),
            owner="OptimWrapper"),
    Setting("optim_wrapper.states", str, "fp32",
            "format of AdamW's master weights and moments (split: fp32 in less GPU memory); DeepSpeed: fp32 only",
            "AdamW 的主权重与动量（split：GPU 上更省显存的 fp32）；DeepSpeed 只支持 fp32", IMPOSSIBLE,
            one_of("fp32", "split", "bf16", "8bit")),
    Setting("optim_wrapper.sums", str | None, None,
            "dtype of gradient sums, if coarser than that of `states`: half the memory",
            "比 `states` 更粗的梯度和，显存减半", RESULT, one_of("bf16", "fp32")),
    Setting("optim_wrapper.micro_batch", int | None, None, "most tokens of a micro-batch; None: the fastest",
            "micro-batch 的最大 token 数；None：最快者", HARMLESS, at_least(1)),
    Setting("optim_wrapper.full", str | None, None,
            "what every rank keeps unsharded during an iteration; None: the fastest",
            "各 rank 在一次迭代中完整保留什么；None：最快者", HARMLESS,
            one_of("all", "weights", "gradients", "blocks")),
    Setting("optim_wrapper.parameter_groups", list, (),
            "settings by parameter name, or frozen: dict(match=…)",
            "按参数名单独设置，或冻结：dict(match=…)"),
    Setting("optim_wrapper.layer_decay", float | None, None,
            "what a layer's learning rate is of that of the layer above it; None: the same",
            "下一层的学习率与上一层之比；None：相同", rules=SHARE),
    Setting("param_scheduler", list | dict | None, None, "learning rates: a list of schedulers; None: constant",
            "学习率：调度器列表；None：恒定", RESULT, expected="a list"),
    Setting("train_cfg", dict, REQUIRED, "the length of the run", "训练长度", RESULT, expected="dict(max_epochs=…)"),
    Setting("train_cfg.max_epochs", int, REQUIRED, "epochs", "训练轮数", RESULT, EPOCHS,
            expected="an integer of at least 1"),
    Setting("train_cfg.max_skipped", int, 0, "steps that may be skipped because a loss or gradient is not finite",
            "因损失或梯度非有限而允许跳过的更新数", HARMLESS, at_least(0), expected="a whole number of at least 0"),
    Setting("randomness", dict | None, None, "seed and determinism", "种子与确定性", RESULT,
            expected="a dict of seed and deterministic"),
    Setting("randomness.seed", int | None, 0, "seed of random weights (`--seed` has precedence)",
            "随机权重的种子（`--seed` 优先）", RESULT, SEED),
    Setting("randomness.deterministic", bool, False, "bitwise reproducible on a GPU, but slower",
            "GPU 上逐位可复现，较慢", HARMLESS),
    # Hooks, logs, checkpoints
    Setting("default_hooks", dict | None, None, "hooks by name", "以名称给出的 hook", RESULT, expected="a dict"),
    Setting("default_hooks.timer", dict, None, "`IterTimerHook`: seconds per iteration",
            "`IterTimerHook`：每次迭代的秒数", HARMLESS),
    Setting("default_hooks.logger", dict, None, "`LoggerHook`: log lines and metrics", "`LoggerHook`：日志行与指标",
            HARMLESS),
    Setting("default_hooks.checkpoint", dict, None, "`CheckpointHook`", "`CheckpointHook`：检查点", HARMLESS),
    Setting("default_hooks.param_scheduler", dict, None, "any other hook than `ParamSchedulerHook`: no schedule",
            "写成 `ParamSchedulerHook` 以外的 hook：不用学习率调度", HARMLESS),
    Setting("default_hooks.sampler_seed", dict, None, "any other hook than `DistSamplerSeedHook`: no reshuffling",
            "写成 `DistSamplerSeedHook` 以外的 hook：不重新打乱", HARMLESS),
    Setting("default_hooks.logger.interval", int, 10, "iterations between log lines", "两行日志之间的迭代数",
            rules=at_least(1), owner="LoggerHook"),
    Setting("default_hooks.checkpoint.interval", int, -1,
            "iterations (or epochs) between checkpoints; -1: only at the end",
            "两个检查点之间的迭代数（或轮数）；-1：仅在结束时", rules=SAVED, owner="CheckpointHook"),
    Setting("default_hooks.checkpoint.by_epoch", bool, False, "interval counts epochs", "interval 以轮计",
            owner="CheckpointHook"),
    Setting("default_hooks.checkpoint.max_keep_ckpts", int, -1, "number of checkpoints to keep; -1: all",
            "保留的检查点数；-1：全部", rules=KEPT, owner="CheckpointHook"),
    Setting("default_hooks.checkpoint.save_optimizer", bool, True,
            "False: weights only; such a checkpoint cannot be resumed",
            "False：只存权重，无法恢复训练", owner="CheckpointHook"),
    Setting("custom_hooks", list | None, None, "list of further hooks", "其他 hook 的列表", NOT_COMPARED,
            expected="a list"),
    Setting("custom_hooks.*.tokenizer", Any, REQUIRED, "`load_tokenizer`", "`load_tokenizer`", owner="DatasetInfoHook"),
    Setting("custom_hooks.*.tokenizer", Any, REQUIRED, "`load_tokenizer`", "`load_tokenizer`",
            owner="EvaluateChatHook"),
    Setting("custom_hooks.*.evaluation_inputs", str | list[str], REQUIRED, "prompts", "用户输入",
            owner="EvaluateChatHook"),
    Setting("custom_hooks.*.every_n_iters", int | None, None,
            "iterations between samples; None: only before and after training",
            "两次采样之间的迭代数；None：仅在开始与结束时",
            rules=at_least(1), owner="EvaluateChatHook"),
    Setting("custom_hooks.*.system", str, "", "system prompt", "系统提示", owner="EvaluateChatHook"),
    Setting("custom_hooks.*.prompt_template", Any, None,
            "one of `PROMPT_TEMPLATE` (tokenizer: the one in its folder); None: the plain text",
            "`PROMPT_TEMPLATE` 之一（tokenizer：分词器目录中的模板）；None：原文", owner="EvaluateChatHook"),
    Setting("custom_hooks.*.max_new_tokens", int, 100, "maximum tokens of a reply", "回复的最大 token 数",
            rules=at_least(1), owner="EvaluateChatHook"),
    Setting("trackers", list | None, None, "list of trackers that receive the metrics", "额外接收指标的 tracker 列表",
            NOT_COMPARED, expected="a list"),
    *(Setting(f"trackers.*.{name}", kind, default, text, zh, rules=rules, owner=owner)
      for owner, place, modes in (
          ("SwanLab", "workspace", ("cloud", "local", "offline")), ("Wandb", "entity", ("online", "offline")))
      for name, kind, default, text, zh, rules in (
          ("project", str, "xtuner", "project that lists the run", "训练所属的项目", ()),
          ("name", str | None, None, "of the run; None: that of the work dir", "训练的名称；None：工作目录名", ()),
          (place, str | None, None, "user or team; None: the default one", "用户或团队；None：默认", ()),
          ("group", str | None, None, "group of runs", "训练的分组", ()),
          ("tags", list[str], (), "for searching", "标签", ()),
          ("mode", str | None, None, "None: online if an API key is found, else offline",
           "None：找到 API key 则联网，否则离线", one_of(*modes)),
          ("init", dict, {}, "other arguments of the library's `init`", "该库 `init` 的其他参数", ()))),
    Setting("on_event", str | None, None,
            "a command that is run when the run ends, fails or stops; `{json}` in it becomes the event",
            "训练结束、失败或停止时运行的命令；其中的 `{json}` 换成该事件", NOT_COMPARED,
            (Rule(lambda v: bool(v.strip()), "is empty"),)),
    Setting("log_level", str, "INFO", "level of the log file and the terminal",
            "日志文件与终端的级别", NOT_COMPARED, LEVEL),
    Setting("resume", bool | str | None, None, "True: from the newest checkpoint of the work dir; or a checkpoint",
            "True：从工作目录最新的检查点恢复；或指定检查点", NOT_COMPARED, RESUME,
            expected="True, False or a checkpoint"),
    Setting("work_dir", str | None, None, "where checkpoints and logs go (`--work-dir` has precedence)",
            "检查点与日志的目录（`--work-dir` 优先）", NOT_COMPARED, PATH, expected="a folder or None"),
    Setting("upload_dir", str | None, None,
            "where saved checkpoints are uploaded: s3://… or oss://…; a resume also looks there",
            "检查点保存后上传的位置：s3://… 或 oss://…；恢复训练时也从中查找", NOT_COMPARED, REMOTE,
            expected="an address in object storage or None"),
    Setting("sequence_parallel_size", int | str, 1,
            'ranks that share a pack (context parallelism); "auto": as many as its longest document needs',
            '共享一个 pack 的 rank 数（上下文并行）；"auto"：由最长文档所需的显存决定', NOT_COMPARED, SHARERS,
            expected='a number or "auto"'),
    # Only one value is supported
    Setting("use_varlen_attn", bool, True, "documents of a pack do not see each other", "同一 pack 内的文档互不可见",
            NOT_COMPARED,
            allowed=Allowed((True,), "without it the documents of a pack see each other", "set it to True")),
    Setting("pack_to_max_length", bool, True, "documents are packed", "以 pack 训练", NOT_COMPARED,
            allowed=Allowed((True,), "tokenized data are always trained in packs", "set it to True")),
    Setting("batch_size", int, 1, "packs per batch", "一个 batch 的 pack 数", NOT_COMPARED, allowed=_ONE_PACK),
)  # fmt: skip

SCHEMA = Schema(OWN_SETTINGS)
