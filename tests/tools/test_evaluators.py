"""Others' evaluators without them: configs in exports, questions of one's own, environments, processes, refusals.

With the real ones: `test_real_evaluators.py`.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import write_hf_folder

from xtuner.core.errors import BusyError, CheckpointError, ConfigError, DataError
from xtuner.core.files import verify, write_json
from xtuner.export.opencompass import OpenCompassSettings, render_config, write_configs
from xtuner.tools.evaluators import custom, environment, lm_eval, opencompass
from xtuner.tools.evaluators.environment import MARK, Environment, exclusive, pinned
from xtuner.tools.evaluators.model import EvaluatedModel
from xtuner.tools.evaluators.process import ToolError, bar, run

Command = Callable[..., int]
CHOICE = {"question": "1+1?", "A": "1", "B": "2", "answer": "B"}
QUESTION = {"question": "1+1?", "answer": "2"}


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from xtuner.cli.main import main

    work_dir = tmp_path_factory.mktemp("evaluators") / "w"
    assert main(["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", "custom_hooks=[]"]) == 0
    return work_dir / (work_dir / "last_checkpoint").read_text().strip()


@pytest.fixture(scope="module")
def exported(tiny: Path, trained: Path) -> Path:
    """In the internlm2 layout, fp32; its tokenizer has no chat tokens."""
    from xtuner.cli.main import main

    target = trained.parent.parent / "it's 中"
    assert main(["convert", "pth_to_hf", str(tiny), str(trained), str(target), "--fp32"]) == 0
    return target


def add_chat(folder: Path) -> None:
    """Chat tokens and a template, as InternLM2's exports have them."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    named = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    for i, name in ((398, "<|im_start|>"), (399, "<|im_end|>")):
        settings["added_tokens_decoder"][str(i)] = {"content": name, **named}
    path.write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, 399]}))


def model_of(text: str) -> dict[str, Any]:
    """The one entry of `models` in a config: class name and literals."""
    tree = ast.parse(text)
    (models,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "models")
    assert isinstance(models, ast.List)
    (call,) = models.elts
    assert isinstance(call, ast.Call)
    return {str(k.arg): _value(k.value) for k in call.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return {k.arg: _value(k.value) for k in node.keywords}
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


@pytest.mark.processes
def test_configs_of_an_export(exported: Path, tmp_path: Path) -> None:
    """Both lie in it, sealed with it, with its absolute path; classes, stop words and lengths are the model's."""
    assert {"opencompass_hf.py", "opencompass_turbomind.py"} <= verify(exported)["files"].keys()
    shared = {"path": str(exported), "max_seq_len": 32, "max_out_len": 16, "run_cfg": {"num_gpus": 1}}
    hf = model_of((exported / "opencompass_hf.py").read_text())
    assert hf == shared | {
        "type": "HuggingFaceBaseModel",
        "abbr": "it's 中-hf",
        "model_kwargs": {"trust_remote_code": False, "torch_dtype": "auto", "device_map": "auto"},
        "tokenizer_kwargs": {"trust_remote_code": False},
        "stop_words": ["</s>"],
        "batch_size": 8,
    }
    assert "does not support this layout" in (exported / "opencompass_hf.py").read_text()
    turbomind = model_of((exported / "opencompass_turbomind.py").read_text())
    assert turbomind == shared | {
        "type": "TurboMindModel",  # takes no stop words
        "abbr": "it's 中-turbomind",
        "backend": "turbomind",
        "engine_config": {"tp": 1, "session_len": 32, "max_batch_size": 64},
        "gen_config": {"do_sample": False},
        "batch_size": 64,
    }
    chat = tmp_path / "chat"
    shutil.copytree(exported, chat)
    add_chat(chat)
    found = model_of(
        render_config(chat, "turbomind", chat, "x", OpenCompassSettings(gpus=2, batch_size=3, max_seq_len=20))
    )
    assert (found["type"], found["path"]) == ("TurboMindModelwithChatTemplate", str(chat))
    assert found["stop_words"] == ["</s>", "<|im_end|>"]
    assert found["engine_config"] == {"tp": 2, "session_len": 20, "max_batch_size": 3}
    assert (found["max_out_len"], found["batch_size"], found["run_cfg"]) == (10, 3, {"num_gpus": 2})
    assert model_of(render_config(chat, "hf", chat, "x"))["type"] == "HuggingFacewithChatTemplate"
    assert (
        model_of(render_config(chat, "hf", chat, "x", OpenCompassSettings(kind="base")))["type"]
        == "HuggingFaceBaseModel"
    )


def test_the_engine_of_lmdeploy(tmp_path: Path) -> None:
    """TurboMind, or the PyTorch engine where TurboMind of 0.18.0 would compute another network, or neither."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    some = windows | {"max_window_layers": 1}
    yarn = {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    for i, (family, hf, engine) in enumerate((
        ("internlm3", {}, "turbomind"), ("llama", {"tie_word_embeddings": True}, "turbomind"),
        ("llama", {"mlp_bias": True}, "pytorch"), ("mistral", {}, "pytorch"), ("qwen2", {}, "turbomind"),
        ("qwen2", yarn, "pytorch"), ("qwen3", {"attention_bias": True}, "turbomind"), ("qwen3", windows, "pytorch"),
        ("qwen3", some, ""),
    )):  # fmt: skip
        folder = write_hf_folder(tmp_path / str(i), family, **hf)
        write_configs(folder, folder)
        path = folder / "opencompass_turbomind.py"
        assert path.exists() == bool(engine)
        if engine:
            assert model_of(path.read_text())["backend"] == engine
        else:
            with pytest.raises(ConfigError, match=r"windows in some layers only(?s:.*)use the backend hf"):
                render_config(folder, "turbomind", folder, "x")


@pytest.mark.processes
def test_an_export_without_tokenizer_has_no_configs(exported: Path, tmp_path: Path) -> None:
    from xtuner.export.hf import export_hf

    assert not list(export_hf(exported, tmp_path / "bare", None).glob("opencompass*"))


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ([CHOICE, CHOICE | {"answer": "C"}], 2, "the answer is 'C', not one of A, B"),
        ([CHOICE, {k: v for k, v in CHOICE.items() if k != "B"}], 2, "no 'B'"),
        ([CHOICE, CHOICE | {"C": "3"}], 2, "has 'C', unlike line 1"),
        ([CHOICE | {"topic": "x"}, CHOICE], 2, "lacks 'topic', unlike line 1"),
        ([CHOICE, CHOICE | {"A": 1}], 2, "'A' is 1, not a text"),
        ([QUESTION | {"n": 1}, QUESTION | {"n": "1"}], 2, "another type"),
        ([{"question": "1+1?"}], 1, "no 'answer'"),
        ([QUESTION, {"answer": "2"}], 2, "no 'question'"),
        ([QUESTION, [1]], 2, "not a JSON object"),
        ([QUESTION, b"", QUESTION], 2, "empty"),
        ([QUESTION, b"{", QUESTION], 2, "not JSON"),
        ([QUESTION, b"\xff"], 2, "not UTF-8"),
        ([b"\xef\xbb\xbf{}"], 1, "not JSON"),
        ([], 0, "no rows"),
    ],
)
def test_rows_that_are_wrong(rows: list[Any], line: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    place = f"{path}:{line}" if line else f"{path}"
    with pytest.raises(DataError, match=f"(?s){message}.*where: {place}\\b"):
        custom.check(path)


def test_kinds_of_files(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    for row, kind, infer in ((CHOICE, "mcq", "ppl"), (QUESTION, "qa", "gen"), ({**QUESTION, "A": "x"}, "qa", "gen")):
        path.write_text(json.dumps(row))
        found = opencompass.read_file(path, None)
        assert (found.kind, found.infer, found.by_likelihood) == (kind, infer, infer == "ppl")
        assert found.words[1] == str(path)
    with pytest.raises(ConfigError, match="no options"):
        opencompass.read_file(path, "ppl")
    for bad in (tmp_path / "none.jsonl", tmp_path / "my.csv"):
        with pytest.raises(DataError, match=bad.name):
            custom.check(bad)


@pytest.fixture
def place(tmp_path: Path) -> Environment:
    """A real virtual environment, by hand, that sees our packages and claims to have those that are asked for."""
    made = Environment(tmp_path / "env", "xtuner eval opencompass")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.folder], check=True)
    (made.site_packages() / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    claim(made, "opencompass", pinned("opencompass"))
    datasets = made.site_packages() / "opencompass" / "configs" / "datasets" / "ceval"
    datasets.mkdir(parents=True)
    for name in ("ceval_gen", "ceval_ppl", "cmmlu_ppl", "mathbench_gen", "__init__"):
        (datasets / f"{name}.py").touch()
    return made


def claim(made: Environment, package: str, version: str) -> None:
    for old in made.site_packages().glob(f"{package}-*.dist-info"):
        shutil.rmtree(old)
    info = made.site_packages() / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.processes
def test_an_environment_is_whole_or_not(place: Environment, tmp_path: Path) -> None:
    place.need("opencompass")
    by_hand = "pip install -r .*evaluation.txt"
    with pytest.raises(ConfigError, match=f"(?s)lm_eval is not in the environment.*{by_hand}"):
        place.need("lm_eval")
    claim(place, "opencompass", "0.5.3")
    with pytest.raises(ConfigError, match=f"(?s)opencompass is 0.5.3 there, not {pinned('opencompass')}.*{by_hand}"):
        place.need("opencompass")
    claim(place, "opencompass", pinned("opencompass"))
    for half in ('{"whole": false}', "{", "[]"):
        (place.folder / MARK).write_text(half)
        with pytest.raises(ConfigError, match=r"(?s)incomplete.*xtuner eval opencompass --install --env"):
            place.need("opencompass")
    write_json(place.folder / MARK, {"whole": True})
    place.need("opencompass")
    place.python.unlink()
    place.python.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    place.python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"(?s)does not run.*broken"):
        place.need("opencompass")
    with pytest.raises(ConfigError, match=r"(?s)no such environment.*--install"):
        Environment(tmp_path / "none", "xtuner eval lm-eval").need("lm_eval")


@pytest.mark.slow
@pytest.mark.processes
def test_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """pip itself, without a network: it fails and leaves "incomplete"; made anew; completed; and then nothing to do."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    made = Environment(tmp_path / "env", "xtuner eval opencompass")
    with pytest.raises(ToolError, match=r"(?s)pip.*ERROR: .*opencompass==0.5.4"):
        made.install()
    (made.folder / "rest").touch()
    with pytest.raises(ConfigError, match="incomplete"):
        made.need("opencompass")
    small, more = tmp_path / "evaluation.txt", tmp_path / "turbomind.txt"
    small.write_text("# nothing\n")
    more.write_text("# nothing, too\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", small)
    monkeypatch.setattr(environment, "TURBOMIND", more)
    made.install()
    assert not (made.folder / "rest").exists()
    mark = json.loads((made.folder / MARK).read_text())
    assert mark["whole"]
    before = (made.folder / "install.log").stat().st_mtime_ns
    made.install()
    assert (made.folder / "install.log").stat().st_mtime_ns == before
    (made.folder / "kept").touch()
    made.install(turbomind=True)
    found = json.loads((made.folder / MARK).read_text())
    assert (mark["turbomind"], found["turbomind"]) == (False, True)
    assert found["requirements"] != mark["requirements"]
    assert (made.folder / "kept").exists()
    made.python.unlink()
    made.python.symlink_to("/nowhere")
    made.install()
    made.probe()
    assert not (made.folder / "kept").exists()


def test_where_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for folder, message in (("mine", "something else"), ("mine/thesis.txt", "something else"), ("a b", "of the shell")):
        with pytest.raises(ConfigError, match=message):
            Environment(tmp_path / folder, "x").install()
    with (
        exclusive(tmp_path / ".new.lock", ""),
        pytest.raises(BusyError, match="installs there"),
    ):
        Environment(tmp_path / "new", "x").install()
    with pytest.raises(CheckpointError, match="nothing can be written"):
        Environment(Path("/proc/x"), "x").install()
    monkeypatch.setattr(environment, "NEWEST_PYTHON", (3, 10))
    with pytest.raises(ConfigError, match=r"(?s)Python 3.10 or older.*--env DIR"):
        Environment(tmp_path / "new", "x").install()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new.lock", "mine"]


CHILD = """
import os, subprocess, sys, time
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
print("Asking:  50%|##   | 1/2 [00:01<00:01,  1.00s/it]", end="", flush=True)
child.wait()
"""
PARENT = """
import sys
from pathlib import Path
from xtuner.core import log
from xtuner.core.command import exit_with
from xtuner.tools.evaluators import process
log.setup()
process.REPORT_EVERY = process.GRACE = 0.2
folder = Path(sys.argv[1])
log_file = folder / "log"
words = [sys.executable, "-c", sys.argv[2], str(folder / "pids")]
exit_with(lambda: process.run(words, log_file, lambda: process.bar(log_file), folder, process.environ()))
"""


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_ends_all_of_it(number: int, code: int, tmp_path: Path) -> None:
    """Also grandchildren that do not listen; what is under way was told."""
    words = [sys.executable, "-c", PARENT, str(tmp_path), CHILD]
    parent = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert parent.stderr
    for line in parent.stderr:
        if "Asking: 1/2 [00:01<00:01,  1.00s/it]" in line:
            break
    parent.send_signal(number)
    parent.communicate()
    assert parent.returncode == code
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.processes
def test_a_program_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner.tools.evaluators.process import environ, last_line

    monkeypatch.setenv("PYTHONPATH", "/ours")
    code = "import os, sys; print(os.environ.get('PYTHONPATH'), os.getcwd()); sys.exit('at last\\n')"
    log = tmp_path / "new" / "log"
    assert run([sys.executable, "-c", code], log, lambda: None, tmp_path, environ()) == 1
    assert log.read_text().splitlines() == [f"None {tmp_path}", "at last", ""]
    assert (last_line(log), last_line(tmp_path / "none"), bar(log)) == ("at last", "it printed nothing", None)
    log.write_text("INFO start\n  0%|     | 0/3 [00:00<?, ?it/s]\r 33%|##   | 1/3 [00:01<00:02,  1.00it/s]")
    assert bar(log) == "1/3 [00:01<00:02,  1.00it/s]"


def test_scores(tmp_path: Path) -> None:
    folder = tmp_path / "20261124_100503"
    (folder / "summary").mkdir(parents=True)
    with pytest.raises(ToolError, match="no summary"):
        opencompass.scores(folder)
    (folder / "summary" / "s.csv").write_text(
        "dataset,version,metric,mode,m\nqa,359d58,accuracy,gen,100.00\nx,-,-,-,-\n"
    )
    rows = opencompass.scores(folder)
    assert rows[1] == ["qa", "359d58", "accuracy", "gen", "100.00"]
    task, log = folder / "x.out", tmp_path / "log"
    task.write_text("Traceback\ntorch.OutOfMemoryError: CUDA out of memory.\n")
    log.write_text(f"ERROR - /x/local.py - _launch - 241 - task OpenICLInfer[m/x] fail, see\n{task}\n100%|#| 1/1\n")
    opencompass.check_scores(rows[:2], log)
    with pytest.raises(ToolError, match=rf"(?s)no score for x.*{task}.*CUDA out of memory.*--batch-size"):
        opencompass.check_scores(rows, log)
    values = {"alias": "t", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 6928749923546.6}
    (tmp_path / "r.json").write_text(json.dumps({"results": {"t": values}, "n-shot": {"t": 0}}))
    assert lm_eval.scores(tmp_path / "r.json")[1:] == [
        ["t", "acc", "none", "0", "0.5000", "0.1000"],
        ["t", "ppl", "none", "0", "6928749923546.6", ""],
    ]


@pytest.mark.processes
def test_datasets_by_name(place: Environment) -> None:
    assert opencompass.read_names(["ceval_ppl/x_datasets", "cmmlu_ppl.py"], place).by_likelihood
    assert not opencompass.read_names(["ceval_gen", "mathbench_gen"], place).by_likelihood
    with pytest.raises(ConfigError, match=r"no dataset 'ceval'(?s:.*)its 4 names; close are: ceval_gen, ceval_ppl"):
        opencompass.read_names(["ceval"], place)


@pytest.mark.processes
def test_what_can_be_given(exported: Path, trained: Path, tiny: Path, tmp_path: Path) -> None:
    """A folder, or a config with a checkpoint; the internlm2 layout is written again for transformers, bit for bit."""
    from xtuner.model import load_pretrained

    assert EvaluatedModel([str(exported)]).folder(tmp_path, any_layout=True) == exported
    made = EvaluatedModel([str(exported)]).folder(tmp_path / "a")
    assert json.loads((made / "config.json").read_text())["model_type"] == "llama"
    again = EvaluatedModel([str(made)]).folder(tmp_path / "b")
    assert again == made
    given = EvaluatedModel([str(tiny), str(trained)])
    assert given.name == f"tiny-{trained.stem}"
    bf16 = given.folder(tmp_path / "c")
    assert json.loads((bf16 / "config.json").read_text())["torch_dtype"] == "bfloat16"
    old, new = (load_pretrained(folder).state_dict() for folder in (exported, made))
    assert all(tensor.equal(new[name]) for name, tensor in old.items())
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since the export"):
        EvaluatedModel([str(made)]).folder(tmp_path / "b")
    (made / "model.safetensors").unlink()
    for words, message in (
        ([], "no model is given"),
        ([trained], "its config, too: CONFIG.py"),
        ([trained.parent], rf"(?s)is a folder of checkpoints.*CONFIG\.py {trained.parent}/iter_"),
        ([made], "weights is missing"),
        ([tmp_path / "none"], "neither a folder here"),
        ([trained, tiny], "is not a model"),
        ([tiny, trained, trained], "is not a model"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvaluatedModel([str(w) for w in words])
    with pytest.raises(ConfigError, match="in the model's folder"):
        EvaluatedModel([str(exported)]).work_dir(exported / "w")
    with pytest.raises(ConfigError, match="no config to change"):
        EvaluatedModel([str(exported)], ["lr=1"])
    with pytest.raises(ConfigError, match="no checkpoint"):
        EvaluatedModel([str(tiny), str(tmp_path / "none")])


@pytest.mark.processes
def test_refusals(exported: Path, place: Environment, tmp_path: Path, xtuner: Command) -> None:
    import torch

    file, questions = tmp_path / "m.jsonl", tmp_path / "q.jsonl"
    file.write_text(json.dumps(CHOICE))
    questions.write_text(json.dumps(QUESTION))
    asked = (exported, "--custom", file, "--env", place.folder, "--work-dir", tmp_path / "w")
    for words, message in (
        ((exported,), "no datasets are given"),
        ((exported, "--datasets", "x", "--infer", "gen"), "is for --custom only"),
        ((exported, "--datasets", "x", "--data", tmp_path), "no folder data/"),
        ((*asked, "--batch-size", "0"), "0 is not valid"),
        ((*asked, "--gpus", "-1"), "-1 is not valid"),
        ((*asked, "--model-type", "chat"), "likelihoods cannot be computed"),
        ((*asked, "--infer", "gen", "--model-type", "chat"), "no chat template"),
        ((*asked, "--gpus", "99"), "GPUs here: "),
        ((*asked, "--backend", "turbomind", "--gpus", "0"), "on GPUs only"),
        ((*asked, "--backend", "turbomind"), "LMDeploy is not in the environment(?s:.*)turbomind.txt"),
        ((exported, "--datasets", "cevall_gen", "--env", place.folder), "close are: ceval_gen"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("eval", "opencompass", *words)
    file.write_text(file.read_text() + "\n" + questions.read_text())
    with pytest.raises(DataError, match="no 'A'"):
        xtuner("eval", "opencompass", *asked)
    with exclusive(tmp_path / "w" / ".evaluating", ""), pytest.raises(BusyError, match="evaluates there"):
        xtuner("eval", "opencompass", exported, "--custom", questions, *asked[3:])
    claim(place, "lmdeploy", "0.18.0")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU here"):
            xtuner("eval", "opencompass", exported, "--custom", questions, *asked[3:], "--backend", "turbomind")
    for more, message in (
        ((), "no tasks are given"),
        (("--tasks", "x", "--include-path", tmp_path / "n"), "no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            xtuner("eval", "lm-eval", exported, *more)
    with pytest.raises(ConfigError, match="lm_eval is not in the environment"):
        xtuner("eval", "lm-eval", exported, "--tasks", "x", "--env", place.folder)
