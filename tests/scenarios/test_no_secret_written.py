"""A whole run with secrets everywhere: none of them is in any file of the work dir, nor in anything printed."""

import json
from pathlib import Path

import pytest
from helpers.processes import shell

HOOK = '''
from xtuner.train.hooks import Hook
class Leak(Hook):
    """Tells everything it knows."""
    def __init__(self, hub_token: str, api_key: str = "default-of-the-api", fail: bool = False):
        self.secrets = [hub_token, api_key, os.environ["SOME_SERVICE_TOKEN"], "hf_" + "q7" * 10]
        self.fail = fail
    def before_run(self, run):
        import logging
        logger = logging.getLogger("xtuner")
        for secret in self.secrets:
            logger.info(f"logging in with {secret}")
            logger.getChild("hook").warning("again: %s", {"a": [secret]})
            run.metrics.text("sample", f"he said {secret}", 0)
        try:
            raise ValueError(self.secrets)
        except ValueError:
            logger.exception("failed")
        if self.fail:
            raise RuntimeError(f"a bug with {self.secrets}")
    def after_iteration(self, run, it):
        it.record["said"] = " ".join(self.secrets)
import os
# the old one was "commented-hub_token=in-a-comment"
hub_token = "from-the-" + "config-file"
'''
SECRETS = [
    "from-the-",
    "config-file",
    "default-of-the-api",
    "from-an-option",
    "the-environment",
    "q7q7",
    "in-a-comment",
]


@pytest.mark.slow
@pytest.mark.processes
def test_no_secret_is_written(tiny: Path, tmp_path: Path) -> None:
    first = "from torch.optim import AdamW\n"
    text = tiny.read_text().replace(first, first + HOOK)
    old = "default_hooks = dict(\n"
    assert old in text
    config = tmp_path / "leaky.py"
    config.write_text(text.replace(old, old + "    leak=dict(type=Leak, hub_token=hub_token),\n"))
    env = {"SOME_SERVICE_TOKEN": "the-environment", "https_proxy": "http://me:the-environment@proxy"}
    words = ["train", config, "--work-dir", tmp_path / "w"]
    option = "default_hooks.leak.api_key=from-an-option"
    small = ["custom_hooks=[]", "max_length=128", "save_steps=1"]
    outputs = []

    def run(code: int, *more: str) -> str:
        done = shell(*words, *more, **env)
        assert done.returncode == code, done.stderr
        outputs.append(done.stdout + done.stderr)
        return outputs[-1]

    assert "logging in with ***" in run(0, "--cfg-options", *small, option)
    # a token is renewed: no change of the run; another setting beside it is one
    renewed = "default_hooks.leak.api_key=from-an-option-anew"
    assert "changed since" not in run(0, "--resume", "--cfg-options", *small, renewed)
    run(2, "--resume", "--cfg-options", *small, renewed, "default_hooks.leak.fail=True")
    assert "a bug with ['***'" in run(1, "--cfg-options", *small, option, "default_hooks.leak.fail=True")
    assert "is not a string" in run(2, "--cfg-options", *small, "default_hooks.leak.api_key=[from-an-option]")
    config.write_text(config.read_text() + "number = int(hub_token)\n")
    assert "invalid literal" in run(2)

    files = [p for p in (tmp_path / "w").rglob("*") if p.is_file()]
    kinds = {p.name.partition(".tfevents")[0] for p in files}
    assert {"environment.json", "config.json", "trainer.json", "scalars.json", "leaky.py", "events.out"} <= kinds
    for secret in SECRETS:
        assert [p for p in files if secret.encode() in p.read_bytes()] == [], secret
        assert [o for o in outputs if secret in o] == [], secret
    starts = sorted((tmp_path / "w").glob("*/environment.json"))
    facts = json.loads(starts[0].read_text())
    assert option.replace("from-an-option", "***") in facts["command"]
    assert facts["variables"]["https_proxy"] == "http://me:***@proxy"
    assert json.loads((starts[0].parent / "config.json").read_text())["default_hooks"]["leak"]["hub_token"] == "***"
    assert "leak=dict(type=Leak, hub_token=hub_token)" in (tmp_path / "w" / "leaky.py").read_text()
