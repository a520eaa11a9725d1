"""Edits: interventions on the student, carried into the dense model and kept as files.

An edit is the intervention, its crossings (`bridges.crossing`: site and directions of the dense stream per
change), and with source `bridge` the encoders that tell the sparse activation without the student.

    edit.json          intervention, crossings, source, hashes of all weights, limits and refusals, results
    edit.safetensors   directions, encoders

`bridges.live` runs an edit on the Hugging Face model, `bridges.edit_adapter` makes a PEFT adapter of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.crossing import Crossing, Rms, Source, cross, read_directions, reader_for
from bridges.dense import DenseModel
from bridges.reading import BridgeReader, ReadSettings
from extractor.artifacts import SCHEMA_VERSION, read_json, replace_folder, write_json
from extractor.config import Config
from extractor.errors import InputError
from extractor.intervention import Change, Intervention, patch
from extractor.sites import Node, Site
from extractor.student import Student


class EditLimits(Config):
    """What an edit must meet to be applied without force."""

    bridge_nmse: float = Field(0.5, gt=0)
    """Largest decoder error of the bridge at an edit's sites, as a share of the dense stream's energy (with
    source bridge also the encoder's)."""
    bridge_kl: float = Field(0.5, gt=0)
    """Largest KL to the dense model when it goes on from the decoded stream there, nats/token."""
    off_target_kl: float = Field(0.02, gt=0)
    """Largest KL to the unedited model on held-out text, nats/token; of an adapter, too."""
    adapter_missed: float = Field(0.5, gt=0)
    """Largest share of what an edit adds (its energy, on held-out prompts) that a fitted adapter may miss."""


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of the weights that an edit belongs to."""

    dense_sha256: str = "none"
    student_sha256: str = "none"
    bridges_sha256: str = "none"


@dataclass(frozen=True)
class Edit:
    """An intervention and the directions of the dense stream that it moves."""

    intervention: Intervention
    crossings: tuple[Crossing, ...]
    source: Source = "student"
    reader: BridgeReader | None = None
    hashes: Hashes = Hashes()
    refusals: tuple[str, ...] = ()
    """Limits that it does not meet; not empty only for an edit applied by force."""

    @classmethod
    def from_intervention(
        cls,
        intervention: Intervention,
        student: Student,
        bridges: BridgeSet,
        *,
        source: Source = "student",
        rms: Rms = "token",
        hashes: Hashes = Hashes(),  # noqa: B008  frozen
    ) -> "Edit":
        """Carry an intervention over.

        Raises:
            InputError: a node that cannot cross, with the reason; an intervention on another student.
        """
        if len({intervention.student_sha256, hashes.student_sha256} - {"none"}) > 1:
            raise InputError(
                f"the intervention belongs to a student with weights {intervention.student_sha256[:12]}, "
                f"this one has {hashes.student_sha256[:12]}"
            )
        crossings = cross(intervention, student, bridges, source=source, rms=rms)
        reader = reader_for(intervention, student, bridges, crossings) if source == "bridge" else None
        return cls(intervention, crossings, source, reader, hashes)

    @classmethod
    def from_nodes(cls, nodes: Sequence[Node], site: Site, bridges: BridgeSet) -> "Edit":
        """A patch of nodes that are read at one site.

        Raises:
            InputError: a node that is not read at this site.
        """
        wrong = [str(node) for node in nodes if node.address != site.read_address]
        if wrong:
            raise InputError(f"edit: {wrong[0]} is not read at {site} ({site.read_address})")
        intervention = patch(nodes)
        rows = read_directions([node.channel for node in nodes], site, bridges)
        rms = "token" if bridges.reads_are_normed else 1.0
        crossing = Crossing(intervention.changes[0], site, "read", rows, rms, bridges.removes_mean)
        return cls(intervention, (crossing,))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the dense stream is changed, in forward order."""
        return tuple(sorted({crossing.site for crossing in self.crossings}, key=lambda site: site.index))

    @property
    def site(self) -> Site:
        """The one site of the edit; an edit of several has none."""
        (site,) = self.sites
        return site

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes, crossing by crossing: each has its row in `directions`."""
        return tuple(node for crossing in self.crossings for node in crossing.change.nodes)

    @property
    def directions(self) -> Float[Tensor, "node d_dense"]:
        return torch.cat([crossing.directions for crossing in self.crossings])

    @property
    def is_constant(self) -> bool:
        """The same vectors are added at every token, so that biases can hold the edit."""
        return all(crossing.is_constant for crossing in self.crossings)

    def scaled(self, strength: float) -> "Edit":
        """Every strength times this one."""

        def scale(crossing: Crossing) -> Crossing:
            change = replace(crossing.change, strength=crossing.change.strength * strength)
            return replace(crossing, change=change)

        crossings = tuple(map(scale, self.crossings))
        return replace(self, intervention=self.intervention.scaled(strength), crossings=crossings)

    def delta(
        self,
        presented: Float[Tensor, "batch seq d_sparse"],
        counterfactual: Float[Tensor, "batch seq d_sparse"],
        dense_rms: Float[Tensor, "batch seq 1"],
    ) -> Float[Tensor, "batch seq d_dense"]:
        """What a patch of reads at one site adds to the dense stream at strength 1.

        `presented` and `counterfactual` are the student's activations at the site's read address.
        """
        columns = [node.channel for node in self.nodes]
        change = (counterfactual - presented)[..., columns]
        return change @ self.directions * dense_rms

    def save(self, folder: Path, facts: Mapping[str, object] = {}) -> None:  # noqa: B006  not changed
        """`edit.json` and `edit.safetensors`; `facts` holds the task and the measurements."""
        header = {
            "schema_version": SCHEMA_VERSION,
            "site": ", ".join(map(str, self.sites)),
            "nodes": [str(node) for node in self.nodes],
            "intervention": self.intervention.as_json(),
            "source": self.source,
            "crossings": [crossing.as_json() for crossing in self.crossings],
            "reader": self.reader.settings_json() if self.reader else None,
            **vars(self.hashes),
            "refusals": list(self.refusals),
            **facts,
        }
        tensors = {f"directions.{i}": c.directions for i, c in enumerate(self.crossings)}
        tensors |= {f"reader.{name}": t for name, t in (self.reader.tensors if self.reader else {}).items()}

        def write(target: Path) -> None:
            whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, target / "edit.safetensors", metadata={"format": "pt"})
            write_json(target / "edit.json", header)

        replace_folder(folder, write)

    @classmethod
    def load(cls, folder: Path, dense: DenseModel, *, force: bool = False) -> "Edit":
        """Read an edit made for this dense checkpoint.

        Raises:
            InputError: missing or damaged files, another base checkpoint, or limits that the edit did not
                meet when it was made, unless `force`.
        """
        header = read_json(folder / "edit.json", "edit", "recipes/edit.py")
        if header.get("dense_sha256") != dense.sha256:
            raise InputError(
                f"edit '{folder}' was made for a dense checkpoint with weights "
                f"{str(header.get('dense_sha256'))[:12]}, this one has {dense.sha256[:12]}"
            )
        try:
            tensors = load_file(folder / "edit.safetensors", device=str(dense.device))
            edit = _from_files(header, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"edit '{folder}' is damaged ({error!r}); make it again") from None
        refuse(edit.refusals, f"edit '{folder}'", force)
        return edit


def add_facts(folder: Path, facts: Mapping[str, object]) -> None:
    """Write more facts into the `edit.json` of a saved edit."""
    header = read_json(folder / "edit.json", "edit", "recipes/edit.py")
    write_json(folder / "edit.json", {**header, **facts})


def _from_files(header: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    intervention = Intervention.from_json(header["intervention"])
    parts = [part for change in intervention.changes for part in change.by_address()]
    settings = header["reader"]
    crossings = tuple(
        _crossing(change, value, tensors[f"directions.{i}"])
        for i, (change, value) in enumerate(zip(parts, header["crossings"], strict=True))
    )
    prefix = "reader."
    of_reader = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return Edit(
        intervention,
        crossings,
        header["source"],
        BridgeReader(ReadSettings(**settings), of_reader) if settings else None,
        Hashes(*(header[name] for name in vars(Hashes()))),
        tuple(header["refusals"]),
    )


def _crossing(change: Change, value: dict[str, Any], directions: Tensor) -> Crossing:
    return Crossing(
        change, Site.parse(value["site"]), value["via"], directions, value["rms"], value["removes_mean"]
    )


def unmet_limits(
    edit: Edit,
    limits: EditLimits,
    bridges: Mapping[str, Mapping[str, float]],
    off_target_kl: float | None = None,
) -> tuple[str, ...]:
    """Why this edit must not be applied without force; empty: it may.

    Args:
        bridges: the figures of `evaluate_bridges` by site, as in a run's evaluation.json.
        off_target_kl: nats/token on held-out text; None: not measured, or the edit has no meaning there.
    """
    checked = [("nmse_decode", limits.bridge_nmse), ("kl_sparse_to_dense", limits.bridge_kl)]
    if edit.source == "bridge":
        checked.append(("nmse_encode", limits.bridge_nmse))
    found = []
    for site in edit.sites:
        for name, limit in checked:
            measured = bridges.get(str(site), {}).get(name)
            if measured is None:
                found.append(f"the bridge at {site} was not evaluated ({name})")
            elif not measured <= limit:  # a NaN is refused, too
                found.append(f"the bridge at {site} has {name} {measured:.3g}, the limit is {limit:g}")
    if off_target_kl is not None and not off_target_kl <= limits.off_target_kl:
        found.append(f"off-target KL {off_target_kl:.3g} nats/token, the limit is {limits.off_target_kl:g}")
    return tuple(found)


def refuse(reasons: Sequence[str], what: str, force: bool) -> None:
    """Raises InputError with the reasons, if there are any and it is not forced."""
    if reasons and not force:
        raise InputError(f"{what} is refused: {'; '.join(reasons)}; force true applies it all the same")
