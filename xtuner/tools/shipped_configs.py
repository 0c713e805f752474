"""The shipped configs, written from one template: what they share is in one place, and each is a complete file.

python -m xtuner.tools.shipped_configs xtuner/configs        writes *_w_tokenized_dataset.py, see CONFIGS
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from xtuner.core.files import atomic_file
from xtuner.tools.job_scripts import fill_template

_ARGUMENTS = (
    "    pretrained_model_name_or_path=pretrained_model_name_or_path,\n"
    "    use_varlen_attn=use_varlen_attn,\n"
    "    activation_checkpointing=True,\n"
)
_PRETRAINED = {
    "model": "from_pretrained",
    "model_imports": "from_pretrained",
    "model_arguments": _ARGUMENTS
    + '    # adapter=dict(type="xtuner.model.lora", rank=16, alpha=32),  # LoRA: low-rank terms alone are trained\n'
    '    # frozen_weights="nf4",  # with an adapter: the matrices under it in 4 bits (QLoRA, docs/en/lora.md)\n',
    "tokenizer_path": "pretrained_model_name_or_path",
    "prompt_template": "internlm2_chat",
    "max_length": 32768,
    "sequence_parallel_size": 1,
    "more_accumulation": "",
    "lr": "4e-5",
    "states_hint": '"bf16", "8bit" need less memory',
    "warm_up_ratio": 0.025,
    "save_steps": 500,
    "evaluation_freq": 500,
    "evaluation_inputs": '["请介绍一下上海的历史。", "What makes a good scientific question?"]',
    "more_chat_arguments": "",
    "zero_setting": "",
    "zero_in_training": "",
    "val_dataset": "dict(type=load_intern_repo_tokenized_dataset, folder=val_folder) if val_folder else None",
}
_ZERO = {
    "zero_setting": 'learn_zero = False  # True: also learn id 0, which is "!" in this vocabulary\n',
    "zero_in_training": "        learn_zero=learn_zero,\n",
    "val_dataset": "(\n    dict(type=load_intern_repo_tokenized_dataset, folder=val_folder, learn_zero=learn_zero) "
    "if val_folder else None\n)",
}
_TINY = _PRETRAINED | {
    "title": "A tiny InternLM2 from random weights: learns on a laptop in minutes, with every step of a large one.",
    "model": "from_scratch",
    "model_imports": "from_scratch",
    "model_settings": "# Model: random weights of this shape\n"
    "hidden_size = 256\n"
    "num_layers = 4\n"
    "vocab_size = 2048  # of the tokenizer\n"
    'tokenizer_path = "/path/to/your/tokenizer"  # folder with tokenizer.model or tokenizer.json',
    "model_arguments": "    use_varlen_attn=use_varlen_attn,\n"
    "    activation_checkpointing=False,\n"
    "    vocab_size=vocab_size,\n"
    "    hidden_size=hidden_size,\n"
    "    intermediate_size=hidden_size * 3,\n"
    "    num_hidden_layers=num_layers,\n"
    "    num_attention_heads=hidden_size // 64,\n"
    "    num_key_value_heads=hidden_size // 128,\n"
    "    max_position_embeddings=max_length,\n"
    "    rope_theta=10000,\n",
    "tokenizer_path": "tokenizer_path",
    "prompt_template": "plain",
    "max_length": 1024,
    "lr": "2e-3",
    "warm_up_ratio": 0.1,
    "save_steps": 50,
    "evaluation_freq": 100,
    "evaluation_inputs": '["def main("]',
    "more_chat_arguments": "        max_new_tokens=40,\n",
}


def _pretrained(model: str, model_hint: str = "", hub_id: str = "", **changes: object) -> dict[str, object]:
    values = _PRETRAINED | changes
    title = f"{model} on data tokenized by InternEvo's tools, in packs of {values['max_length']:,} tokens."
    hub_id = hub_id or f"internlm/{model.lower().replace('.', '_')}"
    settings = f'# Model: a folder, or a hub id{model_hint}\npretrained_model_name_or_path = "{hub_id}"'
    return values | {"title": title, "model_settings": settings}


def _qlora(model: str) -> dict[str, object]:
    """QLoRA: low-rank terms on weights in 4 bits."""
    values = _pretrained(model, max_length=8192, lr="2e-4", states_hint="small: factors alone are trained")
    settings = (
        "# Adapter: low-rank terms on frozen matrices (docs/en/lora.md)\n"
        'frozen_weights = "nf4"  # 4 bits; "int8", or "own" for bf16\n'
        "rank = 16\n"
        "alpha = 32  # terms are multiplied by alpha / rank\n"
        'targets = "all"  # or names, such as ["wqkv", "wo"]'
    )
    arguments = (
        "    frozen_weights=frozen_weights,\n    adapter=dict(type=lora, rank=rank, alpha=alpha, targets=targets),\n"
    )
    return values | {
        "title": f"QLoRA of {values['title']}",
        "model_imports": "from_pretrained, lora",
        "model_settings": f"{values['model_settings']}\n{settings}",
        "model_arguments": f"{_ARGUMENTS}{arguments}",
    }


CONFIGS: dict[str, dict[str, object]] = {
    "internlm2_1_8b": _pretrained("InternLM2-1.8B"),
    "internlm2_7b": _pretrained("InternLM2-7B", states_hint='"8bit" lets one 80 GB GPU train all of it'),
    "internlm2_7b_qlora": _qlora("InternLM2-7B"),
    "internlm2_20b": _pretrained("InternLM2-20B"),
    "internlm2_5_7b_1m": _pretrained(
        "InternLM2.5-7B-Chat-1M",
        ". Rotary positions are as in its config.json: rope_theta = 50,000,000,\n"
        "# and in documents of more than 262,144 tokens dynamic scaling by 2.5",
        max_length=131072,
        sequence_parallel_size="4  # devices that share a pack",
        more_accumulation="accumulative_counts *= sequence_parallel_size  # "
        "as many packs a step as if no devices shared them\n",
    ),
    "internlm2_tiny": _TINY,
    "internlm3_8b": _pretrained("InternLM3-8B", hub_id="internlm/internlm3-8b-instruct", prompt_template="tokenizer"),
    "llama3_1_8b": _pretrained(
        "Llama-3.1-8B",
        hub_id="meta-llama/Llama-3.1-8B",
        prompt_template="tokenizer",
        **_ZERO,
    ),
    "mistral_7b": _pretrained("Mistral-7B", hub_id="mistralai/Mistral-7B-v0.3", prompt_template="tokenizer"),
    "qwen2_5_7b": _pretrained("Qwen2.5-7B", hub_id="Qwen/Qwen2.5-7B", prompt_template="tokenizer", **_ZERO),
    "qwen3_8b": _pretrained("Qwen3-8B", hub_id="Qwen/Qwen3-8B-Base", prompt_template="tokenizer", **_ZERO),
}


def render_configs() -> Iterator[tuple[str, str]]:
    """(file name, text) of every shipped config."""
    for model, values in CONFIGS.items():
        yield f"{model}_w_tokenized_dataset.py", fill_template("config.txt", **values)


if __name__ == "__main__":
    for name, text in render_configs():
        with atomic_file(Path(sys.argv[1]) / name) as f:
            f.write(text)
