"""What is hidden and what is not: names by whole words, forms, known values, programs and command lines."""

import ast
from pathlib import Path
from typing import Any

import pytest

from xtuner.compat.translate import load
from xtuner.config.load import SHIPPED
from xtuner.config.redact import without_secrets
from xtuner.core import secrets
from xtuner.core.errors import ConfigError
from xtuner.core.secrets import MASK, is_secret_name, mask, mask_command, mask_text

HIDDEN = """token hub_token HF_TOKEN hfToken access_token user_token auth_token password DB_PASSWORD passwd password_2
    api_key apiKey OPENAI_API_KEY APIKey WANDB_API_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID private-key credential
    credentials Authorization authorization_header client_secret SLURM_JWT smtp_pass db_pwd model.hub.hub_token
    AZURE_STORAGE_CONNECTION_STRING cookie"""
OPEN = """tokenizer tokens max_new_tokens num_tokens pad_token pad_token_id bos_token eos_token image_token per_token
    token_ids token_file password_file tokens_per_s secretary author key keys sort_key key_proj PWD OLDPWD forward_pass
    SSH_AUTH_SOCK GOOGLE_APPLICATION_CREDENTIALS hub_token.name targets monkey save_optimizer
    special_tokens stop_token /data/secrets ~/secrets s3://bucket/password ../token"""
FORMS = {
    "got hf_abcdefghijklmnopqrst here": "got *** here",
    "sk-proj-abc123def456ghi7": MASK,
    "sk-learn-something-long-name task-abcdefghijklmnopqrstuv": None,
    "ghp_abcdefghijklmnopqrstuv1234567890, AKIAABCDEFGHIJKLMNOP": "***, ***",
    "Authorization: Bearer abcdef.ghijkl": "Authorization: *** ***",
    "Bearer abcdef.ghijkl": "Bearer ***",
    "https://me:pw@host/x and git@host:x": "https://me:***@host/x and git@host:x",
    'hub_token=\'a b\' password=c "secret": "d\\"e" n=3': 'hub_token=\'***\' password=*** "secret": "***" n=3',
    '{"inner": "{\\"password\\": \\"x\\"}"}': '{"inner": "{\\"password\\": \\"***\\"}"}',
    "a=password=zz ?token=abc&page=2": "a=password=*** ?token=***&page=2",
    "s3://AK:wJal/K7+x@bucket/a b@c s3://bucket/a:b/c": "s3://AK:***@bucket/a b@c s3://bucket/a:b/c",
    "https://b/x?X-Amz-Signature=0123456789abcdef0123&n=1": "https://b/x?X-Amz-Signature=***&n=1",
    "/data/secrets: No such file or directory, secrets: 3 files, 's3://b/token': is not a folder": None,
    "cannot read /data/secrets:\n  where: /data/secrets/x.bin": None,
    "secrets: a8Fk29d n /run/password: hunter2 password: no one": "secrets: *** n /run/password: *** password: *** one",
    "secrets:\n  password: hunter2 secrets: 'no one' secrets=no one": (
        "secrets:\n  password: *** secrets: '***' secrets=*** one"
    ),
    "token: str, token = 5, pad_token='<pad>', token='<s>', password == x, use_auth_token=True": None,
}


def test_names() -> None:
    assert [n for n in HIDDEN.split() if not is_secret_name(n)] == []
    assert [n for n in OPEN.split() if is_secret_name(n)] == []


@pytest.mark.parametrize("text", FORMS)
def test_texts(text: str) -> None:
    masked = mask_text(text)
    assert masked == (text if FORMS[text] is None else FORMS[text])
    assert mask_text(masked) == masked


def test_texts_of_any_length() -> None:
    """Each of these once took a time that grew with the square of the length: minutes."""
    for part in ("sk-a-", "eyJ-", "http://a:", "s3://a:", "a=", "password=", "a:'", 'x=\\"'):
        mask_text(part * 100_000)


def test_values() -> None:
    value = {
        "hub_token": "abc",
        "password": 1234,
        "token": 7,
        "use_auth_token": True,
        "credentials": dict(type="a.B", user="u", more=["v", None]),
        "pair": ("https://u:p@h", 1.5),
        "pad_token": "<pad>",
    }
    assert mask(value) == {
        "hub_token": MASK,
        "password": MASK,
        "token": 7,
        "use_auth_token": True,
        "credentials": dict(type="a.B", user=MASK, more=[MASK, None]),
        "pair": ("https://u:***@h", 1.5),
        "pad_token": "<pad>",
    }
    assert mask(mask(value)) == mask(value)
    words = [
        "train",
        "a.py",
        "--cfg-options",
        "hub_token=x",
        "a.password=1",
        "lr=1",
        "--token",
        "y",
        "--tokenizer",
        "z",
    ]
    assert mask_command(words) == [*words[:3], "hub_token=***", "a.password=***", "lr=1", "--token", MASK, *words[8:]]


def test_a_folder_of_that_name(monkeypatch: Any, tmp_path: Path) -> None:
    """Neither the share of its data nor the names of its files are secret, in the kept config or in a later line."""
    monkeypatch.setattr(secrets, "_learned", set())
    source = """
import os
from pathlib import Path
first = os.path.join("secrets", "train.bin"), Path("secrets", "second.bin")
shares = {"/data/secrets": 0.3}
password = os.environ.setdefault("HUB_SECRET", "a-real-one")
"""
    assert without_secrets(source.encode()).decode() == source.replace("a-real-one", MASK).replace('"***"', "'***'")
    (tmp_path / "c.py").write_text(source)
    monkeypatch.setenv("HUB_SECRET", "")
    config = load(str(tmp_path / "c.py"), [])
    assert config.resolved()["shares"] == {"/data/secrets": 0.3}
    assert mask_text("train.bin second.bin a-real-one") == "train.bin second.bin ***"


def test_known_values(monkeypatch: Any) -> None:
    monkeypatch.setattr(secrets, "_learned", set())
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "from-the-environment")
    monkeypatch.setenv("OTHER_SECRET", "short")
    secrets.learn({"hub": {"hub_token": "from-a-config", "name": "remains-visible", "pad_token": "padding-text"}})
    text = "from-the-environment from-a-config remains-visible padding-text short"
    assert mask_text(text) == "*** *** remains-visible padding-text short"
    error = ConfigError("no from-a-config", where="hub_token = 'x1'", do="ask")
    assert str(error) == "no ***\n  where: hub_token = '***'\n  next: ask"


def test_the_environment_is_examined_when_it_changes(monkeypatch: Any) -> None:
    """Not for every line: clusters set thousands of variables. What a config or hook sets later is hidden as well."""
    for number in range(3000):
        monkeypatch.setenv(f"SERVICE_{number}_PORT", "tcp://10.0.0.1:443")
    mask_text("")
    examined, true_kind = [], secrets._kind
    monkeypatch.setattr(secrets, "_kind", lambda name: examined.append(name) or true_kind(name))
    assert mask_text("a line") == mask({"a": "a line"})["a"] == "a line"
    assert examined == ["", "a"]
    monkeypatch.setenv("LATE_TOKEN", "set-by-a-hook")
    assert mask_text("set-by-a-hook") == MASK
    assert len(examined) > 3000
    monkeypatch.setenv("LATE_TOKEN", "another-value")
    assert mask_text("set-by-a-hook another-value") == f"set-by-a-hook {MASK}"
    monkeypatch.delenv("LATE_TOKEN")
    assert mask_text("another-value") == "another-value"


def test_programs() -> None:
    """Literals of secret names and comments change, everything else stays byte by byte; the program stays one."""
    source = '''# curl -H "Authorization: Bearer abcdefgh"
"""Reads hf_abcdefghijklmnopqrst.

On é."""
import os
hub_token = "é-1"; pad_token = "<pad>"
token = os.environ["HF_TOKEN"] or os.environ.get("HF_TOKEN", "default-1")
api_key: str = "k" "ey" f"{token}"
url = f"https://me:inner-1@{hub_token}/x"
os.environ["WANDB_API_KEY"] = "item-1"
os.environ.setdefault("WANDB_API_KEY", 'pair-1')
user, passwd = "me", """two
lines-1"""
def f(password="argument-1", *, secret=b"bytes-1"):
    return password == "compared-1"
model = dict(type="a.b", credentials=dict(type="c.d", user="u-1"), headers={"Authorization": "x-" + "y-1"}, lr=1e-3)
'''
    masked = without_secrets(source.encode()).decode()
    ast.parse(masked)
    assert "-1" not in masked.replace("1e-3", "").replace("lr=1e", "")
    assert "abcdefgh" not in masked
    for kept in (
        'os.environ["HF_TOKEN"] or os.environ.get("HF_TOKEN", ',
        '"""Reads ***.\n\nOn é."""',
        'pad_token = "<pad>"',
        'type="a.b", credentials=dict(type="c.d"',
        'user, passwd = "me", ',
        "def f(password='***', *, secret=b'***'):",
        "lr=1e-3)\n",
    ):
        assert kept in masked
    assert without_secrets(masked.encode()) == masked.encode()
    windows = b"\xef\xbb\xbf" + source.replace("\n", "\r\n").encode()
    assert without_secrets(windows).decode("utf-8-sig").replace("\r\n", "\n") == masked
    for file in [*SHIPPED.glob("*.py"), Path(__file__).parent.parent / "conftest.py"]:
        assert without_secrets(file.read_bytes()) == file.read_bytes()
