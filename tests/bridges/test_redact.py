"""Secrets leave every text, ordinary text stays to the letter, no cut of a stream lets half a key through."""

import io
import json
import random
import string
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from bridges.cli import main
from bridges.service.redact import (
    HELD,
    LONGEST_LINE,
    PATTERNS,
    REDACTED,
    Redactor,
    redact,
    secret_values,
)
from tests.conftest import ROOT

RANDOM = random.Random(0)
find_secrets = Redactor({}).find_secrets


def letters(length: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Made at run time: no key-like text stands in this file."""
    return "".join(RANDOM.choice(alphabet) for _ in range(length - 1)) + "7"


SECRET = letters(24)
URL_SAFE = string.ascii_letters + string.digits + "-_"
CANARIES: dict[str, str] = {
    "hub token": "hf_" + letters(34),
    "GitHub token": "ghp_" + letters(36),
    "GitHub token (oauth)": "gho_" + letters(36),
    "GitHub token (fine-grained)": "github_pat_" + letters(22) + "_" + letters(59),
    "GitLab token": "glpat-" + letters(20),
    "API key": "sk-" + letters(48),
    "API key (Anthropic)": "sk-ant-api03-" + letters(90, URL_SAFE),
    "API key (project)": "sk-proj-" + letters(60, URL_SAFE),
    "AWS key": "AKIA" + letters(16, string.ascii_uppercase),
    "Slack token": "xoxb-" + letters(12, string.digits) + "-" + letters(24),
    "Google key": "AIza" + letters(35, URL_SAFE),
    "JSON web token": ".".join("eyJ" + letters(30, URL_SAFE) for _ in range(2)) + "." + letters(43, URL_SAFE),
}
PRIVATE_KEY = "\n".join(
    ["-----BEGIN OPENSSH PRIVATE KEY-----", *(letters(64) for _ in range(5)), letters(20)]
    + ["-----END OPENSSH PRIVATE KEY-----"]
)

# Each holds SECRET; the rest of the line is to stay.
NAMED = [
    ("password={}", "assignment"),
    ("DB_PASSWORD = {}", "assignment"),
    ("'passwd': '{}'", "assignment"),
    ('{{"client_secret": "{}", "step": 3}}', "assignment"),
    ('{{\\"api_key\\": \\"{}\\"}}', "assignment"),
    ("api-key: {}", "assignment"),
    ("WANDB_API_KEY={}", "assignment"),
    ("aws_secret_access_key => {}", "assignment"),
    ("access_token={}&step=3", "assignment"),
    ("token: {}", "token assignment"),
    ("HF_TOKEN={}", "token assignment"),
    ("login(token='{}', host=None)", "token assignment"),
    ("train.py --hf_token {} --steps 3", "token option"),
    ("train.py --password {} --steps 3", "option"),
    ("Authorization: Bearer {}", "authorization header"),
    ("{{'authorization': 'Basic {}'}}", "authorization header"),
    ("-H 'bearer {}'", "bearer header"),
    ("https://user:{}@host.example/path", "URL user"),
    ("origin https://{}@github.com/a/b.git (fetch)", "URL user without password"),
    ("ssh://git:{}@host.example:22/a.git", "URL user"),
    ("postgresql://:{}@host.example/db", "URL user"),
    ("https://hub.example/model?X-Amz-Signature={}&x=1", "URL signature"),
    ("GET /?once={} HTTP/1.1", "URL signature"),
]

ORDINARY = """\
The following values were not passed to `accelerate launch` and had defaults used instead:
train:  72%|███████▏  | 358/500 [02:47<01:03,  2.22it/s, ce=2.419, density=0.125, kl=0.446, tok_s=4371]
bracket_brace: 40 nodes, 62 edges, held-out loss 0.067, accuracy 98%, without it 52%: supported (383 s)
dense forward                                                       926 MiB
{"step": 10, "total": 0.7006691694259644, "ce": 2.405491590499878, "kl_per_token": 0.13677576184272766}
sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 student/model.safetensors
commit 0a4d55a8d778e5022fab701977c5d840bbc486d0, blob:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391
tok_s=4624 tokens=8000000 max_train_tokens: 8000000 per_token: 0.00123456789 ms/token=12.3456789ms
bos_token_id=0 eos_token: "<|endoftext|>" pad_token='[PAD]' unk_token=None token=None next token: ' the'
top token: Ġfunction, token: 128/8000000, token: 'continue', secret=None, password: null, api_key=True
tokenizer: recipes/python/dense/tokenizer.json --max_train_tokens 8000000 --token_file run.token
Your token has been saved to /home/user/.cache/huggingface/token; token is valid (permission: read).
http://127.0.0.1:8000/runs/quickstart https://huggingface.co/openai-community/gpt2/tree/main a@b.example
git@github.com:owner/repo.git ssh://git@github.com/owner/repo http://localhost:8000/x@main
task sk-learn disk-usage hf_hub_download hf_transfer AKIA eyJ xoxb sk- ghp_ 2026-11-24T02:05:48.238
TOKENIZERS_PARALLELISM=false passed the test; the bearer of circuits; credential helper
secrets.token_urlsafe(32)
-----BEGIN CERTIFICATE----- Traceback (most recent call last): File "recipes/train.py", line 12, in <module>
\x1b[32mINFO\x1b[0m naïve 日本語 \ufeff\u2028 ok
"""


@pytest.mark.parametrize("kind", CANARIES)
@pytest.mark.parametrize(
    "frame", ["{}", "error at {}: refused", '"{}"', "a={}&b", "({})", "x/{}/y", "{}\r", "=\t{}\n"]
)
def test_keys_are_known_by_their_shape(kind: str, frame: str) -> None:
    text = frame.format(CANARIES[kind])
    assert CANARIES[kind] not in redact(text)
    assert redact(text) == frame.format(REDACTED)
    assert find_secrets(text) == [kind.partition(" (")[0]]


@pytest.mark.parametrize(("frame", "kind"), NAMED)
def test_values_are_known_by_what_stands_before_them(frame: str, kind: str) -> None:
    text = frame.format(SECRET)
    assert SECRET not in redact(text)
    assert kind in find_secrets(text)
    assert "step" not in text or "step" in redact(text)
    assert redact(text).count(REDACTED) == 1


@pytest.mark.parametrize(
    "value",
    ['it"s hard', "a b c d", "p,q;r&s", "x\\'y", "ünï-codé", "my " + CANARIES["hub token"] + " and more"],
)
def test_quoted_values_go_whole(value: str) -> None:
    assert redact(json.dumps({"password": value, "step": 3})) == f'{{"password": "{REDACTED}", "step": 3}}'


def test_a_private_key_goes_whole() -> None:
    for text in (PRIVATE_KEY, json.dumps(PRIVATE_KEY), PRIVATE_KEY.replace("\n", "\r\n")):
        hidden = redact(f"before {text} after")
        assert all(line[:20] not in hidden for line in PRIVATE_KEY.splitlines()[1:-1])
        assert hidden.startswith("before ")
        assert hidden.endswith(" after")
    torn = redact("\n".join(PRIVATE_KEY.splitlines()[:4]))
    assert all(line not in torn for line in PRIVATE_KEY.splitlines()[1:4])


def test_every_pattern_is_tried() -> None:
    tried = {kind.partition(" (")[0] for kind in CANARIES} | {kind for _, kind in NAMED}
    assert tried | {"private key"} == set(PATTERNS)


def test_ordinary_text_stays_to_the_letter() -> None:
    for line in ORDINARY.splitlines(keepends=True):
        assert redact(line) == line
        assert find_secrets(line) == []
    assert redact(ORDINARY) == ORDINARY
    stream = Redactor({}).stream()
    assert stream.feed(ORDINARY.encode()) + stream.flush() == ORDINARY.encode()


def test_shipped_configs_tokenizers_and_a_real_progress_bar_stay() -> None:
    files = [path for path in (ROOT / "recipes").rglob("*") if path.suffix in {".yaml", ".json", ".md"}]
    assert len(files) > 20
    assert {
        path.name: find_secrets(path.read_text()) for path in files if find_secrets(path.read_text())
    } == {}
    bar = io.StringIO()
    for step in (progress := tqdm(range(50), file=bar, desc="train", mininterval=0)):
        progress.set_postfix(ce=f"{3 / (step + 1):.3f}", tok_s=4000 + step, token=step)
    assert bar.getvalue().count("\r") > 40
    assert redact(bar.getvalue()) == bar.getvalue()


def test_it_is_the_same_twice() -> None:
    text = "\n".join([*CANARIES.values(), *(frame.format(SECRET) for frame, _ in NAMED), PRIVATE_KEY])
    assert redact(redact(text)) == redact(text)
    assert find_secrets(redact(text)) == []


def test_values_of_the_environment_go_in_every_form() -> None:
    environ = {
        "MY_SERVICE_TOKEN": "correct horse/battery",
        "wandb_api_key": "0123456789abcdef0123456789abcdef01234567",
        "DB_PASSWORD": 'quo"ted\\välue',
        "DATABASE_URL": "postgresql://me:urlpassword@db.example/x",
        "SIGNING_KEY_PEM": PRIVATE_KEY,
        "TOKENIZERS_PARALLELISM": "parallelism",
        "MAX_TOKENS": "80000000",
        "HF_TOKEN_PATH": "/home/user/token",
        "GOOGLE_APPLICATION_CREDENTIALS": str(ROOT),
        "PWD": str(ROOT),
        "PIN_TOKEN": "1234567",
        "HOME": "/home/user",
    }
    redactor = Redactor(environ)
    for value in ("correct horse/battery", "correct%20horse%2Fbattery", "correct%20horse/battery"):
        assert redactor.redact(f"a {value} b") == f"a {REDACTED} b"
    assert redactor.redact(f"key {environ['wandb_api_key']}!") == f"key {REDACTED}!"
    password = environ["DB_PASSWORD"]
    for form in (password, json.dumps(password), repr(password), json.dumps(password, ensure_ascii=False)):
        assert "ted" not in redactor.redact(f"value {form} b").replace(REDACTED, "")
    assert redactor.redact("urlpassword") == REDACTED
    assert redactor.redact(PRIVATE_KEY.splitlines()[2]) == REDACTED
    kept = f"parallelism 80000000 /home/user/token {ROOT} 1234567 /home/user"
    assert redactor.redact(kept) == kept
    assert redactor.find_secrets("x correct horse/battery") == ["environment variable"]
    assert secret_values({}) == set()


def test_a_job_s_words_hold_no_secret_of_the_environment(tmp_path, monkeypatch, capsys) -> None:
    """Not by its shape: the value itself is known. Nothing is written."""
    monkeypatch.setenv("WANDB_API_KEY", canary := letters(40, "0123456789abcdef"))
    for words in (["train", "--tracking.key", canary], ["--key", canary, "train"]):
        with pytest.raises(SystemExit, match="3"):
            main(["submit", "--runs", str(tmp_path / "runs"), *words])
        said = capsys.readouterr()
        assert "the arguments hold a secret (environment variable)" in said.err
        assert canary not in said.err + said.out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def pieces(data: bytes, longest: int) -> list[bytes]:
    found = []
    while data:
        size = RANDOM.randint(1, longest)
        found.append(data[:size])
        data = data[size:]
    return found


@pytest.mark.parametrize("longest", [1, 7, 80, 5000])
def test_a_stream_may_be_cut_anywhere(longest: int) -> None:
    """Property: whatever the cuts, what comes out is what the whole text gives, byte for byte."""
    values = [*CANARIES.values(), *(frame.format(SECRET) for frame, _ in NAMED)]
    lines = []
    for _ in range(120):
        words = [RANDOM.choice(ORDINARY.split()) for _ in range(RANDOM.randint(0, 9))]
        words.insert(RANDOM.randint(0, len(words)), RANDOM.choice(values))
        lines.append(" ".join(words).encode() + RANDOM.choice([b"\n", b"\r", b"\r\n", b"\xff\xfe\n"]))
    data = b"".join(lines)
    redactor = Redactor({})
    stream = redactor.stream()
    out = b"".join(stream.feed(piece) for piece in pieces(data, longest)) + stream.flush()
    by_line = [redactor.redact(line.decode("utf-8", "surrogateescape")) for line in lines]
    assert out == "".join(by_line).encode("utf-8", "surrogateescape")
    assert not any(value.encode() in out for value in [*CANARIES.values(), SECRET])


@pytest.mark.parametrize("longest", [1, 50, 5000])
def test_a_stream_hides_keys_over_many_lines(longest: int) -> None:
    text = f"start\n{PRIVATE_KEY}\nstep 1, loss 2.5\n{PRIVATE_KEY[:200]}\nstep 2, loss 2.4\nend\n"
    stream = Redactor({}).stream()
    out = b"".join(stream.feed(piece) for piece in pieces(text.encode(), longest)) + stream.flush()
    assert out.decode() == f"start\n{REDACTED}\nstep 1, loss 2.5\n{REDACTED}\nstep 2, loss 2.4\nend\n"


def test_a_progress_bar_comes_out_as_it_ends() -> None:
    stream = Redactor({}).stream()
    assert stream.feed(b"train: 1%\rtrain: 2") == b"train: 1%\r"
    assert stream.feed(b"%\r") == b"train: 2%\r"
    assert stream.feed(b"token: ") == b""
    assert stream.feed(SECRET.encode()) == b""
    assert stream.flush() == f"token: {REDACTED}".encode()


@pytest.mark.parametrize("filler", [b".", b"word ", b"\xe2\x96\x88"])
def test_a_line_without_an_end_goes_in_pieces_but_no_key_does(filler: bytes) -> None:
    stream, out, held = Redactor({}).stream(), [], 0
    key = CANARIES["API key (Anthropic)"].encode()
    sent = 0
    for at in range(0, 40):
        data = filler * (RANDOM.randint(3000, 6000) // len(filler)) + b" " + key + b" "
        for piece in pieces(data, 900):
            out.append(stream.feed(piece))
            sent += len(piece)
            held = max(held, sent - sum(map(len, out)) - 150 * (at + 1))
    out.append(stream.flush())
    whole = b"".join(out)
    assert held < 100_000
    assert whole.count(REDACTED.encode()) == 40
    assert key not in whole
    assert b"sk-ant" not in whole


@pytest.mark.parametrize("before", ["", "token: ", "password="])
def test_no_cut_goes_through_a_key_in_a_long_line(before: str) -> None:
    named = (before + (SECRET if before else CANARIES["hub token"])).encode()
    for start in range(-len(named) - 1, 3, 5):
        line = b"." * (LONGEST_LINE - HELD + 100 + start) + b" " + named + b" "
        line += b"." * (LONGEST_LINE + 100 - len(line))
        stream = Redactor({}).stream()
        first = stream.feed(line)
        assert len(first) > LONGEST_LINE - 2 * HELD
        expected = b"." * (LONGEST_LINE - HELD + 100 + start) + f" {before}{REDACTED} ".encode()
        assert (first + stream.feed(b"\n")).rstrip(b".\n") == expected


@pytest.mark.parametrize(
    "part",
    ["-", "--", "--a", "--token ", "sk-", "hf_", "eyJaaaaaaaaa.", "://", "https://", "://a:", "password=",
     "password='", 'password="password=\'', "token=", "token=a.", "token=1/", "token=1e", "token: ",
     "?token=", "bearer a",
     "authorization: bearer ", "-----BEGIN PRIVATE KEY-----", "-----BEGIN ", '\\"', "xoxb-", "A", "1", " ",
     "\n"],
)  # fmt: skip
def test_no_line_is_slow(part: str) -> None:
    text = part * ((1 << 16) // len(part))
    start = time.process_time()
    redact(text)
    assert time.process_time() - start < 1.0  # measured: 0.01 to 0.07 s; what is quadratic takes minutes


def test_it_is_light() -> None:
    code = "import bridges.service.redact, sys; print({'torch', 'fastapi', 'starlette'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
