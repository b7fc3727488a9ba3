"""E2Former-V2 as a backbone of fairchem: AtomicData in, node embeddings out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fairchem.core.common import gp_utils
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import conditional_grad
from fairchem.core.models.base import BackboneInterface
from fairchem.core.models.uma.escn_md import GradRegressConfig
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.api.inference import validate_uma_atoms_data
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task
from torch import Tensor, nn

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.data.structures import check_cell
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.inference_mode import outside_inference_mode
from e2former_fairchem.model import E2FormerV2
from e2former_fairchem.parallel import OWN_ATOMS, Partition, active, agree, partition_atoms
from e2former_fairchem.parallel_guard import ParallelGuard
from e2former_fairchem.states import SeenStates
from e2former_fairchem.training.arguments import number
from e2former_fairchem.validation import (
    check_batch,
    check_keys,
    first_time,
    log_once,
    plain,
    read_other_spellings,
    shows_keys_of,
    symbol,
)
from e2former_fairchem.verlet import VerletList

if TYPE_CHECKING:
    from ase import Atoms
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

__all__ = ["E2FormerV2Backbone"]

# What FAIRChemCalculator builds for external_graph_gen: radius (Å) and the most neighbours it keeps.
_EXTERNAL_RADIUS = 6.0
_EXTERNAL_NEIGHBORS = 300

# The long-range graph keeps this many times max_neighbors; its sources are heavy atoms (docs/network.md, section 2).
_LONG_RANGE_NEIGHBORS = 2.5


@registry.register_model("e2former_v2")
class E2FormerV2Backbone(nn.Module, BackboneInterface):
    """E2Former-V2 (arXiv:2601.16622) behind fairchem's backbone interface.

    The network's keys (``lmax`` to ``max_num_elements``) are those of `e2former_fairchem.config.E2FormerV2Config`,
    which documents and checks them and has their defaults. Of the backbone alone are those below.

    ``forward`` returns ``node_embedding`` [N, (lmax+1)^2, C] in e3nn's order and sign (rows of a degree l: l^2 to
    (l+1)^2 - 1, degree 1 as x, y, z), and ``batch``. It sets ``batch_full`` and ``atomic_numbers_full`` in the data,
    which heads and element references read. With graph parallelism the embeddings, ``batch`` and the data's ``batch``
    and ``atomic_numbers`` are those of this worker's atoms, as in fairchem's models; ``own_atoms`` says which they are.

    The buffer ``elements_seen`` [max_num_elements + 1] is 1 for the atomic numbers of the batches that the weights were
    trained on, by any worker, and 2 for those that only an earlier training saw, from whose weights this one started.
    Its entry 0 is 0, and all others 1, until training begins; all are 1 where nothing is known, as in checkpoints
    without the buffer. ``states_seen`` has the charges and multiplicities of a checkpoint's card
    (`e2former_fairchem.states.SeenStates`); None where nothing is known, as in training.

    Args:
        max_neighbors: keep only the nearest so many neighbours (the authors: 32); None, the default, keeps every atom
            within the cutoff. Truncation makes energy and forces discontinuous.
        otf_graph: build graphs here; False takes ``edge_index`` and ``cell_offsets`` from the data.
        direct_forces: forces come from a head, not from the energy's gradient.
        regress_forces: heads that differentiate return forces.
        regress_stress: heads that differentiate return stress.
        dataset_mapping: names of the data sets whose tasks this backbone accepts (to the name of their head), or None
            for any.
        strict_elements: refuse structures with elements, or a charge and multiplicity, that training never saw, instead
            of a warning.

    Raises:
        TypeError: an unknown key.
        ValueError: a value or a combination that cannot be.
    """

    @shows_keys_of(E2FormerV2Config)
    def __init__(
        self,
        *,
        max_neighbors: int | None = None,
        otf_graph: bool = True,
        direct_forces: bool = False,
        regress_forces: bool = True,
        regress_stress: bool = False,
        dataset_mapping: Mapping[str, str] | None = None,
        strict_elements: bool = False,
        **network: Any,
    ) -> None:
        super().__init__()
        given = {name: plain(value) for name, value in locals().items() if name not in ("self", "network", "__class__")}
        keys = {f.name for f in fields(E2FormerV2Config)}
        check_keys("e2former_v2", {k: v for k, v in network.items() if k not in keys}, type(self).__init__)
        config = E2FormerV2Config(**{name: plain(value) for name, value in network.items()})
        _check_own_keys(given)
        self.model = E2FormerV2(config)
        self.regress_config = GradRegressConfig(
            direct_forces=direct_forces, forces=regress_forces, stress=regress_stress, hessian=False, hessian_vmap=False
        )
        self.cutoff = float(config.cutoff)
        self.max_neighbors = max_neighbors
        self.otf_graph = otf_graph
        self.max_num_elements = config.max_num_elements
        self.dataset_mapping = given["dataset_mapping"]
        self.strict_elements = strict_elements
        self.register_buffer("elements_seen", (torch.arange(config.max_num_elements + 1) > 0).long())
        self.states_seen: SeenStates | None = None
        self.register_load_state_dict_pre_hook(_take_records)
        # What fairchem's heads read.
        self.lmax = config.lmax
        self.sphere_channels = config.sphere_channels
        self.hidden_channels = config.sphere_channels
        self._external_graph = False
        self._guard = ParallelGuard()
        self._refusal: str | None = None
        self._skin = 0.0
        self._lists: dict[float, VerletList] = {}
        if max_neighbors is not None:
            logging.warning(
                f"e2former_v2: max_neighbors={max_neighbors} keeps only the nearest neighbours of an atom, so that "
                "energy and forces jump when two neighbours change places; null keeps the potential continuous."
            )

    @property
    def config(self) -> E2FormerV2Config:
        """The network's configuration."""
        return self.model.config

    @property
    def num_params(self) -> int:
        """Number of trainable and frozen parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def elements(self) -> tuple[str, ...] | None:
        """Symbols of the elements that training has seen, an earlier one included; None where nothing is known."""
        seen = self.elements_seen.tolist()
        return None if all(seen) or not seen[0] else tuple(symbol(z) for z, there in enumerate(seen) if z and there)

    def begin_anew(self) -> None:
        """Weights that were trained go into another training: what has been seen was seen before."""
        self.states_seen = None  # the card of the next checkpoint has both trainings'
        if self.elements is not None:
            self.elements_seen[1:].mul_(2).clamp_(max=2)

    def forget_elements(self) -> None:
        """Keep no record of the elements seen, in the state dict neither: nothing is known of them."""
        self.register_buffer("elements_seen", torch.ones_like(self.elements_seen), persistent=False)

    def keep_neighbors(self, skin: float) -> None:
        """Search neighbours within the cutoff and a skin (Å), and anew only when an atom has moved half of it.

        For inputs that change little from call to call: dynamics, relaxations. Results are the same to the last bit,
        and another structure is found out and searched anew. 0 searches at every call, as without.
        """
        self._skin = number("skin", skin)
        self._lists = {}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names, from the backbone, of the parameters without weight decay (docs/network.md, section 15.2)."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @outside_inference_mode
    @conditional_grad(torch.enable_grad())
    def forward(self, data: AtomicData) -> dict[str, Tensor]:
        """Node embeddings of a batch; see the class."""
        charge, spin, graph, long_graph = data["prepared"] if "prepared" in data else self.prepare(data)
        atoms = data["atomic_numbers_full"], charge, spin, data["batch_full"], data["pos"]
        embedding = self.model(*atoms, graph, long_graph)
        output = {"node_embedding": embedding, "batch": data["batch"]}
        if graph.halo is not None:
            output[OWN_ATOMS] = graph.halo.own
        return output

    @torch.compiler.disable
    def prepare(self, data: AtomicData) -> tuple[Tensor, Tensor, Graph, Graph | None]:
        """Checks, gradients and graphs: all that depends on values rather than shapes, in one place.

        Args:
            data: the batch. Gradients of its positions and cell are switched on where they are wanted.

        Returns:
            Charge and spin [B] and the two graphs. ``forward`` takes them as ``data["prepared"]`` where they are there,
            and then neither looks at a value nor changes the data.
        """
        try:
            return self._prepare(data)
        except Exception as error:
            self._guard.remember(error)
            raise

    def _prepare(self, data: AtomicData) -> tuple[Tensor, Tensor, Graph, Graph | None]:
        learning = self.training and any(p.requires_grad for p in self.parameters())
        check = partial(check_batch, data, self.max_num_elements)
        if not learning:
            check = partial(check, self.elements_seen, self.states_seen, self.strict_elements)
        partition = self._partition(data) if active() else None
        charge, spin = check()
        data["atomic_numbers"] = numbers = data["atomic_numbers"].long()
        if learning:
            self._record(numbers)
        data["atomic_numbers_full"] = numbers
        data["batch_full"] = batch = data["batch"]
        regress = self.regress_config
        if not regress.direct_forces:
            if (regress.forces or regress.stress) and not data["pos"].requires_grad:
                data["pos"].requires_grad_(True)
            if regress.stress and not data["cell"].requires_grad:
                data["cell"].requires_grad_(True)
        graphs = self._graphs(data, partition)
        if partition is not None:
            data["atomic_numbers"], data["batch"] = numbers[partition.own], batch[partition.own]
        return charge, spin, *graphs

    def _record(self, numbers: Tensor) -> None:
        """Add the elements of a training batch to those seen, without a word to the host.

        Workers see different batches, and a checkpoint holds the buffers of one of them: so all of them hold the union.
        They are in step anyway, for the sum of their gradients.
        """
        there = torch.zeros_like(self.elements_seen).index_fill_(0, numbers, 1)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(there, dist.ReduceOp.MAX)
        self.record_elements(there)

    def record_elements(self, there: Tensor) -> None:
        """Add to the elements seen those that training batches of all workers have. Nothing is read by the host.

        Args:
            there: [max_num_elements + 1] int64, 0 for atomic numbers that no batch has.
        """
        self.states_seen = None
        seen = self.elements_seen
        seen.mul_(seen[0].clone())  # before training began, no element was held to be unseen
        seen[:1].fill_(1)
        seen.masked_fill_(there > 0, 1)

    def _partition(self, data: AtomicData) -> Partition:
        """This worker's part of the atoms, of a batch that is whole and the same for all workers."""
        refusal, self._refusal = self._refusal, None
        if data["atomic_numbers"].shape[0] != data["pos"].shape[0]:  # a batch that was evaluated before
            data["atomic_numbers"], data["batch"] = data["atomic_numbers_full"], data["batch_full"]
        agree(data, refusal)
        partition = partition_atoms(data["pos"])
        if gp_utils.get_gp_config().mode == gp_utils.GPMode.ALL_TO_ALL:  # fairchem's force head reads it
            data["gp_ctx"] = SimpleNamespace(rank_assignments=partition.owner)
        return partition

    def _graphs(self, data: AtomicData, partition: Partition | None) -> tuple[Graph, Graph | None]:
        long_range = self.config.long_range
        graph = self._graph(data, self.cutoff, self.max_neighbors, partition=partition)
        if long_range is None:
            return graph, None
        limit = None if self.max_neighbors is None else int(_LONG_RANGE_NEIGHBORS * self.max_neighbors)
        heavy = data["atomic_numbers"] > 1
        options = {"lower": long_range.lower, "source_mask": heavy, "partition": partition}
        return graph, self._graph(data, long_range.upper, limit, **options)

    def _graph(self, data: AtomicData, cutoff: float, max_neighbors: int | None, **options: Any) -> Graph:
        given = {}
        if not self.otf_graph and "lower" not in options:
            for key in ("edge_index", "cell_offsets"):
                if key not in data:
                    raise ValueError(f"{key}: expected in the data because otf_graph is false, got none")
                given[key] = data[key]
            if self._external_graph:
                _check_not_truncated(data["edge_index"])
        elif self._skin and options.get("partition") is None:
            options["kept"] = self._lists.setdefault(cutoff, VerletList(self._skin))
        return build_graph(
            data["pos"],
            data["cell"],
            data["pbc"],
            data["batch"],
            data["natoms"],
            cutoff,
            max_neighbors,
            **options,
            **given,
        )

    @classmethod
    def build_inference_settings(cls, settings: InferenceSettings) -> dict[str, Any]:
        """Backbone keys for fairchem's inference settings; changes the settings that this backbone cannot serve.

        Where there is a GPU nothing is compiled (kernels/benchmarks/results/md_compiled.json). Hessians differentiate
        twice, which neither a compiled backward pass nor the vmap over it supports: they run eagerly, row by row.

        Blocks are not recomputed in the backward pass, as fairchem's own default and its preset ``batch`` ask for
        models that keep tensors of all edges: ours keep those of atoms (and on a CPU 64 MB of edges a layer at most),
        and the settings say afterwards what runs.
        """
        if settings.predict_untrained_hessian:
            if settings.compile:
                logging.warning("e2former_v2: compile is switched off, Hessians need second derivatives.")
                settings.compile = False
            if settings.hessian_vmap:
                logging.warning("e2former_v2: hessian_vmap is switched off, Hessians are computed row by row.")
        settings.hessian_vmap = False
        if settings.compile and torch.cuda.is_available():
            log_once(
                "e2former_v2: compile is switched off where there is a GPU: a compiled model has no frozen weights, no "
                "float16 rows and no CUDA graphs, and is eight times slower (measured)."
            )
            settings.compile = False
        if settings.activation_checkpointing:
            if first_time("activation_checkpointing of inference settings"):
                logging.info(
                    "e2former_v2: activation_checkpointing is switched off at inference: memory is that of atoms "
                    "without, and every block would be computed twice."
                )
            settings.activation_checkpointing = False
        return {
            "activation_checkpointing": False,
            "otf_graph": not settings.external_graph_gen,
        }

    def get_default_untrained_tasks(
        self, checkpoint_tasks: dict[str, Task], inference_settings: InferenceSettings
    ) -> list[Task]:
        """A stress task for every conserving energy task without one, so that cells can be relaxed.

        Direct-force models have none: their energy has no stress that their forces would agree with.
        """
        if self.regress_config.direct_forces:
            return []
        datasets = {
            kind: {name for task in checkpoint_tasks.values() if task.property == kind for name in task.datasets}
            for kind in ("forces", "stress")
        }
        tasks = []
        for energy in checkpoint_tasks.values():
            if energy.property != "energy" or not energy.name.endswith("energy"):
                continue
            wanted = [
                name
                for name in energy.datasets
                if name in datasets["forces"]
                and name not in datasets["stress"]
                and name not in inference_settings.predict_untrained_stress
            ]
            if wanted:
                tasks.append(
                    Task(
                        name=energy.name.removesuffix("energy") + "stress",
                        level="system",
                        property="stress",
                        out_spec=OutputSpec(dim=[1, 9], dtype=inference_settings.base_precision_dtype),
                        normalizer=_without_mean(energy.normalizer),
                        datasets=wanted,
                        inference_only=True,
                    )
                )
        return tasks

    def validate_tasks(self, dataset_to_tasks: dict[str, list]) -> None:
        """Check the tasks' data sets against ``dataset_mapping``.

        Derivatives asked for at inference get the scale of the energy's normaliser without its mean, which fairchem
        would add to every force, stress or Hessian entry.

        Args:
            dataset_to_tasks: tasks of each data set.

        Raises:
            ValueError: a data set is not in the mapping.
        """
        for task in (task for tasks in dataset_to_tasks.values() for task in tasks):
            if task.inference_only and task.property in ("forces", "stress", "hessian"):
                task.normalizer = _without_mean(task.normalizer)
        if self.dataset_mapping is None:
            return
        missing = sorted(set(dataset_to_tasks) - set(self.dataset_mapping))
        if missing:
            raise ValueError(
                f"dataset_mapping: expected the data sets of all tasks, {sorted(dataset_to_tasks)}, but {missing} are "
                f"not among {sorted(self.dataset_mapping)}"
            )

    def prepare_for_inference(self, data: AtomicData, settings: InferenceSettings) -> E2FormerV2Backbone:
        """Freeze the weights (`E2FormerV2.freeze`) and refuse what would compute a wrong number; nothing is replaced.

        Args:
            data: a batch, not looked at.
            settings: fairchem's.

        Raises:
            ValueError: edges come from fairchem's calculator, whose fixed radius this model's cutoff exceeds, or
                ``strict_elements`` meets a checkpoint without a record of them.
            RuntimeError: another model among the workers of one graph-parallel group.
        """
        self._guard.prepare(self, data, settings)
        self._external_graph = bool(settings.external_graph_gen)
        if self._external_graph and self.cutoff > _EXTERNAL_RADIUS:
            raise ValueError(
                f"external_graph_gen: fairchem's external graph ends at {_EXTERNAL_RADIUS} Å, expected at least this "
                f"model's cutoff, {self.cutoff} Å; use external_graph_gen=False"
            )
        if self.strict_elements and self.elements is None:
            raise ValueError(
                "strict_elements: expected a checkpoint that knows which elements training has seen, got one without "
                "that record (of an earlier version, or without training); use strict_elements=false"
            )
        self.model.freeze()
        return self

    def on_predict_check(self, data: AtomicData) -> None:
        """With fairchem's parallel predict unit: refuse what would be a wrong number or wait forever."""
        self._refusal = self._guard.refusal(self)

    def validate_atoms_data(self, atoms: Atoms, task_name: str) -> None:
        """Set charge and spin in ``atoms.info`` where they are missing and check their ranges.

        What other programs call them (``total_charge``, ``multiplicity``, ``spin_multiplicity``) is read before
        fairchem's defaults are taken. Of fairchem's batch server, which passes a stub, only ``atoms.info`` is read.

        Args:
            atoms: the structure.
            task_name: data set of the task.

        Raises:
            TypeError: as fairchem's UMA.
            ValueError: as fairchem's UMA, and for charges or spins that contradict each other, a periodic direction
                without a lattice vector, and, with the parallel predict unit, inputs that change when it sends
                positions and cells alone.
        """
        read_other_spellings(atoms.info)
        validate_uma_atoms_data(atoms, task_name)
        check_cell(atoms)
        if atoms.info["spin"] == 0:
            log_once(
                "e2former_v2: spin 0 stands for a spin multiplicity that is not given; set atoms.info['spin'] (1 for a "
                "singlet)."
            )
        self._guard.announce(atoms, task_name)


def _check_own_keys(given: Mapping[str, Any]) -> None:
    """Keys of the backbone alone: types and combinations."""
    for key in ("otf_graph", "direct_forces", "regress_forces", "regress_stress", "strict_elements"):
        if not isinstance(given[key], bool):
            raise ValueError(f"{key}: expected true or false, got {given[key]!r}")
    limit = given["max_neighbors"]
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"max_neighbors: expected a positive integer or null, got {limit!r}")
    if given["direct_forces"] and given["regress_stress"]:
        raise ValueError(
            "regress_stress: expected false with direct_forces: true (stress is a derivative of the energy), got true"
        )
    if given["direct_forces"] and not given["regress_forces"]:
        raise ValueError("regress_forces: expected true with direct_forces: true, got false")
    if given["regress_stress"] and not given["regress_forces"]:
        raise ValueError("regress_forces: expected true with regress_stress: true, got false")
    mapping = given["dataset_mapping"]
    if mapping is None:
        return
    if not isinstance(mapping, Mapping) or not mapping:
        raise ValueError(f"dataset_mapping: expected a non-empty mapping of data set names or null, got {mapping!r}")
    strangers = sorted(set(mapping.values()) - set(mapping))
    if strangers:
        raise ValueError(f"dataset_mapping: expected values among its keys {sorted(mapping)}, got {strangers}")


def _take_records(backbone: E2FormerV2Backbone, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading weights: of what has no record beside them, elements or states, nothing is known."""
    states = state.pop(f"{prefix}states_seen", None)
    if not any(name.startswith(f"{prefix}model.") for name in state):
        return
    backbone.states_seen = None if states is None else SeenStates.from_rows(states)
    key = f"{prefix}elements_seen"
    if "elements_seen" in backbone.state_dict() and key not in state:
        state[key] = torch.ones_like(backbone.elements_seen)


def _without_mean(normalizer: Normalizer) -> Normalizer:
    return Normalizer(mean=0.0, rmsd=float(normalizer.rmsd))


def _check_not_truncated(edge_index: Tensor) -> None:
    counts = torch.bincount(edge_index[1], minlength=1)
    if int(counts.max()) >= _EXTERNAL_NEIGHBORS:
        atom = int(counts.argmax())
        raise ValueError(
            f"external_graph_gen: atom {atom} has {int(counts[atom])} neighbours and fairchem's external graph keeps "
            f"at most {_EXTERNAL_NEIGHBORS}, so that neighbours may be missing; use external_graph_gen=False"
        )
