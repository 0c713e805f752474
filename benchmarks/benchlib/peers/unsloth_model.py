"""unsloth: its Llama or Qwen3 with LoRA or QLoRA.   # pip install unsloth

Its own ways throughout: `FastLanguageModel` loads a folder of weights, to nf4 by bitsandbytes for QLoRA, and adds the
factors; its Triton kernels, its loss in parts of the pack, and its checkpointing, which keeps the inputs of blocks in
host memory ("unsloth", what it recommends). Attention is within documents: the model gets their lengths and positions
as from its trainer's collator for packs. It chooses the kernel by what is installed: FlashAttention 2, xFormers, else
PyTorch's SDPA for each document; FlashAttention 3 or 4 replaces PyTorch's kernel where its trainer would use it.

PyPI's xFormers 0.0.35 is built for CUDA 12. Next to a PyTorch for CUDA 13 it loads if LD_LIBRARY_PATH has the folder of
`libcudart.so.12` (pip install nvidia-cuda-runtime-cu12).
"""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from benchlib.peers.training_loop import Peer, Settings, initial_weights, layout
from safetensors.torch import save_file
from torch import nn

from xtuner.core.files import write_json
from xtuner.core.hub import INDEX
from xtuner.data.loading.batch import Batch
from xtuner.data.packing.raw_pack import IGNORE
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import weight_index

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
CHECKPOINTING: dict[str, str | bool] = {"none": False, "full": "unsloth"}
KERNELS = {"xformers": "xformers", "flash_varlen": "flash-attn"}  # its name of a backend → the package


def build(s: Settings) -> Peer:
    recompute = s.recompute or "full"
    if not s.terms:
        raise SystemExit("unsloth is measured with --adapter lora or qlora")
    if s.attention or recompute not in CHECKPOINTING:
        raise SystemExit("unsloth: it chooses --attention itself, --recompute is none or full")
    if s.device.type != "cuda":
        raise SystemExit("unsloth needs a GPU: its kernels do not run on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(OFFLINE, UNSLOTH_COMPILE_LOCATION=str(Path(tempfile.gettempdir(), "unsloth_compiled")))
        import unsloth  # before transformers and peft, which it changes
        from benchlib.peers import peft_terms

        write_folder(Path(folder), s.shape, s.dtype, s.device)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=s.shape.max_position_embeddings,
            dtype=s.dtype,
            load_in_4bit=s.terms.weights == "nf4",
            use_gradient_checkpointing=CHECKPOINTING[recompute],
        )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=s.terms.rank,
        lora_alpha=s.terms.alpha,
        target_modules=list(peft_terms.MODULES.values()),
        use_gradient_checkpointing=CHECKPOINTING[recompute],
    )
    check_quantized(model, len(peft_terms.MODULES) * s.shape.num_layers if s.terms.weights == "nf4" else 0)
    unsloth.FastLanguageModel.for_training(model)

    def loss(pack: Batch) -> torch.Tensor:
        """The inputs are as from its trainer, also where they are: lengths on the CPU, the number of targets not."""
        row = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "shift_labels": pack.targets}
        row = {name: value[None] for name, value in row.items()}
        lengths, targets = pack.cu_seqlens.diff().cpu(), (pack.targets != IGNORE).sum()
        with torch.autocast(s.device.type, s.compute):
            found = model(
                **row,
                labels=row["shift_labels"],
                packed_seq_lengths=lengths,
                num_items_in_batch=targets,
                use_cache=False,
            )
        return found.loss

    backend, replaced = choose_attention(model)
    attention = f"{backend}+{replaced}" if replaced else backend
    packages = ["unsloth", "transformers", *peft_terms.packages(s.terms)]
    versions = ", ".join(f"{name} {version(name)}" for name in [*packages, *filter(None, [KERNELS.get(backend)])])
    return Peer(s.label(attention, recompute), attention, versions, model, loss, has_weights=True)


def choose_attention(model: nn.Module) -> tuple[str, str | None]:
    """What it runs packs with, and what replaces PyTorch's own kernel there, as in its trainer. Prints why."""
    from unsloth.utils.attention_dispatch import select_attention_backend
    from unsloth.utils.flash_impl import FLASH_IMPL_STATE, maybe_activate_flash_attention_impl

    replaced = maybe_activate_flash_attention_impl(model)
    print(f"unsloth: FlashAttention 3 or 4: {FLASH_IMPL_STATE['reason']}")
    return select_attention_backend(use_varlen=True), replaced


def check_quantized(model: nn.Module, wanted: int) -> None:
    """It loads bf16 weights if bitsandbytes does not run, with no more than a message."""
    found = sum(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    if found != wanted:
        raise SystemExit(f"unsloth quantized {found} matrices instead of {wanted}: its messages above say why")


def write_folder(folder: Path, shape: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
    """A Hugging Face folder of the random weights that ours starts from, with a tokenizer of four tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    files: dict[str, list[str]] = {}
    size = 0
    for weights in initial_weights(shape, device):
        name = f"{len(files)}.safetensors"
        copies = {key: weight.to("cpu", dtype, copy=True).contiguous() for key, weight in weights.items()}
        save_file(copies, folder / name, metadata={"format": "pt"})
        files[name] = list(copies)
        size += sum(weight.nbytes for weight in copies.values())
    write_json(folder / INDEX, weight_index(files, size))
    write_json(folder / "config.json", layout(shape).write_config(shape, str(dtype)[6:]))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = WordLevel({word: i for i, word in enumerate(special.values())}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(folder)
