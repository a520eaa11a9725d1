"""Model cards for a run folder, from its own JSON files, and the upload of a run to a model hub.

`write_cards` puts a README.md (YAML metadata, text) into the run, student/, bridges/, circuits/ and every
edits/<task>/. No figure in a card is typed in: all come from evaluation.json, manifest.json, circuits/ and
edits/. `push` sends the folder to a hub; nothing does so by itself.
"""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bridges.hub import HUB_ID
from extractor.artifacts import read_json, write_text
from extractor.errors import InputError, UsageError

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = "sparsebridge"
NOT_SENT = ["checkpoints/**", "**/.tmp-*", ".tmp-*/**"]


def write_cards(run: Path) -> list[Path]:
    """Write the cards of everything that the run has; returns their paths.

    Raises:
        InputError: the run has no evaluation or manifest, or a damaged one.
    """
    facts = _run_facts(run)
    cards = {
        run: _card("run_card.md.jinja", facts, tags=["student", "bridges"]),
        run / "student": _card("student_card.md.jinja", facts, library="transformers", tags=["student"]),
        run / "bridges": _card("bridges_card.md.jinja", facts, tags=["bridges"]),
    }
    if facts["circuits"]:
        cards[run / "circuits"] = _card("circuits_card.md.jinja", facts, tags=["circuits"])
    for edit in facts["edits"]:
        card = _card("edit_card.md.jinja", facts | {"edit": edit}, tags=["edit", "steering"])
        cards[run / "edits" / edit["task"]] = card
    paths = []
    for folder, card in cards.items():
        if folder.is_dir():
            paths.append(folder / "README.md")
            write_text(paths[-1], f"{str(card).rstrip()}\n")
    return paths


def push(
    run: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Create the hub repository if need be, upload the run folder, and return the address of the commit.

    What is sent is everything in the folder but checkpoints: config.yaml and manifest.json, too, with the
    paths in them. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        private: of a new repository; an existing public one is refused.
        revision: a branch, made if it is not there; None: the main one.
        endpoint: another hub than HF_ENDPOINT's.

    Raises:
        UsageError: no repository name.
        InputError: no finished run, no network by HF_HUB_OFFLINE, or the hub refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"'{repo_id}' cannot name a hub repository: {_one_line(error)}") from None
    read_json(run / "evaluation.json", "evaluation", "recipes/train.py")
    if is_offline_mode():
        raise InputError(f"'{run}' is not sent to '{repo_id}': HF_HUB_OFFLINE is set")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(f"'{repo_id}' exists and is public; '{run}' is not sent unless private is false")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=run,
            revision=revision,
            ignore_patterns=NOT_SENT,
            commit_message=f"{LIBRARY} run {run.resolve().name}",
        )
    except InputError:
        raise
    except Exception as error:  # the hub's errors, and its HTTP library's, share no base class
        raise InputError(
            f"'{run}' could not be sent to '{repo_id}' ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return str(commit.commit_url)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- what the cards say ------------------------------------------------------------------------------------


def _run_facts(run: Path) -> dict[str, Any]:
    evaluation = read_json(run / "evaluation.json", "evaluation", "recipes/train.py")
    manifest = read_json(run / "manifest.json", "manifest", "recipes/train.py")
    bridges = read_json(run / "bridges" / "bridges.json", "bridges", "recipes/train.py")
    circuits = [
        read_json(path, "circuit", "recipes/extract.py") for path in sorted((run / "circuits").glob("*.json"))
    ]
    edits = [
        read_json(path, "edit", "recipes/edit.py") for path in sorted((run / "edits").glob("*/edit.json"))
    ]
    try:
        return {
            "dense": _dense_facts(evaluation, manifest),
            "student": evaluation["student"],
            "from_run": manifest["train"]["inputs"].get("from_run"),
            "own_shares": _own_shares(evaluation["student"]),
            "sites": _site_rows(evaluation["bridges"]),
            "held_out_tokens": evaluation["held_out_tokens"],
            "bridges": bridges,
            "circuits": circuits,
            "edits": [edit | {"rows": _edit_rows(edit)} for edit in edits],
            "recipes": [name for name, entry in manifest.items() if isinstance(entry, dict)],
            "environment": manifest["train"]["environment"],
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"run '{run}' is damaged: its JSON files lack {error}") from None


def _own_shares(student: dict[str, Any]) -> dict[str, float]:
    """Share of weights kept, of the matrices that have one of their own."""
    shares = {name: matrix["k"] / math.prod(matrix["shape"]) for name, matrix in student["matrices"].items()}
    return {
        name: share
        for name, share in shares.items()
        if not math.isclose(share, student["density"], rel_tol=0.02)
    }


def _dense_facts(evaluation: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """What the student was copied from; only a hub id can be metadata (`base_model`)."""
    inputs = manifest["train"]["inputs"]["dense"]
    dense = evaluation["dense"]
    commit = inputs.get("commit")
    return {
        "name": dense["name"],
        "sha256": dense["sha256"],
        "ce": dense["ce"],
        "commit": commit,
        "hub_id": dense["name"] if commit and HUB_ID.fullmatch(dense["name"]) else None,
        "quantization": inputs.get("quantization", "none"),
        "random_weights": inputs.get("random_weights", False),
        "train_text_sha256": manifest["train"]["inputs"]["train_text_sha256"],
        "load": ", ".join(f"{key}={value!r}" for key, value in _load_options(dense["name"], inputs).items()),
    }


def _load_options(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of `DenseConfig` that load the weights which the run's hashes name."""
    tokenizer = inputs.get("tokenizer", name)
    options = {
        "path": name,
        "revision": inputs.get("commit"),
        "tokenizer": tokenizer if tokenizer != name else None,
        "adapter": inputs.get("adapter"),
        "allow_pickle": inputs.get("format") == "pickle",
        "trust_remote_code": inputs.get("remote_code"),
        "random_weights": inputs.get("random_weights"),
    }
    return {key: value for key, value in options.items() if value}


def _site_rows(sites: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [{"site": site, **figures} for site, figures in sites.items()]


def _edit_rows(edit: dict[str, Any]) -> list[dict[str, float]]:
    """One row per strength."""
    names = (
        "strengths",
        "flip_rate",
        "flip_rate_indirect",
        "control_random_node",
        "control_random_direction",
    )
    return [dict(zip(names, row, strict=True)) for row in zip(*(edit[name] for name in names), strict=True)]


def _card(template: str, facts: dict[str, Any], *, tags: list[str], library: str = LIBRARY) -> ModelCard:
    data = ModelCardData(
        base_model=facts["dense"]["hub_id"],
        library_name=library,
        pipeline_tag="text-generation" if library == "transformers" else None,
        tags=[LIBRARY, "interpretability", "weight-sparse", *tags],
        density=facts["student"]["density"],
        kl_dense_nats_per_token=facts["student"]["kl_dense"],
    )
    return ModelCard.from_template(data, template_path=str(TEMPLATES / template), **facts)
