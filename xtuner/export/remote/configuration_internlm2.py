"""InternLM2's config for transformers 4 and 5; `xtuner convert pth_to_hf --with-code` writes it into a model folder."""

from typing import Any

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """The fields are Llama's; `bias` says whether both matrices of attention have one.

    transformers 5 has the rotary settings in `rope_parameters` only. Servers (SGLang, vLLM, LMDeploy) read `rope_theta`
    and `rope_scaling`, as in the original config, and use a default if an attribute is missing.
    """

    model_type = "internlm2"
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}


def _get_theta(config: InternLM2Config) -> float:
    rope = config.rope_parameters or {}
    if "rope_theta" not in rope:
        raise AttributeError("rope_theta")  # the library reads it while it fills rope_parameters
    return float(rope["rope_theta"])


def _set_theta(config: InternLM2Config, value: float) -> None:
    config.rope_parameters = {**(config.rope_parameters or {"rope_type": "default"}), "rope_theta": value}


def _get_scaling(config: InternLM2Config) -> dict[str, Any] | None:
    rope = {k: v for k, v in (config.rope_parameters or {}).items() if k != "rope_theta"}
    kind = rope.get("rope_type", "default")
    return None if kind == "default" else {**rope, "type": kind}


def _set_scaling(config: InternLM2Config, value: dict[str, Any] | None) -> None:
    theta = {k: v for k, v in (config.rope_parameters or {}).items() if k == "rope_theta"}
    kind = (value or {}).get("rope_type") or (value or {}).get("type") or "default"
    config.rope_parameters = {**theta, **(value or {}), "rope_type": kind}


if hasattr(LlamaConfig, "rope_scaling"):  # transformers 5; the class of transformers 4 has both attributes
    InternLM2Config.rope_theta = property(_get_theta, _set_theta)
    InternLM2Config.rope_scaling = property(_get_scaling, _set_scaling)
