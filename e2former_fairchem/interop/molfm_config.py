"""The authors' flattened YAML as our configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from e3nn import o3

from e2former_fairchem.data.references import NUM_ELEMENTS

Release = Literal["v2", "v1_5"]

# What the two releases do differently on this path (docs/network.md, section 14.1).
_ENVELOPE_EXPONENT = {"v2": 3, "v1_5": 5}
_LONG_LOWER = {"v2": 2.5, "v1_5": 0.1}
_SCORES = {"QK_alpha": "qk", "QKdot_alpha": "qk_dot", "QKdotS_alpha": "qk_dot_scalar"}
_ORDERS = {"so2-first-order": 1, "zero-order": 0}
# eV of one unit in which labels were given to the loss, and therefore of the output (docs/network.md, section 14.3).
_LOSS_UNITS = {"ev": 1.0, "kcal/mol": 0.0433634, "mev": 1e-3, "normev": 1.5}
# Release v1.5 gives data sets a common head (docs/network.md, section 14.3).
_RENAMED = dict.fromkeys(("svp-enhance", "tzvpd-small", "tzvpd-forceatomfilter"), "tzvpd")


@dataclass(frozen=True)
class MolFMConfig:
    """The authors' configuration in our words.

    Args:
        backbone: keyword arguments of the backbone.
        conserving: forces by autograd.
        force_head: ``linear``, ``painn``.
        datasets: names the checkpoint may have heads for.
        unit: eV (and eV/Å) of one unit of the network's output.
    """

    backbone: dict[str, Any]
    conserving: bool
    force_head: str
    datasets: tuple[str, ...]
    unit: float = 1.0


def parse_release(release: str) -> Release:
    """``v2`` or ``v1.5`` -> the key that the backbone uses.

    Raises:
        ValueError: another release.
    """
    if release not in ("v2", "v1.5"):
        raise ValueError(f"release: expected 'v2' or 'v1.5', got {release!r}")
    return "v2" if release == "v2" else "v1_5"


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{key}: expected true or false, got {value!r}")
    return value


def _irreps(key: str, value: Any) -> tuple[int, int]:
    """``16x0e+16x1e`` -> (multiplicity, lmax); every degree once, ascending, same multiplicity."""
    irreps = o3.Irreps(str(value))
    multiplicities = {item.mul for item in irreps}
    degrees = [item.ir.l for item in irreps]
    if len(multiplicities) != 1 or degrees != list(range(len(degrees))):
        raise ValueError(f"{key}: expected one multiplicity for degrees 0, 1, ..., got {value!r}")
    return multiplicities.pop(), degrees[-1]


def _absent(value: Any) -> bool:
    return value is None or value is False or str(value).lower() in ("", "none", "false")


def _norm(tp_type: str, release: Release) -> str:
    if release == "v2":
        return "softplus" if tp_type == "QK_softplus" else "molfm_v2"
    if "softplus" in tp_type:
        return "softplus"
    return "sigmoid" if "sigmoid" in tp_type else "molfm_v1_5"


def _orders(attn_type: str, num_layers: int) -> list[int]:
    parts = attn_type.split("+")
    unknown = [part for part in parts if part not in _ORDERS]
    if unknown or len(parts) > 2:
        raise ValueError(f"attn_type: expected {' or '.join(_ORDERS)}, or two of them joined by '+', got {attn_type!r}")
    front, rear = _ORDERS[parts[0]], _ORDERS[parts[-1]]
    return [front if n < num_layers // 2 else rear for n in range(num_layers)]


def parse_molfm_config(config: Mapping[str, Any], release: str) -> MolFMConfig:
    """Translate the flattened MolFM YAML.

    Args:
        config: its keys; those of its ``backbone_config`` may also stand in that section.
        release: ``v2`` or ``v1.5``.

    Raises:
        ValueError: a missing key, or a value whose network is not implemented here.
    """
    release_key = parse_release(release)
    flat = dict(config)
    flat.update(flat.pop("backbone_config", None) or {})
    required = """
        num_layers irreps_node_embedding irreps_head attn_scalar_head num_attn_heads number_of_basis max_radius
        attn_type tp_type
    """.split()
    missing = [key for key in required if key not in flat]
    if missing:
        raise ValueError(f"MolFM configuration: missing keys {missing}")
    ffn_default = "default" if release_key == "v2" else "s3"
    for key, expected, default in (
        ("basis_type", "gaussiansmear", "gaussiansmear"),
        ("norm_layer", "rms_norm_sh", "rms_norm_sh"),
        ("ffn_type", "s3", ffn_default),
    ):
        value = flat.get(key, default)
        if key == "ffn_type" and release_key == "v1_5" and value == "default":
            value = "s3"
        if value != expected:
            raise ValueError(f"{key}: only {expected!r} is implemented, got {value!r}")
    channels, lmax = _irreps("irreps_node_embedding", flat["irreps_node_embedding"])
    multiplicity, head_lmax = _irreps("irreps_head", flat["irreps_head"])
    if head_lmax != lmax:
        raise ValueError(f"irreps_head: expected degrees up to {lmax} as irreps_node_embedding has, got {head_lmax}")
    num_layers = int(flat["num_layers"])
    tp_type = str(flat["tp_type"])
    max_neighbors = flat.get("max_neighbors")
    if max_neighbors is None and release_key == "v2":
        raise ValueError("max_neighbors: release v2 needs a number, got None")
    backbone = {
        "lmax": lmax,
        "sphere_channels": channels,
        "num_layers": num_layers,
        "num_heads": int(flat["num_attn_heads"]),
        "head_dim": int(flat["attn_scalar_head"]),
        "num_radial_basis": int(flat["number_of_basis"]),
        "value_multiplicity": multiplicity,
        "edge_layer_norm": "wolayernorm" not in str(flat.get("edge_embedtype", "default")),
        "inverse_distance": release_key,
        "cutoff": float(flat["max_radius"]),
        "max_neighbors": None if max_neighbors is None else int(max_neighbors),
        "score": _SCORES.get(tp_type.split("+")[0], "qk"),
        "message_order": _orders(str(flat["attn_type"]), num_layers),
        "attention_norm": _norm(tp_type, release_key),
        "envelope_exponent": _ENVELOPE_EXPONENT[release_key],
        "atom_embedding": False,
        "reflection_equivariant": False,
        "long_range": _long_range(flat, release_key),
        "max_num_elements": NUM_ELEMENTS,
    }
    force_head = "linear" if _absent(flat.get("with_moe")) else str(flat["with_moe"])
    if force_head not in ("linear", "painn"):
        raise ValueError(f"with_moe: expected None or 'painn', got {flat['with_moe']!r}")
    unit = str(flat.get("loss_unit") or "ev").lower()
    if unit not in _LOSS_UNITS:
        raise ValueError(f"loss_unit: expected one of {', '.join(_LOSS_UNITS)}, got {flat['loss_unit']!r}")
    conserving = _flag("AutoGradForce", flat.get("AutoGradForce", False))
    return MolFMConfig(backbone, conserving, force_head, _datasets(flat, release_key), _LOSS_UNITS[unit])


def _datasets(flat: Mapping[str, Any], release: Release) -> tuple[str, ...]:
    """Names that heads may have: the data sets' own, and what release v1.5 renames them to."""
    names = flat.get("dataset_name_list", "omol25")
    found = [n.strip() for n in names.split(",")] if isinstance(names, str) else [str(n) for n in names]
    if release == "v1_5":
        found += [_RENAMED[name] for name in found if name in _RENAMED]
        if "share" in str(flat.get("head_cfg_str", "")) and "tzvpd" in found:
            found.append("omol25")
    return tuple(dict.fromkeys(found))


def _long_range(flat: Mapping[str, Any], release: Release) -> dict[str, Any] | None:
    mode = flat.get("with_cluster")
    if _absent(mode):
        return None
    mode = str(mode)
    known = mode.startswith("node") if release == "v2" else "node" in mode
    if not known:
        raise ValueError(f"with_cluster: expected false or a 'node' mode, got {mode!r}")
    return {
        "layers": int(flat.get("long_range_layers", 2)),
        "lower": float(flat.get("long_cutoff_lower", _LONG_LOWER[release])),
        "upper": float(flat.get("long_cutoff_upper", 12.0)),
        "envelope": "bell" if "bell" in mode else "polynomial",
    }
