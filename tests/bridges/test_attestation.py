"""The in-toto statement of a report, its DSSE envelope, and the outcomes of a signature check."""

import base64
import json
import os
import random
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from bridges.attestation import (
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    check_signature,
    envelope_path,
    sign,
    statement,
    write_statement,
)
from bridges.cli import main
from bridges.dsse import make_envelope, new_key, pre_authentication_encoding
from bridges.report import write_report
from extractor.artifacts import file_sha256, write_json
from extractor.errors import InputError, MachineError
from tests.bridges.report_record import record

try:
    import cryptography
except ImportError:
    cryptography = None
needs_cryptography = pytest.mark.skipif(
    cryptography is None, reason="signatures need cryptography: pip install 'sparsebridge[sign]'"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a page and its record."""
    folder = tmp_path / "run"
    folder.mkdir()
    report = record("plural")
    report["method"]["settings"] = {
        "train": {"rotation": {"seed": 3}, "seed": 1},
        "extract": {"prune": {"seeds": [0, 1]}, "evidence": {"adversary": {"seed": 4}}},
    }
    report["provenance"]["inputs"] = {"train": {"dense": {"path": "x", "sha256": "12" * 32}}}
    report["provenance"]["inputs"]["edit"] = {"dense_sha256": "12" * 32, "note": "not a hash"}
    report["provenance"]["environment"]["git"] = {"commit": "ab" * 20, "dirty": True}
    write_report(report, folder)
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private = tmp_path / "key.pem"
    return private, new_key(private)


def outcome(folder: Path, key: Path | None) -> tuple[str, str]:
    found = check_signature(envelope_path(folder), key)
    assert (found.state == "ok") == (found.outcome == "signed") == (found.statement is not None)
    assert found.text
    return found.outcome, found.state


def edit_envelope(folder: Path, **changes: Any) -> None:
    path = envelope_path(folder)
    write_json(path, json.loads(path.read_text()) | changes)


def put_envelope(folder: Path, key: Path, payload: Any, payload_type: str = PAYLOAD_TYPE) -> None:
    """A proper signature over anything."""
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    write_json(envelope_path(folder), make_envelope(payload_type, content, key))


# --- the statement ---------------------------------------------------------------------------------------


def test_the_statement_has_the_form_of_in_toto_v1(run: Path) -> None:
    path = write_statement(run / "report.html")
    assert path == run / "report.intoto.json"
    told = json.loads(path.read_text())
    assert set(told) == {"_type", "subject", "predicateType", "predicate"}
    assert told["_type"] == STATEMENT_TYPE == "https://in-toto.io/Statement/v1"
    assert told["predicateType"] == PREDICATE_TYPE
    assert all(set(subject) == {"name", "digest"} for subject in told["subject"])
    subjects = {subject["name"]: subject["digest"] for subject in told["subject"]}
    assert len(subjects) == len(told["subject"])
    for name in ("report.html", "report.json"):
        assert subjects[name] == {"sha256": file_sha256(run / name)}
    assert subjects["student/model.safetensors"] == {"sha256": "cd" * 32}


def test_seeds_of_a_record_that_holds_its_settings_as_text(run: Path) -> None:
    """As earlier versions wrote it: one config after the other."""
    report = json.loads((run / "report.json").read_text())
    del report["method"]["settings"]
    report["method"]["config"] = "run: x\nrotation:\n  seed: 3\nseed: 1\nrun: x\nseed: 2\n"
    predicate = statement(report, {"report.html": "ab" * 32})["predicate"]
    assert predicate["seeds"] == {"rotation.seed": [3], "seed": [1, 2]}


def test_the_predicate_says_what_the_run_was_made_from_and_by(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    predicate = statement(report, {"report.html": "ab" * 32})["predicate"]
    assert predicate["code"] == {"commit": "ab" * 20, "dirty": True}
    assert predicate["builder"]["versions"] == {"torch": "2.13.0"}
    assert predicate["seeds"] == {
        "train.rotation.seed": [3], "train.seed": [1], "extract.prune.seeds": [0, 1],
        "extract.evidence.adversary.seed": [4],
    }  # fmt: skip
    assert predicate["verdict"]["word"] == "partly supported"
    assert {(m["name"], m["digest"]["sha256"]) for m in predicate["materials"]} == {
        ("train/dense", "12" * 32),
        ("edit/dense", "12" * 32),
    }


def test_the_same_report_gives_the_same_bytes(run: Path) -> None:
    once = write_statement(run).read_bytes()
    assert write_statement(run / "report.json").read_bytes() == once


@pytest.mark.parametrize("wrong", ["", "ab", "AB" * 32, "zz" * 32, None, 7])
def test_what_is_no_hash_is_refused(wrong: Any) -> None:
    report = record()
    report["provenance"]["artifacts"]["a.json"] = wrong
    with pytest.raises(InputError, match="'a.json': .* is not a SHA-256"):
        statement(report, {"report.html": "ab" * 32})


def test_a_page_and_a_record_of_two_reports_are_refused(run: Path) -> None:
    other = json.loads((run / "report.json").read_text())
    other["circuits"]["plural"]["loss"] = 0.0
    (run / "report.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="are of different reports"):
        write_statement(run)


# --- the envelope ----------------------------------------------------------------------------------------


def test_the_encoding_is_that_of_the_specification() -> None:
    """The example of DSSE's protocol.md; lengths count bytes, not characters."""
    wanted = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == wanted
    assert pre_authentication_encoding("é", b"") == "DSSEv1 2 é 0 ".encode()


@needs_cryptography
def test_another_reader_of_dsse_accepts_the_envelope(run: Path, keys) -> None:
    """By the specification's words and the key alone, without the code under test."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    values = json.loads(sign(run / "report.html", keys[0]).read_text())
    assert set(values) == {"payloadType", "payload", "signatures"}
    body, kind = base64.b64decode(values["payload"]), values["payloadType"].encode()
    assert kind == b"application/vnd.in-toto+json"
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])
    (signature,) = values["signatures"]
    load_pem_public_key(keys[1].read_bytes()).verify(base64.b64decode(signature["sig"]), signed)
    assert json.loads(body) == json.loads(write_statement(run).read_text())


@needs_cryptography
def test_the_outcomes_are_told_apart(run: Path, keys, tmp_path: Path) -> None:
    private, public = keys
    assert outcome(run, None) == ("unsigned", "not checked")
    assert outcome(run, public) == ("unsigned", "FAILED")
    sign(run, private)
    assert outcome(run, None) == ("not checked", "not checked")
    assert outcome(run, public) == ("signed", "ok")
    assert outcome(run, new_key(tmp_path / "other.pem")) == ("bad signature", "FAILED")
    edit_envelope(run, payloadType="application/vnd.other+json")
    assert outcome(run, public) == ("unknown format", "FAILED")
    assert outcome(run, None) == ("unknown format", "FAILED")


@needs_cryptography
@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_changed_report_is_not_signed(run: Path, keys, name: str) -> None:
    sign(run, keys[0])
    path = run / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = check_signature(envelope_path(run), keys[1])
    assert (found.outcome, found.state) == ("bad signature", "FAILED")
    assert f"{name} is not what was signed" in found.text


@needs_cryptography
def test_one_of_page_and_record_may_be_absent_but_not_both(run: Path, keys) -> None:
    envelope = sign(run, keys[0])
    (run / "report.json").unlink()
    assert outcome(run, keys[1]) == ("signed", "ok")
    (run / "report.html").unlink()
    assert check_signature(envelope, keys[1]).outcome == "bad signature"


@needs_cryptography
def test_the_envelope_of_another_report_is_not_this_ones(run: Path, keys, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_report(record("quote"), other)
    shutil.copy(sign(other, keys[0]), envelope_path(run))
    assert outcome(run, keys[1]) == ("bad signature", "FAILED")
    # nor is a page that was added under another name
    sign(run, keys[0])
    shutil.copy(other / "report.html", run / "better.html")
    assert outcome(run / "better.html", keys[1]) == ("unsigned", "FAILED")
    shutil.copy(envelope_path(run), run / "better.intoto.dsse.json")
    assert outcome(run / "better.html", keys[1]) == ("bad signature", "FAILED")


@needs_cryptography
def test_no_changed_byte_of_payload_or_signature_is_accepted(run: Path, keys) -> None:
    path = sign(run, keys[0])
    whole = path.read_bytes()
    values = json.loads(whole)
    spans = [whole.index(text.encode()) for text in (values["payload"], values["signatures"][0]["sig"])]
    ends = [spans[0] + len(values["payload"]), spans[1] + len(values["signatures"][0]["sig"])]
    draw = random.Random(0)
    places = [draw.randrange(spans[0], ends[0]) for _ in range(100)] + list(range(spans[1], ends[1]))
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert outcome(run, keys[1])[0] in ("bad signature", "unknown format"), place
    path.write_bytes(whole)
    assert outcome(run, keys[1]) == ("signed", "ok")


@needs_cryptography
def test_one_good_signature_among_others_is_enough(run: Path, keys, tmp_path: Path) -> None:
    new_key(tmp_path / "other.pem")
    mine = json.loads(sign(run, keys[0]).read_text())["signatures"]
    others = json.loads(sign(run, tmp_path / "other.pem").read_text())["signatures"]
    edit_envelope(run, signatures=others + mine)
    assert outcome(run, keys[1]) == ("signed", "ok")


@needs_cryptography
@pytest.mark.parametrize(
    "changes",
    [
        {"signatures": []},
        {"signatures": None},
        {"signatures": ["x"]},
        {"signatures": [{"keyid": "x"}]},
        {"signatures": [{"sig": "not base64!"}]},
        {"signatures": [{"sig": "é"}]},
        {"payload": None},
        {"payload": "AAA"},
        {"payloadType": None},
    ],
)
def test_what_is_no_envelope_is_of_unknown_format(run: Path, keys, changes: dict) -> None:
    sign(run, keys[0])
    edit_envelope(run, **changes)
    assert outcome(run, keys[1]) == ("unknown format", "FAILED")


@needs_cryptography
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b'{"payloadType": 1, "payloadType": 2}', b"[" * 100_000]
)
def test_a_damaged_envelope_is_of_unknown_format(run: Path, keys, content: bytes) -> None:
    envelope_path(run).write_bytes(content)
    assert outcome(run, keys[1]) == ("unknown format", "FAILED")


@needs_cryptography
def test_a_short_signature_is_a_bad_one(run: Path, keys) -> None:
    sign(run, keys[0])
    edit_envelope(run, signatures=[{"sig": base64.b64encode(b"short").decode()}])
    assert outcome(run, keys[1]) == ("bad signature", "FAILED")


@needs_cryptography
def test_what_is_signed_must_be_a_statement_that_this_release_reads(run: Path, keys) -> None:
    private, public = keys
    told = json.loads(write_statement(run).read_text())
    put_envelope(run, private, told)
    assert outcome(run, public) == ("signed", "ok")
    newer = PREDICATE_TYPE.replace("/v1", "/v2")
    for payload in (
        told | {"_type": "https://in-toto.io/Statement/v0.1"},
        told | {"predicateType": newer},
        told | {"subject": {}},
        [told],
        b"\xff",
        b"{",
    ):
        put_envelope(run, private, payload)
        assert outcome(run, public) == ("unknown format", "FAILED")
    put_envelope(run, private, told | {"subject": [None, 3, {"name": ["x"]}]})
    assert outcome(run, public) == ("bad signature", "FAILED")
    # signed as something else: the type is part of what is signed
    put_envelope(run, private, told, payload_type="text/plain")
    edit_envelope(run, payloadType=PAYLOAD_TYPE)
    assert outcome(run, public) == ("bad signature", "FAILED")


# --- keys ------------------------------------------------------------------------------------------------


@needs_cryptography
def test_a_new_key_is_its_owners_alone_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot be made .File exists"):
        new_key(path)
    assert path.read_bytes() == before
    assert b"PRIVATE" in before
    assert b"PRIVATE" not in public.read_bytes()
    with pytest.raises(InputError, match="cannot be made"):
        new_key(tmp_path / "absent" / "key.pem")


@needs_cryptography
def test_other_keys_are_refused(run: Path, keys, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    def pem(key: Any, encryption: Any) -> bytes:
        return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    path = tmp_path / "refused.pem"
    none, locked = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"word")
    for content, message in (
        (b"", "no private key in PEM"),
        (keys[1].read_bytes(), "no private key in PEM"),
        (pem(ed25519.Ed25519PrivateKey.generate(), locked), "without a password"),
        (pem(ec.generate_private_key(ec.SECP256R1()), none), "not an Ed25519 key"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            sign(run, path)
    assert not envelope_path(run).exists()
    with pytest.raises(InputError, match="cannot be read"):
        sign(run, tmp_path / "absent.pem")
    sign(run, keys[0])
    with pytest.raises(InputError, match="no public key in PEM"):
        check_signature(envelope_path(run), keys[0])


def test_without_cryptography_one_line_says_what_to_install(run: Path, monkeypatch, capsys) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)  # its import raises ImportError
    with pytest.raises(SystemExit) as ended:
        main(["sign", str(run), "--key", "key.pem"])
    assert ended.value.code == 4
    error = capsys.readouterr().err
    assert "pip install 'sparsebridge[sign]'" in error
    assert error.count("\n") == 1
    envelope_path(run).write_text(
        json.dumps({"payloadType": PAYLOAD_TYPE, "payload": "", "signatures": [{"sig": ""}]})
    )
    assert outcome(run, None) == ("not checked", "not checked")
    with pytest.raises(MachineError):
        check_signature(envelope_path(run), Path("key.pub"))


# --- the command -----------------------------------------------------------------------------------------


@needs_cryptography
def test_the_command_makes_a_key_signs_and_names_what_it_wrote(run: Path, tmp_path: Path, capsys) -> None:
    key = tmp_path / "new.pem"
    main(["sign", str(run / "report.html"), "--new_key", str(key)])
    told = capsys.readouterr().out
    for path in (key, f"{key}.pub", run / "report.intoto.dsse.json"):
        assert f"{path}\n" in told
    assert outcome(run, Path(f"{key}.pub")) == ("signed", "ok")
    os.remove(envelope_path(run))
    main(["sign", str(run), "--key", str(key)])
    assert outcome(run, Path(f"{key}.pub")) == ("signed", "ok")


@needs_cryptography
def test_no_key_is_made_for_a_report_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sign", str(tmp_path / "absent.html"), "--new_key", str(tmp_path / "key.pem")])
    assert ended.value.code == 3
    assert not list(tmp_path.iterdir())
