"""The authors' state dict as ours: every key is used, known to be unused, or an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from e2former_fairchem.config import E2FormerV2Config

# Constants, and tensors that no forward pass touches (docs/network.md, section 14.2).
_IGNORED = re.compile(
    r"decoder\.(embedding\.weight|unifiedtokentoembedding\.(weight|bias)|"
    r"decoder\.(default_node_embedding\.weight|heads2basis\.(weight|bias)|rbf(_long)?\.offset|Jd_list\.\d+|"
    r"edge_deg_embed_dense\.(proj\.(weight|bias)|sph\.W)|"
    r".*\.(expand_index|balance_degree_weight|sum_vec|path_norm|selected_idx|CG_weight)))"
)


class StateDictError(ValueError):
    """A state dict that does not fit; the message lists every missing, misshapen and unknown key."""


class _Reader:
    """Takes tensors out of a state dict and remembers everything that is wrong."""

    def __init__(self, source: Mapping[str, Tensor], rows: int) -> None:
        self.source, self.rows = dict(source), rows
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor under ``key``; a first size of -1 asks for at least ``rows`` rows and keeps those."""
        self.used.add(key)
        tensor = self.source.get(key)
        if tensor is None:
            self.missing.append(key)
        elif shape[0] == -1:
            if tuple(tensor.shape[1:]) == shape[1:] and tensor.shape[0] >= self.rows:
                return tensor[: self.rows]
            self.misshapen.append(f"{key}: expected [at least {self.rows}, {shape[1]}], got {list(tensor.shape)}")
        elif tuple(tensor.shape) != shape:
            self.misshapen.append(f"{key}: expected {list(shape)}, got {list(tensor.shape)}")
        else:
            return tensor
        return torch.zeros((self.rows, *shape[1:]) if shape[0] == -1 else shape)


def _radial(reader: _Reader, key: str, sizes: tuple[int, int, int], layer_norm: bool = True) -> dict[str, Tensor]:
    """One RadialProfile with (input, hidden, output) widths -> a group of ``RadialMLP``."""
    inputs, hidden, outputs = sizes
    front, middle, last = (0, 3, 6) if layer_norm else (0, 2, 4)
    out = {
        "weight0": reader.take(f"{key}.net.{front}.weight", hidden, inputs),
        "bias0": reader.take(f"{key}.net.{front}.bias", hidden),
        "weight1": reader.take(f"{key}.net.{middle}.weight", hidden, hidden),
        "bias1": reader.take(f"{key}.net.{middle}.bias", hidden),
        "weight2": reader.take(f"{key}.net.{last}.weight", outputs, hidden),
        "bias2": reader.take(f"{key}.net.{last}.bias", outputs),
    }
    if layer_norm:
        for name, position in (("norm0", 1), ("norm1", 4)):
            for part in ("weight", "bias"):
                out[f"{name}_{part}"] = reader.take(f"{key}.net.{position}.{part}", hidden)
    return out


def _so3(reader: _Reader, key: str, lmax: int, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {
        "weight": reader.take(f"{key}.weight", lmax + 1, outputs, inputs),
        "bias": reader.take(f"{key}.bias", outputs),
    }


def _linear(reader: _Reader, key: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Tensor]:
    out = {"weight": reader.take(f"{key}.weight", outputs, inputs)}
    return {**out, "bias": reader.take(f"{key}.bias", outputs)} if bias else out


def _norm(reader: _Reader, key: str, lmax: int, channels: int) -> dict[str, Tensor]:
    return {
        "affine_weight": reader.take(f"{key}.affine_weight", lmax + 1, channels),
        "affine_bias": reader.take(f"{key}.affine_bias", channels),
    }


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _query_key(reader: _Reader, key: str, config: E2FormerV2Config) -> dict[str, Tensor]:
    degrees, channels = config.lmax + 1, config.sphere_channels
    width = config.num_heads * config.head_dim // 2
    parts: dict[str, list[Tensor]] = {}
    for side in ("query_linear", "key_linear"):
        path = f"{key}.{side}"
        for name, tensor in (
            ("factor0", reader.take(f"{path}.weight", degrees, width, channels)),
            ("factor1", reader.take(f"{path}.weight2", degrees, width, channels)),
            ("bias", reader.take(f"{path}.bias", 1, 1, width)),
            ("hidden_weight", reader.take(f"{path}.final_linear.0.weight", width, degrees * width)),
            ("hidden_bias", reader.take(f"{path}.final_linear.0.bias", width)),
            ("norm_weight", reader.take(f"{path}.final_linear.1.weight", width)),
            ("norm_bias", reader.take(f"{path}.final_linear.1.bias", width)),
            ("out_weight", reader.take(f"{path}.final_linear.3.weight", 2 * width, width)),
            ("out_bias", reader.take(f"{path}.final_linear.3.bias", 2 * width)),
        ):
            parts.setdefault(name, []).append(tensor)
    out = {name: torch.stack(parts[name]) for name in parts if name not in ("factor0", "factor1", "bias")}
    out["weight"] = torch.cat(parts["factor0"] + parts["factor1"], 1)
    out["bias"] = torch.cat([tensor.flatten() for tensor in parts["bias"]])
    return out


def _attention(reader: _Reader, key: str, config: E2FormerV2Config, order: int) -> dict[str, Tensor]:
    from e2former_fairchem.config import ATTENTION_SPECIES_WIDTH as species
    from e2former_fairchem.so3 import make_paths
    from e2former_kernels.equivariant_attention.score import SCORES

    lmax, channels, heads, basis = config.lmax, config.sphere_channels, config.num_heads, config.num_radial_basis
    inputs, hidden = basis + 2 * species, config.hidden_radial_width
    out = {
        f"{side}_embedding.weight": reader.take(f"{key}.{side}_embedding.weight", -1, species)
        for side in ("source", "target")
    }

    def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}

    outputs = SCORES[config.score].outputs * heads
    out |= _prefixed("radial", grouped(_radial(reader, f"{key}.fc_easy", (inputs, hidden, outputs))))
    out |= _prefixed("query_key", _query_key(reader, key, config))
    out |= _prefixed("value", _so3(reader, f"{key}.proj_value", lmax, channels, channels))
    if config.score == "qk_dot":
        width = (lmax + 1) * basis
        out |= _prefixed("dot.project", _so3(reader, f"{key}.dot_linear", lmax, channels, basis))
        out |= _prefixed("dot.radial", grouped(_radial(reader, f"{key}.rad_func_m0", (inputs, hidden, width))))
        out |= _prefixed("dot.out", _linear(reader, f"{key}.fc_m0", width, heads))
    elif config.score == "qk_dot_scalar":
        out |= _prefixed("dot.project", _so3(reader, f"{key}.dot_linear", lmax, channels, heads // (lmax + 1) + 1))
        out |= _prefixed("dot.hidden", _linear(reader, f"{key}.direction_linear.0", heads, heads))
        for part in ("weight", "bias"):
            out[f"dot.norm.{part}"] = reader.take(f"{key}.direction_linear.1.{part}", heads)
        out |= _prefixed("dot.out", _linear(reader, f"{key}.direction_linear.3", heads, heads))
    if order == 0:
        return out | _prefixed("out", _so3(reader, f"{key}.proj_zero", lmax, channels, channels))
    width = heads * (config.value_multiplicity or channels // heads)
    for degree, paths in enumerate(make_paths(lmax).row_paths):
        name = f"{key}.first_order_tp.so2_tp.out_linear.{degree}.weight"
        out[f"paths.weights.{degree}"] = reader.take(name, width, paths * channels)
    return out | _prefixed("out", _so3(reader, f"{key}.proj_first", lmax, width, channels))


def _block(reader: _Reader, key: str, config: E2FormerV2Config, order: int) -> dict[str, Tensor]:
    lmax, channels = config.lmax, config.sphere_channels
    out = _prefixed("norm1", _norm(reader, f"{key}.norm_1", lmax, channels))
    out |= _prefixed("attention", _attention(reader, f"{key}.ga", config, order))
    out |= _prefixed("norm2", _norm(reader, f"{key}.norm_ffn", lmax, channels))
    for ours, theirs in (("linear1", "slinear_1"), ("linear2", "slinear_2")):
        out |= _prefixed(f"feedforward.{ours}", _so3(reader, f"{key}.ffn.{theirs}", lmax, channels, channels))
    gates = _linear(reader, f"{key}.ffn.gate.gates", channels, (lmax + 1) * channels)
    return out | _prefixed("feedforward.gates", gates)


def _trunk(reader: _Reader, config: E2FormerV2Config) -> dict[str, Tensor]:
    lmax, channels, basis = config.lmax, config.sphere_channels, config.num_radial_basis
    trunk = "decoder.decoder"
    out = {
        "charge_spin.charge_embedding.weight": reader.take("decoder.embedding_charge.weight", 30, channels),
        "charge_spin.spin_embedding.weight": reader.take("decoder.embedding_multiplicity.weight", 30, channels),
    }
    out |= _prefixed("charge_spin.mix", _linear(reader, "decoder.mix_cm.0", 2 * channels, channels))
    embed = f"{trunk}.edge_deg_embed_dense"
    for side in ("source", "target"):
        out[f"edge_degree.{side}_embedding.weight"] = reader.take(f"{embed}.{side}_embedding.weight", -1, basis)
    sizes = (3 * basis, config.hidden_radial_width, channels)
    networks = [
        _radial(reader, f"{embed}.gbf_projs.{degree}", sizes, config.edge_layer_norm) for degree in range(lmax + 1)
    ]
    out |= {f"edge_degree.radial.{name}": torch.stack([n[name] for n in networks]) for name in networks[0]}
    for n, order in enumerate(config.message_orders):
        out |= _prefixed(f"blocks.{n}", _block(reader, f"{trunk}.blocks.{n}", config, order))
    final = _norm(reader, f"{trunk}.norm_final", lmax, channels)
    if config.long_range is None:
        return out | _prefixed("norm", final)
    for ours, theirs in (("norm_in", "pre_norm_node"), ("norm_out", "norm_cluster")):
        out |= _prefixed(f"long_range.{ours}", _norm(reader, f"{trunk}.{theirs}", lmax, channels))
    for n in range(config.long_range.layers):
        out |= _prefixed(f"long_range.blocks.{n}", _block(reader, f"{trunk}.long_blocks.{n}", config, 0))
    mix = _so3(reader, f"{trunk}.final_linear", lmax, 2 * channels, channels)
    return out | _prefixed("long_range.mix", mix)


def _painn(reader: _Reader, key: str, channels: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for n, (inputs, outputs) in enumerate(((channels, channels // 2), (channels // 2, 1))):
        path = f"{key}.output_network.{n}"
        out |= _prefixed(f"block{n}.vector_norm", _linear(reader, f"{path}.vec1_proj", inputs, inputs, bias=False))
        out |= _prefixed(f"block{n}.vector_out", _linear(reader, f"{path}.vec2_proj", inputs, outputs, bias=False))
        out |= _prefixed(f"block{n}.update0", _linear(reader, f"{path}.update_net.0", 2 * inputs, inputs))
        out |= _prefixed(f"block{n}.update1", _linear(reader, f"{path}.update_net.2", inputs, 2 * outputs))
    return out


def unused_keys(
    state_dict: Mapping[str, Tensor], *, head: str, datasets: tuple[str, ...], conserving: bool
) -> list[str]:
    """Keys that are known and not needed, sorted.

    Constants, tensors that no forward pass touches, other data sets' heads, and the force head that conserving forces
    do not need.
    """
    spare = [f"head.energy_heads.{name}." for name in datasets if name != head]
    spare += [f"head.force_heads.{name}." for name in datasets if conserving or name != head]
    return sorted(key for key in state_dict if _IGNORED.fullmatch(key) or key.startswith(tuple(spare)))


def translate_state_dict(
    state_dict: Mapping[str, Tensor],
    config: E2FormerV2Config,
    *,
    head: str,
    datasets: tuple[str, ...],
    force_head: str,
    conserving: bool,
) -> dict[str, dict[str, Tensor]]:
    """Rename and regroup the authors' tensors.

    Args:
        state_dict: of a released checkpoint.
        config: of the network.
        head: data set whose heads to use.
        datasets: those that there may be heads for.
        force_head: ``linear`` or ``painn``.
        conserving: there is no force head.

    Returns:
        {"trunk": for E2FormerV2, "energy": for EnergyMLP, "force": for the force module; empty if conserving}.

    Raises:
        StateDictError: names every missing, misshapen and unknown key.
    """
    reader = _Reader(state_dict, config.max_num_elements + 1)
    channels = config.sphere_channels
    result = {"trunk": _trunk(reader, config), "energy": {}, "force": {}}
    for n in (0, 2, 4):
        outputs = 1 if n == 4 else channels
        linear = _linear(reader, f"head.energy_heads.{head}.mlp.{n}", channels, outputs)
        result["energy"] |= _prefixed(str(n), linear)
    force_key = f"head.force_heads.{head}"
    if not conserving:
        if force_head == "painn":
            result["force"] = _painn(reader, force_key, channels)
        else:
            result["force"] = {"weight": reader.take(f"{force_key}.sing_linear.weight", 1, channels)}
    unused = set(unused_keys(state_dict, head=head, datasets=datasets, conserving=conserving))
    unknown = [key for key in reader.source if key not in reader.used and key not in unused]
    problems = [
        f"{title}: {', '.join(sorted(keys))}"
        for title, keys in (
            ("missing keys", reader.missing),
            ("misshapen keys", reader.misshapen),
            ("unknown keys", unknown),
        )
        if keys
    ]
    if problems:
        raise StateDictError("MolFM state dict does not fit the configuration. " + "; ".join(problems))
    return result
