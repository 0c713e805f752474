"""InternLM2's config for transformers 5, written into a model folder by `xtuner convert pth_to_hf --with-code`."""

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """The fields are Llama's; `bias` is that of the attention's two matrices."""

    model_type = "internlm2"
    bias: bool = False
