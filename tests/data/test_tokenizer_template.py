"""The chat template in a tokenizer's folder: transformers' text and ids, what is learned, chat, and what is refused.

The templates here have the peculiarities of released ones: a default system prompt, texts that are stripped, thoughts
that only the last answer keeps, a system prompt in the user's turn, roles that must alternate.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.neighbours import DEEPSEEK, LLAMA, QWEN, write_model, write_tokenizer
from helpers.paths import reference

from xtuner.core.errors import ConfigError, DataError
from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.tokenizer import load_tokenizer
from xtuner.data.tokenizer_template import is_same, read_template
from xtuner.families.chat import Message
from xtuner.families.internlm2 import InternLM2
from xtuner.families.mistral import MISTRAL_CHAT

MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")
TEMPLATES = {
    "qwen2.5": """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are useful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "qwen3": """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set text = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}
            {%- set thought = '' %}
            {%- if '</think>' in message.content %}
                {%- set thought = message.content.split('</think>')[0].split('<think>')[-1] %}
            {%- endif %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text }}
        {%- else %}{{- text }}{%- endif %}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "llama3": """{{- bos_token }}{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {%- if message.role == 'assistant' %}{% generation %}{{ '' }}{% endgeneration %}{% endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    "deepseek": "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% else %}"
    "{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST]' }}{% if loop.first and system is defined %}{{ system + '\n\n' }}"
    "{% endif %}{{ message.content + '[/INST]' }}{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}",
}
MARKS = {"qwen2.5": QWEN, "qwen3": QWEN, "llama3": LLAMA, "deepseek": DEEPSEEK, "mistral": MISTRAL}
BEGINS = {"llama3": LLAMA[0], "deepseek": DEEPSEEK[0], "mistral": "<s>"}
ENDS = {
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "deepseek": DEEPSEEK[1],
    "mistral": "</s>",
}
TALK = [("system", "Be brief."), ("user", " Hi \n"), ("assistant", "Yes!"), ("user", "Why?"), ("assistant", " So. ")]
THOUGHT = "<think>\nHm.\n</think>\n\nFine."


def folder_of(name: str, folder: Path, **config: object) -> Path:
    written = {"chat_template": TEMPLATES[name], "bos_token": BEGINS.get(name), "eos_token": ENDS[name], **config}
    return write_tokenizer(folder, MARKS[name], **written)


def messages_of(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_ids_and_what_is_learned(name: str, tmp_path: Path, xtuner: Callable[..., int]) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(name, tmp_path / "tokenizer")
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    template = read_template(tokenizer)
    assert template is not None
    assert template.stop_words == (ENDS[name],)
    talks = [TALK, TALK[1:], [*TALK[:4], ("assistant", THOUGHT)], [*TALK[:2], ("assistant", THOUGHT), *TALK[3:]]]
    for case in json.loads(reference("tokenizer", "chat.json").read_text()):
        talk = [(m["role"], m["content"]) for m in case["messages"] if m["role"] != "function"]
        talks += [talk] if [r for r, _ in talk[-2:]] == ["user", "assistant"] else []
    assert len(talks) > 4
    for talk in talks:
        messages = [Message(*turn) for turn in talk]
        wanted = theirs.apply_chat_template(messages_of(talk[:-1]), tokenize=False, add_generation_prompt=True)
        assert template.prompt_of(messages[:-1]) == wanted
        complete = theirs.apply_chat_template(messages_of(talk), tokenize=False)
        if name == "deepseek" and talk[-1][1] == THOUGHT:
            with pytest.raises(DataError, match="leaves out a part of the last answer"):
                list(template.pieces(messages))
            continue
        pieces = list(template.pieces(messages))
        assert "".join(p.text for p in pieces) == complete
        learned = "".join(p.text for p in pieces if p.learned)
        if name == "qwen3":
            thought, answer = ("Hm.", "Fine.") if talk[-1][1] == THOUGHT else ("", talk[-1][1].lstrip("\n"))
            assert learned.endswith(f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>\n")
        elif talk is TALK:
            space = "" if name == "llama3" else " "
            end = ENDS[name] + ("\n" if name == "qwen2.5" else "")
            assert learned == f"Yes!{end}{space}So.{space}{end}"

    hostile = [("user", "".join(MARKS[name])), ("assistant", "Yes!")]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps(messages_of(t)) for t in (TALK, hostile)) + "\n")
    words = ("--tokenizer", folder, "--output", tmp_path / "data", "--format", "chat", "--workers", 1)
    assert xtuner("data", "tokenize", tmp_path / "talk.jsonl", *words, "--template", "tokenizer") == 0
    (file,) = (tmp_path / "data").rglob("*.bin")
    first, second = (json.loads(line)["tokens"] for line in file.read_text().splitlines())
    if name != "llama3":  # where a run ends between "\n\n" and the answer, as for a server
        text = theirs.apply_chat_template(messages_of(TALK), tokenize=False)
        assert theirs.decode([abs(t) for t in first]) == text
    marks = set(theirs.get_added_vocab().values())
    plain = theirs.apply_chat_template(messages_of([("user", "x"), ("assistant", "Yes!")]))["input_ids"]
    assert sum(abs(t) in marks for t in second) == sum(t in marks for t in plain)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """A file has precedence; of named ones, the default; broken ones are named."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    folder = folder_of("qwen2.5", tmp_path / "a", chat_template=named)
    tokenizer = load_tokenizer(folder)

    def render() -> str:
        found = read_template(tokenizer)
        assert found is not None
        return found.prompt_of([Message("user", "x")])

    assert render() == "<|im_end|>"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert render() == "x!"
    for text, message in (
        ("{% for %}", "the chat template cannot be read"),
        ("{{ 1 / 0 }}", "rejects this conversation: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "rejects this conversation: access to attribute"),
        ("{{ raise_exception('no tools') }}", "rejects this conversation: no tools"),
    ):
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises((ConfigError, DataError), match=message):
            render()
    (folder / "chat_template.jinja").unlink()
    for value, message in (
        (named[:1], "several chat templates and none is named 'default': 'tool_use'"),
        (7, "chat_template = 7 is not a text"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(ConfigError, match=message):
            read_template(tokenizer)


def test_which_template_is_used(tmp_path: Path, tokenizer_folder: Path, xtuner: Callable[..., int]) -> None:
    """In data, a known template that writes the same is preferred: it knows more."""
    from xtuner.data.tokenize.tokenize_settings import TokenizeSettings
    from xtuner.model import from_scratch

    def chosen(folder: Path, template: str = "auto") -> str:
        return TokenizeSettings(str(folder), template=template).for_tokenizer(load_tokenizer(folder)).template

    assert chosen(folder_of("qwen2.5", tmp_path / "qwen")) == "tokenizer"
    assert chosen(folder_of("llama3", tmp_path / "llama")) == "llama3_chat"
    assert chosen(folder_of("mistral", tmp_path / "mistral")) == "mistral"
    internlm2 = InternLM2.chat.jinja()
    folder = folder_of("qwen2.5", tmp_path / "same", chat_template=internlm2)
    assert chosen(folder) == "qwen_chat"
    template = read_template(load_tokenizer(folder))
    assert template is not None
    assert is_same(template, InternLM2.chat)
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        chosen(tokenizer_folder, "tokenizer")

    c = from_scratch(
        family="qwen2", vocab_size=500, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=0, seed=0,
    ).config  # fmt: skip
    write_model(tmp_path / "hf", c, "qwen2")
    words = ("--tokenizer", folder_of("qwen3", tmp_path / "q3"), "--prompt", "Hi", "--max-new-tokens", 2)
    assert xtuner("chat", tmp_path / "hf", *words) == 0
    assert xtuner("chat", tmp_path / "hf", *words, "--template", "tokenizer", "--system", "x") == 0
    assert PROMPT_TEMPLATE.tokenizer.name == "tokenizer"
    words = ("--tokenizer", tmp_path / "mistral", "--prompt", "Hi")
    (tmp_path / "mistral" / "chat_template.jinja").write_text(TEMPLATES["mistral"].replace("== 0", "== 1"))
    with pytest.raises(DataError, match="rejects this conversation: roles must alternate"):
        xtuner("chat", tmp_path / "hf", *words)


def test_mistral_keeps_the_system_prompt() -> None:
    talk = [Message(*turn) for turn in (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))]
    assert MISTRAL_CHAT.prompt_of(talk) == "[INST]S\n\nU[/INST]A</s>[INST]V[/INST]"
