"""Every shipped family against its class in transformers: files in both directions, bit for bit, and logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.neighbours import CASES, LLAMA3, SHAPE, make_theirs
from safetensors.torch import load_file, save_file

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import write_json
from xtuner.export.hf import export_hf
from xtuner.families import FAMILIES, QWEN2, checkpoint_config, read_config, read_model
from xtuner.model import from_pretrained, from_scratch, load_pretrained
from xtuner.model.decoder import CausalLM
from xtuner.model.weights import split_for_family


@pytest.mark.parametrize("name", CASES)
def test_files_in_both_directions(name: str, tmp_path: Path) -> None:
    """transformers → xtuner → transformers: logits within 1e-5, tensors and fields of the network equal."""
    import transformers

    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 131, (80,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs(ids[None]).logits[0], ours(ids)
    assert (wanted - found).abs().max() < 1e-5

    exported = export_hf(tmp_path / "theirs", tmp_path / "ours", None, dtype=torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", exported))
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert not any(report.values())
    written = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    old, new = ({k: v for k, v in m.config.to_dict().items() if k not in written} for m in (theirs, again))
    new["rope_parameters"].pop("type", None)  # its name before transformers 4.45, written as well
    assert {"head_dim": 12, **new} == {"head_dim": 12, **old}
    with torch.no_grad():
        assert (again.eval()(ids[None]).logits[0] - wanted).abs().max() < 1e-5


def split_model(model: CausalLM, family: str) -> dict[str, torch.Tensor]:
    """The model's tensors in the files of its family."""
    c, form = model.config, FAMILIES[family]
    found = {k: t for n, w in model.state_dict().items() for k, t in split_for_family(n, w, form, c).items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    """A copy is not needed and not written again; another weight is an error."""
    qwen = from_scratch(family="qwen2", seed=0, **SHAPE, tie_word_embeddings=True).config
    weights = split_model(CausalLM(qwen), "qwen2")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(QWEN2.write_config(qwen, "float32")))
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / "hf" / "model.safetensors")
    exported = export_hf(tmp_path / "hf", tmp_path / "again", None)
    assert load_file(exported / "model.safetensors").keys() == weights.keys()
    load_pretrained(tmp_path / "hf")
    save_file(weights | {"lm_head.weight": head + 1}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        load_pretrained(tmp_path / "hf")
    more = {"lm_head.weight": head + 1, "model.layers.0.self_attn.q_norm.weight": torch.ones(12)}
    save_file(weights | more, tmp_path / "hf" / "model.safetensors")  # of another family: that is reported first
    with pytest.raises(CheckpointError, match=r"not in the model; the first is .*q_norm"):
        load_pretrained(tmp_path / "hf")


def test_the_text_part_of_interns1(tmp_path: Path) -> None:
    """It is read as the Qwen3 that it is, without its vision tower, and exported as Qwen3."""
    qwen = from_scratch(family="qwen3", seed=0, **{**SHAPE, "head_dim": 16}).config
    weights = dict(CausalLM(qwen).state_dict())
    interns1 = FAMILIES["interns1"]
    files = {k: t for name, w in weights.items() for k, t in split_for_family(name, w, interns1, qwen).items()}
    assert {"model.language_model.layers.1.self_attn.q_norm.weight", "lm_head.weight"} < files.keys()
    text = FAMILIES["qwen3"].write_config(qwen, "float32")
    (tmp_path / "s1").mkdir()
    vision = {"model.vision_tower.x": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)}
    save_file({k: t.contiguous() for k, t in files.items()} | vision, tmp_path / "s1" / "model.safetensors")
    config = {"model_type": "interns1", "text_config": text, "vision_config": {}, "auto_map": {"AutoConfig": "x.Y"}}
    (tmp_path / "s1" / "config.json").write_text(json.dumps(config))
    source = from_pretrained(str(tmp_path / "s1"))
    assert (source.config, source.config.family) == (qwen, "qwen3")
    ours = load_pretrained(tmp_path / "s1")
    assert all(tensor.equal(weights[name]) for name, tensor in ours.state_dict().items())
    exported = export_hf(tmp_path / "s1", tmp_path / "hf", None, dtype=torch.float32)
    assert json.loads((exported / "config.json").read_text())["model_type"] == "qwen3"
    with pytest.raises(ConfigError, match="no vision tower, which the interns1 layout cannot express"):
        export_hf(tmp_path / "s1", tmp_path / "other", None, layout="interns1")
    bare = {key: value for key, value in text.items() if key != "tie_word_embeddings"}
    assert read_config(config | {"text_config": bare, "tie_word_embeddings": True}).tie_word_embeddings
    config["text_config"] = text | {"model_type": "qwen3_moe", "num_experts": 128}
    with pytest.raises(
        ConfigError, match=r"'qwen3_moe' is a Mixture-of-Experts model \(text_config.num_experts = 128\)"
    ):
        read_config(config)


def written(family: str, **changes: Any) -> dict[str, Any]:
    config = from_scratch(family=family, **{**SHAPE, "num_hidden_layers": 2}).config
    return FAMILIES[family].write_config(config, "float32") | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (written("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 7.0}),
         r"rope_theta = 1000000\.0 contradicts rope_parameters.rope_theta = 7\.0"),
        (written("llama", rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0}),
         "rope_scaling.type = 'linear' contradicts rope_scaling.rope_type = 'dynamic'"),
        (written("llama", rope_scaling={"type": "linear", "factor": 2.0},
                 rope_parameters={"rope_type": "linear", "factor": 4.0}),
         r"rope_scaling.factor = 2\.0 contradicts rope_parameters.factor = 4\.0"),
        (written("llama", rope_scaling={"type": "linear", "factor": 2.0, "rope_theta": 7.0}),
         r"rope_theta = 10000\.0 contradicts rope_scaling.rope_theta = 7\.0"),
        (written("llama", rope_scaling=LLAMA3, rope_theta=5e5, rope_parameters=LLAMA3 | {"low_freq_factor": 2.0}),
         r"rope_scaling.low_freq_factor = 1\.0 contradicts rope_parameters.low_freq_factor = 2\.0"),
        (written("llama", rope_scaling=LLAMA3, rope_theta=5e5, original_max_position_embeddings=32),
         "rope_scaling.original_max_position_embeddings = 16 contradicts original_max_position_embeddings = 32"),
        (written("llama", rope_scaling={"rope_type": "dynamic"}), r"where: .*rope_scaling\.factor"),
        (written("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
         "rope_scaling of type llama3 has no low_freq_factor"),
        (written("llama", rope_scaling={"factor": 8.0}), r"rope_scaling has factor = 8\.0 and no rope_type"),
        (written("llama", rope_theta=0), "rope_theta = 0 is not a number above 0"),
        (written("llama", rope_theta=None, rope_parameters={"rope_type": "yarn"}), r"where: .*rope_parameters\.factor"),
        (written("llama", quantization_config={"quant_method": "fp8"}),
         r"weights are quantized \('fp8'\)[\s\S]*remove quantization_config"),
        (written("llama", architectures=["MistralForCausalLM"]),
         r"model_type = 'llama' contradicts architectures = \['MistralForCausalLM'\]"),
        (written("mistral", sliding_window=9, layer_types=["sliding_attention", "full_attention"]),
         r"layer_types = \[.*\] contradicts sliding_window = 9"),
        (written("internlm3", attention_bias=True), "qkv_bias = False contradicts attention_bias = True"),
        (written("qwen2", layer_types=["full_attention"]),
         "num_hidden_layers = 2 contradicts the number of layer_types"),
        (written("qwen2", layer_types=["full_attention", "sliding_attention"]),
         "use_sliding_window = False contradicts layer_types = True"),
        (written("qwen3", layer_types=2), "layer_types = 2 is not a list"),
        (written("qwen2", layer_types=None, max_window_layers="x"), "max_window_layers = 'x' is not a number"),
        (written("qwen3", layer_types=["full_attention", "linear_attention"]), "'linear_attention' are not supported"),
        (written("llama", rope_scaling={"rope_type": "longrope", "factor": 2.0}),
         r"rope scaling 'longrope' is not supported[\s\S]*another table beyond the first context"),
        (written("llama", partial_rotary_factor=0.5), r"partial_rotary_factor = 0\.5 is not supported"),
        (written("llama", rope_parameters={"full_attention": {"rope_type": "default"}}), "differ between layers"),
        (written("llama", attention_bias="no"), "attention_bias = 'no' is not true or false"),
        (written("qwen3", model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8),
         r"'qwen3_moe' is a Mixture-of-Experts model \(num_experts = 128\)[\s\S]*a router with its balance loss"),
        (dict(model_type="dbrx", ffn_config={"moe_num_experts": 16}),
         r"'dbrx' is a Mixture-of-Experts model \(ffn_config.moe_num_experts = 16\)"),
        (dict(model_type="omni", talker={"text_config": {"model_type": "t", "num_experts_per_tok": 8, "n_experts": 4}}),
         r"'t' is a Mixture-of-Experts model \(talker.text_config.n_experts = 4\)"),
        (written("llama", model_type="phi3", partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.1),
         r"'phi3' are not supported[\s\S]*closest known family is llama; it has no field partial_rotary_factor "
         r"\(here 0\.5\); no field resid_pdrop \(here 0\.0\); no field embd_pdrop[\s\S]*another condition: partial"),
        (written("internlm3", model_type="internlm4", new_gate=True),
         r"'internlm4' are not supported[\s\S]*closest known family is internlm3; it has no field new_gate"),
        (written("qwen2", model_type="qwen2_vl", vision_config={}, auto_map={"AutoModel": "x.Y"}),
         r"auto_map, is never executed[\s\S]*closest known family is qwen2; it has no field vision_config"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(config)


def test_the_same_network_in_other_words() -> None:
    """Where a value stands does not change the network, nor does a window that is not used."""
    inner = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    wanted = read_config(written("llama", rope_theta=5e5, rope_scaling=LLAMA3))
    assert wanted.rope_scaling
    assert (wanted.rope_theta, wanted.rope_scaling.original_max_position_embeddings) == (5e5, 16)
    for fields in (
        dict(rope_theta=None, rope_scaling=LLAMA3),
        dict(rope_theta=None, rope_scaling=None, rope_parameters=LLAMA3),
        dict(rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters=LLAMA3),
        dict(rope_theta=None, rope_scaling=inner, original_max_position_embeddings=16),
    ):
        assert read_config(written("llama", **fields)) == wanted
    unused = dict(use_sliding_window=False, layer_types=None, max_window_layers=0)
    assert read_config(written("qwen2", sliding_window=0, **unused)) == read_config(written("qwen2"))


def test_files_with_other_weights(tmp_path: Path) -> None:
    """Numbers that are not weights, a tied model that is not said to be one, Mistral's second copy, a file cut off."""
    llama = from_scratch(family="llama", seed=0, **SHAPE)
    weights, config = split_model(llama.build(), "llama"), FAMILIES["llama"].write_config(llama.config, "float32")
    write_json(tmp_path / "config.json", config)
    file = tmp_path / "model.safetensors"
    (name, *_) = weights
    for kind, written_as in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file(weights | {name: weights[name].to(kind)}, file)
        with pytest.raises(CheckpointError, match=rf"{name} contains {written_as} numbers"):
            load_pretrained(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    torch.save(weights | {name: weights[name].to(torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{name} contains int8 numbers"):
        load_pretrained(tmp_path)
    save_file({key: tensor for key, tensor in weights.items() if key != "lm_head.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing[\s\S]*set tie_word_embeddings to true"):
        load_pretrained(tmp_path)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    save_file(weights, file)
    load_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors[\s\S]*complete its copy or download"):
        load_pretrained(tmp_path)


def test_networks_that_a_family_cannot_express() -> None:
    plain = from_scratch(family="llama", **SHAPE).config
    biases = from_scratch(family="internlm3", **SHAPE, qkv_bias=True).config
    for family, network, message in (
        ("qwen2", plain, "no biases of q, k and v, which the qwen2 layout cannot express"),
        ("qwen3", plain, "no norms of q and k"),
        ("mistral", biases, "biases in attention"),
        ("llama", biases, "biases of q, k and v alone"),
        ("llama", from_scratch(family="qwen3", **SHAPE).config, "norms of q and k"),
    ):
        with pytest.raises(ConfigError, match=message):
            FAMILIES[family].write_config(network, "float32")


def test_several_ids_that_end_a_text(tmp_path: Path) -> None:
    """Those of config.json and of generation_config.json end a text, and are written as they were read."""
    llama = from_scratch(family="llama", seed=0, **{**SHAPE, "eos_token_id": [7, 9]})
    assert (llama.config.eos_token_id, llama.config.stop_ids) == (7, (7, 9))
    folder = tmp_path / "hf"
    folder.mkdir()
    parts = split_model(llama.build(), "llama")
    save_file(parts, folder / "model.safetensors")
    write_json(folder / "config.json", FAMILIES["llama"].write_config(llama.config, "float32"))
    write_json(folder / "generation_config.json", {"eos_token_id": [11, 9]})
    _, config = read_model(folder)
    assert config.stop_ids == (11, 9, 7)
    checkpoint = read_config(checkpoint_config(config))
    assert (checkpoint.stop_ids, checkpoint.eos_list) == ((11, 9, 7), (7, 9))
    exported = export_hf(folder, tmp_path / "out", None, dtype=torch.float32)
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == [7, 9]
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [11, 9, 7]
    for key, value in (("generation_config.json", [1, "x"]), ("config.json", [1, 2**40])):
        old = (folder / key).read_text()
        write_json(folder / key, json.loads(old) | {"eos_token_id": value})
        with pytest.raises(ConfigError, match=rf"is not a list of ids of tokens\n  where: .*{key}: eos_token_id"):
            read_model(folder)
        (folder / key).write_text(old)
