"""`xtuner list-models`: published sizes, features and GPUs of the models that families list."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xtuner.config.load import shipped_names
from xtuner.core.errors import ConfigError
from xtuner.families import FAMILIES, read_config
from xtuner.tools.model_list import render_family_table

ROOT = Path(__file__).resolve().parents[2]

PUBLISHED = {  # parameters, by the models' pages
    "internlm/internlm2-1_8b": 1_889_110_016, "internlm/internlm2-7b": 7_737_708_544,
    "internlm/internlm3-8b-instruct": 8_804_241_408, "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248, "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824, "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400, "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512, "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-8B": 8_190_735_360,
}  # fmt: skip


def test_the_list(xtuner: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*words: Any) -> dict[str, dict[str, Any]]:
        assert xtuner("list-models", "--json", *words) == 0
        return {row["hub_id"]: row for row in json.loads(capsys.readouterr().out)}

    found = listed()
    assert {name: found[name]["parameters"] for name in PUBLISHED} == PUBLISHED
    assert found["Qwen/Qwen3-0.6B"]["features"] == [
        "norms of q and k", "one weight for embedding and output layer", "heads of 128"
    ]  # fmt: skip
    assert found["meta-llama/Llama-3.1-8B"]["exports"] == ["TurboMind"]
    assert found["Qwen/Qwen3-8B"]["exports"] == ["TurboMind"]
    lacking = [name for name, row in found.items() if "TurboMind" not in row["exports"]]
    assert lacking == ["mistralai/Mistral-7B-v0.1"]  # sliding windows
    for row in found.values():
        fp32, small = row["gpus"]["fp32"], row["gpus"]["8bit"]
        assert small <= fp32
        assert 16 * row["parameters"] < fp32 * 80 * 2**30 or fp32 == 1
    assert found["internlm/internlm2-7b"]["gpus"]["8bit"] == 1  # the shipped template's 80 GB GPU
    larger = listed("-p", "QWEN2.5-14B", "--gpu-memory", "141")
    assert [*larger] == ["Qwen/Qwen2.5-14B"]
    assert larger["Qwen/Qwen2.5-14B"]["gpus"]["fp32"] <= found["Qwen/Qwen2.5-14B"]["gpus"]["fp32"]
    assert xtuner("list-models", "-p", "internlm3") == 0
    shown = capsys.readouterr().out
    assert "8.80 B" in shown
    assert "--layout llama, TurboMind" in shown
    with pytest.raises(ConfigError, match="no listed model contains 'gpt'"):
        xtuner("list-models", "-p", "gpt")


def test_each_family_writes_what_it_lists() -> None:
    """The complete config.json of each released model is read as the same network."""
    for family in FAMILIES.values():
        for model in family.released:
            c = read_config({"model_type": family.name, **family.defaults, **model.network})
            assert read_config(family.write_config(c, "bfloat16")) == c, model.hub_id


def test_the_table_of_families_is_up_to_date() -> None:
    """docs/*/models.md has what `render_family_table` gives, and each template that it names is shipped."""
    for language in ("en", "zh_cn"):
        page = (ROOT / "docs" / language / "models.md").read_text(encoding="utf-8")
        assert render_family_table() in page
        named = re.findall(r"`((?:internlm|llama|mistral|qwen)\w*_\w+b\w*)`", page)
        assert {f"{name}_w_tokenized_dataset" for name in named} <= set(shipped_names())
        assert len(named) == 7
        assert all(f"| `{name}` |" in page for name in FAMILIES)
