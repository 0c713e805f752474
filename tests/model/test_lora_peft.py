"""LoRA, rsLoRA and DoRA equal PEFT's own: logits, gradients and steps from what we export."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lora import trained_checkpoint, with_lora, write_base
from helpers.paths import CACHE, EXTERNAL
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from xtuner.core.errors import ConfigError
from xtuner.core.files import write_json
from xtuner.core.log import logger
from xtuner.export.hf import export_hf
from xtuner.export.peft import export_peft
from xtuner.export.sources.peft import PREFIX, open_peft
from xtuner.families import FAMILIES
from xtuner.model.adapters.base_identity import BaseModel
from xtuner.model.adapters.loading import load_adapted
from xtuner.model.adapters.lora import stored_rows
from xtuner.model.decoder import CausalLM

PEFT = CACHE / "peft-0.21.2"
IDS = (torch.arange(40) * 37 % 397 + 3).tolist()
LR, STEPS = 1e-2, 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", dict(targets="all")),
    "dora": ("qwen2", dict(targets=["q_proj", "v", "o", "gate_proj", "down"], dora=True)),
    "rslora": ("qwen3", dict(targets=["k", "v_proj", "w2"], scaling="alpha/sqrt(rank)",
                             train=["norms", "embedding", "output"])),
    "tied": ("qwen2", dict(targets=["q", "down"], train=["embedding"])),
    "fused": ("internlm2", dict(targets=["wqkv", "wo", "w1"])),
    "apart": ("internlm2", dict(targets=["q", "v", "w3"])),
}  # fmt: skip


def names_in_peft(model: CausalLM, family: str) -> dict[str, str]:
    """Our trained parameters by PEFT's names, where one is one."""
    form, found = FAMILIES[family], {}
    for name, p in model.named_parameters():
        matrix, adapter, rest = name.partition(".adapter.")
        if not p.requires_grad:
            continue
        if not adapter:
            found[f"{PREFIX}{form.stored(name, model.config)[0].name}"] = name
            continue
        part, _, key = rest.partition(".")
        rows = getattr(model.get_submodule(f"{matrix}.adapter"), part).rows
        for stored in form.stored(f"{matrix}.weight", model.config):
            if stored_rows(stored) == rows:
                module = stored.name.removesuffix(".weight")
                last = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}[key]
                found[f"{PREFIX}{module}.{last}"] = name
    return found


def require_whole_matrices(folder: Path) -> None:
    """For files with one matrix of q, k and v: their factors side by side; others have zeros, for the same rank."""
    saved = next(folder.glob("iter_*.pth"))
    export_peft(saved, folder / "own", "internlm2", torch.float32)
    tensors = load_file(folder / "own" / "adapter_model.safetensors")
    config = json.loads((folder / "own" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16.0, ["wqkv", "w3"])
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(export_hf(saved, folder / "merged", None, None, torch.float32) / "model.safetensors")
    for module in ("attention.wqkv", "feed_forward.w3"):
        name = f"model.layers.1.{module}"
        a, b = (tensors[f"{PREFIX}{name}.lora_{kind}.weight"] for kind in "AB")
        assert len(a) == b.shape[1] == 8
        torch.testing.assert_close(base[f"{name}.weight"] + 2 * b @ a, merged[f"{name}.weight"])


@pytest.mark.processes
def test_equal_to_peft(tmp_path: Path) -> None:
    if not (PEFT / "installed").is_file():
        pytest.skip("`make peft` downloads PEFT")
    jobs, models = [], {}
    for case, (family, settings) in CASES.items():
        folder = tmp_path / case
        base = write_base(folder / "base", family, **({"tie_word_embeddings": True} if case == "tied" else {}))
        saved, models[case] = trained_checkpoint(with_lora(base, **settings), folder)
        layout = "llama" if family == "internlm2" else None
        export_peft(saved, folder / "peft", layout, torch.float32)
        if layout:  # transformers has no InternLM2
            base = export_hf(base, folder / "llama", None, layout, torch.float32)
            adapter = open_peft(folder / "peft", base)
            assert (load_adapted(adapter, adapter.find_base(base))(torch.tensor(IDS)) - models[case](torch.tensor(IDS))
                    ).abs().max() < 1e-5  # fmt: skip
            assert f"{folder / 'base'}, converted to the llama layout" in (folder / "peft" / "README.md").read_text()
        jobs.append(dict(base=str(base), adapter=str(folder / "peft"), ids=IDS, lr=LR, steps=STEPS,
                         out=str(folder / "theirs.safetensors")))  # fmt: skip
    require_whole_matrices(tmp_path / "apart")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "PYTHONPATH": str(PEFT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, EXTERNAL / "peft_lora.py", tmp_path / "jobs.json"], env=env, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for case, model in models.items():
        theirs = load_file(tmp_path / case / "theirs.safetensors")
        ids = torch.tensor(IDS)
        with torch.no_grad():
            assert (model(ids) - theirs["logits"]).abs().max() < 1e-5, case
        for module in model.modules():
            if hasattr(module, "gradient_sums"):
                module.gradient_sums.clear()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        targets, parameters = F.pad(ids[1:], (0, 1), value=-100), dict(model.named_parameters())
        # as one pair of factors, q, k and v share A; PEFT's copies of it part in the first step
        for step in range(STEPS + 1 if case != "fused" else 1):
            optimizer.zero_grad()
            loss = model(ids, targets=targets) / (len(ids) - 1)
            assert abs(loss.item() - theirs[f"loss {step}"].item()) < 2e-5, (case, step)
            loss.backward()
            named = names_in_peft(model, CASES[case][0].replace("internlm2", "llama"))
            assert len(named) == sum(n.startswith("gradient") for n in theirs) or case == "fused"
            for name, ours in named.items() if not step else ():
                expected, found = theirs[f"gradient {name}"], parameters[ours].grad
                assert found is not None
                assert (found - expected).abs().max() < 1e-5 * max(float(expected.abs().max()), 1.0), (case, name)
            optimizer.step()


def test_adapters_with_which_peft_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by the name of the setting; what does not matter for a trained adapter is not."""
    base = write_base(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    saved, model = trained_checkpoint(with_lora(base, targets=["q"], train=["embedding"]), tmp_path)
    folder = export_peft(saved, tmp_path / "peft", None, torch.float32)
    file, settings = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())

    def read(**changes: Any) -> CausalLM:
        write_json(folder / "adapter_config.json", settings | changes)
        return load_adapted(open_peft(folder, base), base)

    unused = dict(init_lora_weights="gaussian", rank_pattern={}, loftq_config={}, revision="x")
    with torch.no_grad():
        assert read(**unused)(torch.tensor(IDS)).equal(model(torch.tensor(IDS)))
    for changes, key in (
        (dict(alpha_pattern={"q_proj": 32}), "alpha_pattern"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (dict(layers_to_transform=[1]), "layers_to_transform"),
        (dict(a_newer_variant=True), "a_newer_variant"),
        (dict(ensure_weight_tying=False), "embedding and the output layer apart"),
    ):
        with pytest.raises(ConfigError, match=key):
            read(**changes)
    tensors = load_file(file)
    save_file(tensors | {f"{PREFIX}lm_head.weight": tensors[f"{PREFIX}lm_head.weight"] + 1}, file)
    with pytest.raises(ConfigError, match="embedding and the output layer apart"):
        read()
    save_file({n: t for n, t in tensors.items() if n != f"{PREFIX}lm_head.weight"}, file)
    read()
    adapter, warnings = open_peft(folder, base), []
    monkeypatch.setattr(logger, "warning", warnings.append)
    for name in (str(base), "", "another/model"):  # without an identity
        replace(adapter, base=BaseModel(name, "")).find_base(base)
    (warning,) = warnings
    assert "names another/model as the model that it was trained on" in warning


def test_an_adapter_on_a_text_part(tmp_path: Path) -> None:
    """It is exported as the family that the text part is trained as, and read again on the complete model."""
    base = write_base(tmp_path / "base", "qwen3", head_dim=16)
    tensors, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    inner = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    save_file(inner | {"model.vision_tower.x": torch.ones(2)}, base / "model.safetensors")
    write_json(base / "config.json", {"model_type": "interns1", "text_config": config, "vision_config": {}})
    saved, model = trained_checkpoint(with_lora(base), tmp_path)
    exported = export_peft(saved, tmp_path / "peft", None, torch.float32)
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(exported / "adapter_model.safetensors")
    with torch.no_grad():
        assert load_adapted(open_peft(exported, base), base)(torch.tensor(IDS)).equal(model(torch.tensor(IDS)))
