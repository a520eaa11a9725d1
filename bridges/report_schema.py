"""The shape of report.json as types; `templates/report.schema.json` is made from them and committed.

A number is finite, or `{"undefined": reason}`; NaN and infinity are not JSON and are in no report. Named
fields are those that the page and `sparsebridge replay` read; a section may hold more, of any JSON, so that
evidence can grow without a new version.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    JsonValue,
    Tag,
    TypeAdapter,
    ValidationError,
)

from extractor.artifacts import SCHEMA_VERSION

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
SHOWN_FAULTS = 20


class Closed(BaseModel):
    """These fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Open(BaseModel):
    """These fields, and any others."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class Undefined(Closed):
    """In the place of a value that is none."""

    undefined: str


def _tag(value: Any) -> str:
    is_undefined = isinstance(value, Undefined) or (isinstance(value, dict) and "undefined" in value)
    return "<undefined>" if is_undefined else "<known>"


class _OrUndefined:
    """`OrUndefined[X]`: an X, or why there is none.

    They are told apart before either is tried, so that a fault is named once and in its place.
    """

    def __getitem__(self, kind: Any) -> Any:
        known, unknown = Annotated[kind, Tag("<known>")], Annotated[Undefined, Tag("<undefined>")]
        return Annotated[known | unknown, Discriminator(_tag)]


OrUndefined = _OrUndefined()
Number = OrUndefined[FiniteFloat]
ShareOf = OrUndefined[Share]


class Behaviour(Open):
    """A model on one task's held-out prompts; loss in nats per prompt."""

    accuracy: ShareOf
    loss: Number


class Dense(Open):
    name: str
    sha256: Sha256
    ce: Number
    """Cross-entropy on held-out text, nats/token."""
    tasks: OrUndefined[dict[str, OrUndefined[Behaviour]]]


class Student(Open):
    ce: Number
    kl_dense: Number
    """KL(dense || student) on held-out text, nats/token."""
    init_kl_dense: Number
    density: ShareOf
    nonzeros: int
    parameters: int
    tasks: OrUndefined[dict[str, OrUndefined[Behaviour]]]


class Bridge(Open):
    """Of one site: errors as shares of the target's mean square, KL in nats/token."""

    nmse_encode: Number
    nmse_decode: Number
    kl_dense_to_sparse: Number
    kl_sparse_to_dense: Number


class Check(Open):
    name: str
    value: Number | None
    relation: str
    limit: Number
    passed: bool | None


class Verdict(Open):
    word: Literal["supported", "partly", "not supported", "not tested"]
    reasons: list[Check]


class Graph(Closed):
    """Addresses of nodes; edges as [source, target, weight]."""

    nodes: list[str]
    edges: list[tuple[str, str, Number]]


class Circuit(Open):
    """A task's circuit on held-out prompts; losses in nats per prompt."""

    nodes: int
    edges: int
    nodes_total: int
    edges_total: int
    num_prompts: int
    loss: Number
    accuracy: ShareOf
    student_loss: Number
    student_accuracy: ShareOf
    ablation: Literal["mean", "zero", "resample"]
    target_loss: Number
    verdict: Verdict
    graph: OrUndefined[Graph]


class Edit(Open):
    """An edit of the dense model; every series has one value per strength."""

    site: str
    nodes: list[str]
    size: int
    num_prompts: int
    strengths: list[FiniteFloat]
    flip_rate: list[ShareOf]
    flip_rate_indirect: list[ShareOf]
    control_random_node: list[ShareOf]
    control_random_direction: list[ShareOf]
    refusals: list[str]


class Prompt(Closed):
    text: str
    answer: str
    distractor: str


class Desk(Open):
    """Recorded interventions: [node][setting][prompt]; see bridges.desk."""

    prompts: list[Prompt]
    tokens: list[str]
    nodes: list[str]
    nodes_total: int
    student: list[list[list[FiniteFloat]]]
    dense: list[list[list[FiniteFloat]]]
    student_top: list[list[list[int]]]
    dense_top: list[list[list[int]]]


class Criterion(Closed):
    claim: str
    threshold: str
    measured: str
    met: OrUndefined[bool]


class Exclusion(Closed):
    what: str
    why: str


class Account(Closed):
    """Of one kind of number: how many were planned, run, scored and excluded, and why."""

    what: str
    planned: int
    run: int
    scored: int
    excluded: int
    why: str


class Tolerance(Closed):
    prompts: int
    nats: FiniteFloat


class Method(Open):
    config: str
    replay: str
    tolerance: Tolerance


class Provenance(Open):
    date: str
    environment: dict[str, JsonValue]
    inputs: dict[str, JsonValue]
    artifacts: dict[str, Sha256]


class Integrity(Closed):
    page_code_sha256: Sha256
    fields: dict[str, Sha256]


class Report(Open):
    """report.json of a run."""

    schema_version: Literal[1]
    status: str
    run: str
    dense: Dense
    student: Student
    bridges: OrUndefined[dict[str, OrUndefined[Bridge]]]
    circuits: OrUndefined[dict[str, OrUndefined[Circuit]]]
    edits: OrUndefined[dict[str, OrUndefined[Edit]]]
    desk: OrUndefined[dict[str, OrUndefined[Desk]]]
    criteria: list[Criterion]
    exclusions: list[Exclusion]
    accounting: list[Account]
    method: Method
    provenance: Provenance
    integrity: Integrity


_ADAPTER = TypeAdapter(Report)
assert SCHEMA_VERSION == 1


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sparsebridge report"}
    return {**_ADAPTER.json_schema(), **head}


def schema_faults(report: Any) -> list[str]:
    """Where a report is not what the schema says: JSON pointers with the reason; empty: it is."""
    try:
        _ADAPTER.validate_json(json.dumps(report))
    except ValidationError as error:
        return [f"{_pointer(fault['loc'])}: {fault['msg']}" for fault in error.errors()][:SHOWN_FAULTS]
    return []


def _pointer(place: tuple[int | str, ...]) -> str:
    """Where in the record, without the branches of "a value or undefined"."""
    return "/" + "/".join(str(part) for part in place if part not in ("<known>", "<undefined>"))
