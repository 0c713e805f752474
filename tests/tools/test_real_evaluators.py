"""The real evaluators, OpenCompass and lm-eval, on a CPU. `make test-interop` installs and runs them.

What they say of a model is compared with what the model here says; docs/interop.md reports it.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corpus import VOCABULARY, train_tokenizer

from xtuner.data.chat_template import PROMPT_TEMPLATE
from xtuner.data.format.writer import write_bin
from xtuner.data.tokenizer import load_tokenizer
from xtuner.tools.evaluators.environment import MARK, Environment
from xtuner.tools.evaluators.process import ToolError, environ

pytestmark = pytest.mark.interop
Command = Callable[..., int]
CACHE = Path(os.environ.get("XTUNER_TEST_CACHE") or Path.home() / ".cache" / "xtuner-tests")
IM_START, IM_END = VOCABULARY, VOCABULARY + 1
LEARNT = {
    "What is def?": "a keyword",
    "And import?": "a statement",
    "Who is os?": "a module",
    "What is 3?": "a number",
}
TEXTS = ["What is def? a keyword", "import os\nfrom pathlib import Path", "x", "  é好\t<|im_end|>\n\n"]


@pytest.fixture(scope="module")
def place() -> Environment:
    made = Environment(CACHE / "evaluation", "xtuner eval opencompass")
    if not (made.folder / MARK).is_file():
        pytest.skip(f"OpenCompass is not in {made.folder}: `make test-interop` installs it")
    return made


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt four answers by heart: config.py, its checkpoint, and exports in both layouts."""
    from xtuner.cli.main import main
    from xtuner.config.load import SHIPPED

    folder = tmp_path_factory.mktemp("interop")
    tokenizer_folder = train_tokenizer(folder / "tokenizer")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = {str(i): {"content": name, **flags} for i, name in ((IM_START, "<|im_start|>"), (IM_END, "<|im_end|>"))}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tokenizer_folder)
    documents = []
    for question, answer in LEARNT.items():
        prompt = [1, *tokenizer.encode(PROMPT_TEMPLATE.internlm2_chat.prompt(question))]
        documents.append([-i for i in prompt] + tokenizer.encode(f"{answer}<|im_end|>"))
    write_bin(folder / "data" / "en" / "a.bin", documents * 30)
    text = (SHIPPED / "internlm2_tiny_w_tokenized_dataset.py").read_text()
    for old, new in (
        ("/path/to/your/dataset", str(folder / "data")),
        ("/path/to/your/tokenizer", str(tokenizer_folder)),
        ("vocab_size = 2048", f"vocab_size = {VOCABULARY + 2}"),
        ("hidden_size = 256", "hidden_size = 128"),
        ("num_layers = 4", "num_layers = 2"),
        ("max_length = 1024", "max_length = 128"),
        ("max_epochs = 1", "max_epochs = 10"),
        ("lr = 2e-3", "lr = 3e-3"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (folder / "learnt.py").write_text(text)
    config, work_dir = str(folder / "learnt.py"), folder / "run"
    assert main(["train", config, "--work-dir", str(work_dir), "--cfg-options", "custom_hooks=[]"]) == 0
    last = work_dir / (work_dir / "last_checkpoint").read_text().strip()
    last.rename(folder / "checkpoint")
    for layout in ("internlm2", "llama"):
        words = [config, str(folder / "checkpoint"), str(folder / layout), "--layout", layout, "--fp32"]
        assert main(["convert", "pth_to_hf", *words]) == 0
    return folder


@pytest.fixture
def opencompass(place: Environment, tmp_path: Path, xtuner: Command) -> Callable[..., int]:
    return lambda *words: xtuner("eval", "opencompass", *words, "--env", place.folder, "--work-dir", tmp_path / "w")


def in_place(place: Environment, code: str, *words: object) -> Any:
    """What a script prints as JSON, in the evaluators' environment."""
    command = [str(place.python), "-c", code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path, ids: list[int]) -> list[float]:
    """Of every token but the first, in nats, by the network here."""
    from xtuner.model import load_pretrained

    with torch.no_grad():
        logits = load_pretrained(folder)(torch.tensor(ids))
    return (-logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]).tolist()


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def results_of(shown: str) -> Path:
    found = re.search(r"^results: (.+)$", shown, re.MULTILINE)
    assert found, shown
    return Path(found[1])


def test_transformers_4_reads_our_tokenizers(place: Environment, run_dir: Path) -> None:
    """Ids, the chat template and where to stop; of both layouts, with and without leave to run code."""
    code = """
import json, sys
from transformers import AutoTokenizer, GenerationConfig, __version__
folder, texts = sys.argv[1], json.loads(sys.argv[2])
found = []
for trust in (False, True):
    t = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    asked = t.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    found.append([[t(x).input_ids for x in texts], asked, t.pad_token_id])
print(json.dumps([__version__, found, GenerationConfig.from_pretrained(folder).eos_token_id]))
"""
    for layout in ("internlm2", "llama"):
        tokenizer = load_tokenizer(run_dir / layout)
        version, found, stops = in_place(place, code, run_dir / layout, json.dumps(TEXTS))
        assert version.startswith("4.")
        ids = [[1, *tokenizer.encode(text)] for text in TEXTS]
        assert found == [[ids, "<s>" + PROMPT_TEMPLATE.internlm2_chat.prompt("hi"), 2]] * 2
        assert stops == [2, IM_END]


def test_a_multiple_choice_file(opencompass: Command, run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """OpenCompass's perplexity of every option, and its choice, are those of the network here."""
    options = dict(zip("ABCD", sorted(LEARNT.values()), strict=True))
    letter = {answer: name for name, answer in options.items()}
    rows = [{"question": q, **options, "answer": letter[a]} for q, a in LEARNT.items()]
    file = write_rows(tmp_path / "choice.jsonl", rows)
    capsys.readouterr()
    # one at a time: among several, it fills up on the left, and adds what the last blank says of the first token
    assert opencompass(run_dir / "internlm2", "--custom", file, "--batch-size", "1") == 0
    shown = capsys.readouterr().out
    results = results_of(shown)
    predictions = json.loads(next(results.glob("predictions/*/choice.json")).read_text())
    tokenizer = load_tokenizer(run_dir / "internlm2")
    right = 0
    for i, row in enumerate(rows):
        found = predictions[str(i)]
        own = {}
        for name in options:
            text = found[f"label: {name}"]["testing input"]
            assert text.startswith(f"Question: {row['question']}\nA. ")
            assert text.endswith(f"Answer: {name}")
            ids = [1, *tokenizer.encode(text)]
            # OpenCompass divides by all tokens, also the first, which has no loss
            own[name] = sum(losses(run_dir / "internlm2", ids)) / len(ids)
            assert found[f"label: {name}"]["PPL"] == pytest.approx(own[name], abs=1e-4)
        assert found["prediction"] == min(own, key=lambda name: own[name])
        right += found["prediction"] == row["answer"]
    assert re.search(rf"^choice +\w+ +accuracy +ppl +{100 * right / len(rows):.2f}$", shown, re.MULTILINE)


def test_a_question_file_from_a_checkpoint(opencompass: Command, run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """By the chat template, as it was learnt: each answer word for word, ended by <|im_end|>; a wrong key counts."""
    rows = [{"question": q, "answer": a} for q, a in LEARNT.items()]
    rows.append({"question": "Who is os?", "answer": "a number"})
    file = write_rows(tmp_path / "asked.jsonl", rows)
    capsys.readouterr()
    assert opencompass(run_dir / "learnt.py", run_dir / "checkpoint", "--custom", file, "--max-out-len", "16") == 0
    shown = capsys.readouterr().out
    predictions = json.loads(next(results_of(shown).glob("predictions/*/asked.json")).read_text())
    assert [p["prediction"] for p in predictions.values()] == [*LEARNT.values(), "a module"]
    assert re.search(r"^asked +\w+ +accuracy +gen +80\.00$", shown, re.MULTILINE)


@pytest.mark.processes
def test_a_dataset_of_its_own_from_disk(opencompass: Command, run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """By name, with the data below --data: every row of it is asked, and there is a score."""
    rows = [{"question": question, "answer": "So it is #### 7"} for question in LEARNT]
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / "gsm8k" / f"{split}.jsonl", rows)
    capsys.readouterr()
    assert opencompass(run_dir / "llama", "--datasets", "gsm8k_gen", "--data", tmp_path) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^gsm8k +\w+ +accuracy +gen +\d+\.\d\d$", shown, re.MULTILINE)
    predictions = json.loads(next(results_of(shown).glob("predictions/*/gsm8k.json")).read_text())
    asked = [prediction["origin_prompt"][-1]["prompt"] for prediction in predictions.values()]
    assert [next(q for q in LEARNT if q in prompt) for prompt in asked] == list(LEARNT)


def test_a_task_that_fails(opencompass: Command, run_dir: Path, tmp_path: Path) -> None:
    """OpenCompass ends with 0; the error here names the task's log and what it said."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (run_dir / "llama").iterdir():
        if file.name != "manifest.json":
            (broken / file.name).write_bytes(file.read_bytes())
    os.truncate(broken / "model.safetensors", 1000)
    file = write_rows(tmp_path / "q.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(ToolError, match=r"(?s)no score for q\n.*logs/infer/broken-hf/q\.out.*Safetensor"):
        opencompass(broken, "--custom", file)


@pytest.mark.processes
def test_the_turbomind_config(place: Environment, opencompass: Command, run_dir: Path, tmp_path: Path) -> None:
    """It passes OpenCompass's own dry run, alone, in a config of a user, and by our verb; its class knows all keys."""
    file = write_rows(tmp_path / "q.jsonl", [{"question": "x", "answer": "y"}])
    mine = run_dir / "mine.py"
    mine.write_text(f"""
from mmengine.config import read_base
with read_base():
    from .llama.opencompass_turbomind import models
datasets = [dict(path={str(file)!r}, data_type="qa", infer_method="gen")]
""")
    for config, tasks in ((run_dir / "internlm2" / "opencompass_turbomind.py", 0), (mine, 1)):
        words = [place.folder / "bin" / "opencompass", config, "--dry-run"]
        done = subprocess.run(words, cwd=tmp_path, env=environ(), check=True, capture_output=True, text=True)
        assert f"Partitioned into {tasks} tasks" in done.stdout + done.stderr
    assert opencompass(run_dir / "internlm2", "--backend", "turbomind", "--custom", file, "--dry-run") == 0
    assert "Partitioned into 1 tasks" in (tmp_path / "w" / "opencompass.log").read_text()
    code = """
import inspect, json, sys
from mmengine.config import Config
from opencompass.registry import MODELS
not_the_models = {"type", "abbr", "max_out_len", "batch_size", "run_cfg"}  # `build_model_from_cfg` takes them out
found = {}
for path in sys.argv[1:]:
    (entry,) = Config.fromfile(path, format_python_code=False)["models"]
    cls = entry["type"] if isinstance(entry["type"], type) else MODELS.get(str(entry["type"]))
    takes = inspect.signature(cls.__init__).parameters
    found[cls.__name__] = sorted(entry.keys() - not_the_models - takes.keys())
print(json.dumps(found))
"""
    from xtuner.export.opencompass import CLASSES, Settings, config_text

    files = []
    for i, (backend, kind) in enumerate(CLASSES):
        files.append(tmp_path / f"m{i}.py")
        files[-1].write_text(config_text(run_dir / "llama", backend, run_dir / "llama", "x", Settings(kind=kind)))
    assert in_place(place, code, *files) == {name: [] for name in CLASSES.values()}


def test_lm_eval_agrees_with_eval_loss(
    place: Environment, run_dir: Path, tmp_path: Path, xtuner: Command, capsys: Any
) -> None:
    """Sums of log-likelihoods of given texts, whole and behind a context, against `eval loss` of the same tokens."""
    tokenizer = load_tokenizer(run_dir / "llama")
    texts = [*LEARNT, "def main(words: list[str]) -> int:\n    return len(words)\n", "é好 and ▁"]
    pairs = [(q, f" {a} and so on") for q, a in LEARNT.items()]
    write_rows(tmp_path / "rolling.jsonl", [{"text": text} for text in texts])
    write_rows(tmp_path / "behind.jsonl", [{"context": c, "continuation": t} for c, t in pairs])
    tasks = {
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: bits_per_byte}]\n",
        "behind": 'output_type: loglikelihood\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{continuation}}"\n'
        'target_delimiter: ""\nmetric_list: [{metric: perplexity}]\n',
    }
    (tmp_path / "tasks").mkdir()
    for name, text in tasks.items():
        data = f"task: own_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n"
        data += f"    test: {tmp_path / name}.jsonl\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(data + text)
    documents = {
        "rolling": [[1, *tokenizer.encode(text)] for text in texts],
        "behind": [[-i for i in (1, *tokenizer.encode(c))] + tokenizer.encode(t) for c, t in pairs],
    }
    shared = ("--include-path", tmp_path / "tasks", "--env", place.folder, "--work-dir", tmp_path / "w")
    for name, more in (("rolling", ["--model-args", "add_bos_token=False"]), ("behind", [])):
        write_bin(tmp_path / name / "en" / "a.bin", documents[name])
        capsys.readouterr()
        assert xtuner("eval", "loss", run_dir / "llama", tmp_path / name) == 0
        row = capsys.readouterr().out.splitlines()[-1].split()
        tokens, loss = int(row[1].replace(",", "")), float(row[2])
        words = ("--tasks", f"own_{name}", *more, *shared, "--extra", "--log_samples")
        assert xtuner("eval", "lm-eval", run_dir / "llama", *words) == 0
        shown = capsys.readouterr().out
        assert f"own_{name} " in shown
        (samples,) = results_of(shown).parent.glob(f"samples_own_{name}_*.jsonl")
        total = 0.0
        for line in samples.read_text().splitlines():
            value = json.loads(line)["filtered_resps"][0]
            total -= float(value[0] if isinstance(value, list) else value)
        assert tokens == sum(sum(i > 0 for i in document[1:]) for document in documents[name])
        with capsys.disabled():  # for docs/interop.md
            print(f"\n{name}: {tokens} tokens, lm-eval {total / tokens:.6f}, eval loss {loss:.4f} nats a token")
        assert total / tokens == pytest.approx(loss, abs=1e-3)


def test_names_that_they_do_not_have(place: Environment, run_dir: Path, tmp_path: Path, xtuner: Command) -> None:
    from xtuner.core.errors import ConfigError

    for words, near in (
        (("opencompass", run_dir / "llama", "--datasets", "mmlu"), "mmlu_ppl"),
        (("lm-eval", run_dir / "llama", "--tasks", "arc_easi"), "arc_easy"),
    ):
        with pytest.raises(ConfigError, match=rf"{words[-1]}'(?s:.*)close are: .*\b{near}\b"):
            xtuner("eval", *words, "--env", place.folder, "--work-dir", tmp_path / "w")
