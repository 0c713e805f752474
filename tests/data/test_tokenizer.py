"""Token ids equal to InternLM2's own tokenizers; text that spells a special token's name stays text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import TOKENIZER_TEXT, reference

from xtuner.core.errors import ConfigError
from xtuner.data.tokenizer import Tokenizer, load_tokenizer

CHAT = {"<|plugin|>": 92538, "<|interpreter|>": 92539, "<|action_end|>": 92540, "<|action_start|>": 92541}
CHAT |= {"<|im_end|>": 92542, "<|im_start|>": 92543}
ALL = {"<unk>": 0, "<s>": 1, "</s>": 2, **CHAT}


@pytest.fixture(scope="module", params=["model file alone", "with tokenizer_config.json"])
def internlm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("internlm2")
    shutil.copy(reference("tokenizer", "internlm2_tokenizer.model"), folder / "tokenizer.model")
    if request.param != "model file alone":
        listed = {str(i): {"content": name, "special": True} for name, i in CHAT.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return load_tokenizer(folder)


def strings() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(reference("tokenizer", "strings.json").read_text())
    return found


def test_ids_of_the_reference(internlm2: Tokenizer) -> None:
    assert len(strings()) == 78
    for case in strings():
        text = case["text"]
        assert internlm2.encode(text) == case["fast"]["ids"] or text == "[UNUSED_TOKEN_140]", text
        if text != "[UNUSED_TOKEN_145] raw piece name":  # the piece of <|im_end|>: see below
            assert internlm2.encode_plain(text) == case["sp_ids"], text
        assert internlm2.encode_plain(text, ["<s>", "</s>", "<unk>"]) == case["bare"]["ids"] or "[UNUSED" in text
        if "[UNUSED" not in text:
            assert internlm2.decode(case["fast"]["ids"]) == case["fast"]["decode"], text


def test_chat_ids_of_the_reference(internlm2: Tokenizer) -> None:
    for case in json.loads(reference("tokenizer", "chat.json").read_text()):
        for form in ("hf_chat_template", "hf_chat_template_gen_prompt"):
            assert internlm2.encode(case[form]["text"]) == case[form]["fast_ids"]


def test_facts(internlm2: Tokenizer) -> None:
    assert (internlm2.bos_id, internlm2.eos_id, internlm2.vocab_size) == (1, 2, 92544)
    assert dict(internlm2.special) == ALL


def test_text_cannot_spell_a_special_token(internlm2: Tokenizer) -> None:
    pieces = [f"[UNUSED_TOKEN_{n}]" for n in range(141, 147)]
    for text in [*ALL, *pieces, "a<|im_end|>b", "<|im_start<|im_end|>|>", "[[UNUSED_TOKEN_145]][UNUSED_TOKEN_146]"]:
        ids = internlm2.encode_plain(text)
        assert not set(ids) & {1, 2, *CHAT.values()}, text
        assert internlm2.decode(ids) == text
    assert internlm2.encode_plain("a<s><|im_end|>", ["<s>"])[:2] == [*internlm2.encode_plain("a"), 1]
    for case in strings():
        if "[UNUSED_TOKEN_145]" in case["text"]:
            assert internlm2.encode_plain(case["text"]) == case["fast"]["ids"]


def test_names_that_are_pieces_of_the_model(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT.read_text().split("\n")),
        model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=380, byte_fallback=True,
        add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2, user_defined_symbols=["<|im_start|>", "<tab>"],
    )  # fmt: skip
    # not listed as special, they are ordinary pieces; listed, text cannot spell them
    tokenizer = load_tokenizer(tmp_path)
    (start,), (tab,) = tokenizer.encode_plain("<|im_start|>"), tokenizer.encode_plain("<tab>")
    before = tokenizer.identity()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": {str(start): {"content": "<|im_start|>"}}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>") == [start]
    assert start not in tokenizer.encode_plain("<|im_start|>")
    assert tokenizer.encode_plain("<tab>") == [tab]
    assert tokenizer.decode(tokenizer.encode_plain("x<|im_start|>y")) == "x<|im_start|>y"
    assert tokenizer.identity() != before
    config.write_text(json.dumps({"added_tokens_decoder": {"900": {"content": "<|added|>"}}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 901
    assert tokenizer.encode("<|added|>") == [900]


def test_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["a word and a word"] * 10, trainer)
    model.add_special_tokens([AddedToken("<|bos|>"), AddedToken("<|end|>")])
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    bos, end = tokenizer.special["<|bos|>"], tokenizer.special["<|end|>"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, end)
    assert tokenizer.encode("a<|end|>") == [*tokenizer.encode("a"), end]
    plain = tokenizer.encode_plain("a<|bos|>b<|end|>")
    assert not {bos, end} & set(plain)
    assert tokenizer.decode(plain) == "a<|bos|>b<|end|>"
    assert {bos, end} & set(tokenizer.encode_plain("a<|bos|>b<|end|>", ["<|end|>"])) == {end}
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).bos_id is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_folders_without_a_readable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.model cannot be read"):
        load_tokenizer(tmp_path)
