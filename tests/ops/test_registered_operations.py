"""The operations registered with torch.library pass opcheck: schema, autograd, fakes, tracing by torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from e2former_kernels.common.backend import Mode, triton_installed
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.radial.reference import RadialWeights

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not triton_installed(), reason="runs in Triton's interpreter, without a GPU"
)
# public operation in conftest.py -> registered name
PUBLIC = {
    "norm": "equivariant_rms_norm",
    "query_key": "query_key",
    "feedforward": "gated_feedforward",
    "so3_linear": "so3_linear",
    "grouped_linear": "grouped_linear",
    "edge_degree": "edge_degree_sums",
    "attention": "equivariant_attention",
    "attention_dot": "equivariant_attention",
    "attention_dot_scalar": "equivariant_attention",
}
DERIVATIVES = ("", "_gradient", "_second")


def test_none_is_forgotten() -> None:
    import e2former_kernels.edge_degree
    import e2former_kernels.equivariant_attention
    import e2former_kernels.feedforward
    import e2former_kernels.layer_norm
    import e2former_kernels.query_key  # noqa: F401

    registered = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "e2former_" in n}
    assert registered == {n + suffix for n in PUBLIC.values() for suffix in DERIVATIVES}


class Record(TorchDispatchMode):
    """The last arguments of every registered operation of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "e2former_kernels":
            self.calls[func._opname] = args
        return func(*args, **(kwargs or {}))


def fresh(t: Tensor) -> Tensor:
    """A copy that needs gradients where it can have them."""
    return t.detach().clone().requires_grad_(t.is_floating_point())


def differentiated(operation, first: list[str], cotangents: list[Tensor]) -> list[Tensor]:
    """Value, gradients by the inputs named in ``first``, and those of a loss on all of them by every input.

    cotangents: one for the value and one for each gradient; made when the list is empty.
    """
    # no leaves: only of others does autograd say whether a pass asks for them
    inputs = {n: t.view_as(t) for n, t in operation.inputs().items()}
    value = operation.run(operation.tensors | inputs)
    if not cotangents:
        cotangents += [torch.randn_like(t).requires_grad_() for t in (value, *(inputs[n] for n in first))]
    gradients = torch.autograd.grad(value, [inputs[n] for n in first], cotangents[0], create_graph=True)
    loss = value.square().sum() + sum((g * c).sum() for g, c in zip(gradients, cotangents[1:], strict=True))
    wrt = [cotangents[0], *operation.inputs().values()]
    return [value, *gradients, *torch.autograd.grad(loss, wrt, materialize_grads=True)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and not a.isnan().any()
        assert (a - b).abs().max() <= 1e-11 * b.abs().max().clamp(min=1e-3), f"result {n}"


@pytest.mark.parametrize("name", PUBLIC)
def test_derivatives(operation, name: str) -> None:
    """Registered operations give the numbers of the autograd functions: by what moves, as for forces, and by all."""
    case, compiled = operation(name), operation(name, compiled=True)
    compiled.tensors = case.tensors
    for first in (list(case.moving), list(case.inputs())):
        cotangents: list[Tensor] = []
        assert_close(*[differentiated(c, first, cotangents) for c in (compiled, case)])


@pytest.mark.parametrize("name", [n for n in PUBLIC if "dot" not in n])
def test_opcheck_of_public_operation(operation, name: str) -> None:
    """Value, gradient and second derivative, as training on forces calls them."""
    case = operation(name, size=3, compiled=True, **({} if "linear" in name else {"lmax": 1}))
    with Record() as record:
        differentiated(case, list(case.moving), [])
    for suffix in DERIVATIVES:
        op = getattr(torch.ops.e2former_kernels, PUBLIC[name] + suffix).default
        arguments = record.calls[op._opname]
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, tree_map_only(Tensor, fresh, arguments), test_utils=tests)
        # the third derivative is not to be traced
        given = tree_map_only(Tensor, torch.detach if suffix == "_second" else fresh, arguments)
        torch.library.opcheck(op, given, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "attention_dot"])
def test_compiled_whole(operation, name: str) -> None:
    """torch.compile finds no reason to break the graph, nor to make another one for other sizes."""
    run = operation(name, compiled=True).run

    def function(tensors: dict[str, Tensor]) -> Tensor:
        return run({n: t * 1 if t.is_floating_point() else t for n, t in tensors.items()}).sin()

    try:
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in (7, 5):
                case = operation(name, size=size)
                results = compiled(case.tensors), function(case.tensors)
                leaves, cotangent = list(case.inputs().values()), torch.randn_like(results[0])
                assert_close(*([r, *torch.autograd.grad(r, leaves, cotangent)] for r in results))
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("option", ["bell", "chunks", "sum", "splines", "splines_of_embedding"])
def test_compiled_options(make, option: str) -> None:
    """Every argument beside the tensors arrives where the operation runs."""
    from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding
    from e2former_kernels.equivariant_attention import equivariant_attention
    from e2former_kernels.radial.splines import build_splines

    kinds = {"order": 0, "envelope": Envelope(3.0, 3, (0.3, 2.5)), "norm": "softplus", "inverse_distance": "v2"}
    kinds = {"bell": kinds}
    arguments, options = list(make.attention(edges=9, **kinds.get(option, {}))), {}
    inputs, function = arguments[1:4] + [arguments[5]], equivariant_attention
    if option == "chunks":
        arguments = make.in_chunks(arguments, 4)
    elif option == "sum":
        arguments = make.in_chunks(arguments, 4)
        arguments[3] = inputs[2] = make(arguments[6].species.numel(), 5, 6)
        options = {"form": "sum"}
    elif option == "splines":
        arguments[7] = RadialWeights(*(t.detach() for t in arguments[7]))
        options = {"splines": build_splines(arguments[7], 3.0, range(4), tolerance=1e-3)}
    elif option == "splines_of_embedding":
        radial = RadialWeights(*(t.detach() for t in make.radial(3, 6, 5, 9)))
        arguments, inputs = [EmbeddingSpec(2, 9, Envelope(3.0)), *arguments[5:7], radial], inputs[-1:]
        function = edge_degree_embedding
        options = {"splines": build_splines(radial, 3.0, range(4), last=False, tolerance=1e-3)}
    expected = function(*arguments, **options)
    try:
        options["mode"] = Mode(compiled=True)
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments, **options)
    finally:
        torch._dynamo.reset()
    cotangent = torch.randn_like(expected)
    assert_close(*([r, *torch.autograd.grad(r, inputs, cotangent)] for r in (found, expected)))


@pytest.mark.filterwarnings("ignore:Error detected")
def test_third_derivative(operation) -> None:
    """Beyond the second derivative comes recomputation; a graph refuses it instead of leaving terms out."""
    case = operation("norm", size=2, channels=2, lmax=1, compiled=True)
    x = case.tensors["x"]

    def function(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(case.run(case.tensors | {"x": x * 1}).square().sum(), x, create_graph=True)
        return first

    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)
    with Record() as record:
        differentiated(case, ["x"], [])
    second = torch.ops.e2former_kernels.equivariant_rms_norm_second.default
    arguments = tree_map_only(Tensor, fresh, record.calls[second._opname])
    with pytest.raises(Exception, match="no third"):
        torch.library.opcheck(second, arguments, test_utils="test_aot_dispatch_dynamic")
