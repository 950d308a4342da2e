"""Rewrites a float32 MoE graph: MoE -> QMoE, MatMul -> MatMulNBits, Gather -> GatherBlockQuantized.

What is quantized is the table NODE_RULES, to how many bits that in contracts/onnx_bits.py, and how is onnx_quantize.
Scales are stored as float16 and widened by a Cast that the runtime folds away at load (half a bit per weight saved, same
kernels); a float16 graph reads them as they are. QMoE on CPU always renormalises the top-k weights of its own softmax, so
every other routing hands it what selects and what weighs the experts (inputs 1 and 14), computed in the graph
(onnx_routing), which is exact. accuracy_level 4 (int8 activations) is what makes decoding fast.

Legend: E experts, N output rows, K input columns.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import onnx_ir as ir
import torch

from moe_edge.contracts.onnx_bits import QUANTIZED_BITS, LayerBits, Provider, WeightClass, bits_of, fitting_block
from moe_edge.exporting.imatrix import Importance
from moe_edge.exporting.onnx_moe import CHOICE, MASS
from moe_edge.exporting.onnx_quantize import Scheme, pack_codes, quantize
from moe_edge.process.progress import track

MICROSOFT = "com.microsoft"
FAST_ACCURACY = 4  # int8 activations in MatMulNBits and QMoE
ROUTER_PROBS, ROUTER_WEIGHTS = 1, 14  # QMoE's inputs that select experts and that weigh them
# QMoE's inputs of the two expert matrices: weight in the MoE node, imatrix key, quantized weight, zero points
EXPERT_INPUTS = ((2, "expert_in", 2, 11), (4, "expert_down", 5, 12))
EXPERT_BIASES = ((3, 4), (5, 7))  # input of MoE, input of QMoE
# Operator -> inputs that are weights; others (biases) stay as they are.
WEIGHT_INPUTS = {"MatMul": (1,), "MoE": (2, 4), "Gather": (0,)}


class NodeRule(NamedTuple):
    """How a graph node is recognised, its class, and the imatrix key of its input columns (None: unweighted)."""

    pattern: str
    weight_class: WeightClass
    imatrix_key: str | None


# The first match wins; node names are those of onnxruntime-genai's builder and of onnx_graph.
NODE_RULES: tuple[NodeRule, ...] = (
    NodeRule(r"/attn/(qkv|q|k|v)_proj/MatMul$", "attention", "attention_in"),
    NodeRule(r"/attn/o_proj/MatMul$", "attention", "attention_o"),
    NodeRule(r"/conv/in_proj/MatMul$", "attention", "attention_in"),
    NodeRule(r"/conv/out_proj/MatMul$", "attention", "conv_out"),
    NodeRule(r"/moe/router/MatMul$", "router", None),
    NodeRule(r"/shared_expert_gate/MatMul$", "router", None),
    NodeRule(r"/mlp/(gate|up)_proj/MatMul$", "shared", "ffn_in"),
    NodeRule(r"/mlp/down_proj/MatMul$", "shared", "shared_down"),
    NodeRule(r"/lm_head/MatMul$", "head", "head_in"),
    NodeRule(r"/moe/MoE$", "expert", "expert_in"),
    NodeRule(r"/embed_tokens/Gather$", "embedding", None),
)


def rule_of(node_name: str) -> NodeRule | None:
    """The rule of a node, or None for a node that carries no weight of ours."""
    return next((rule for rule in NODE_RULES if re.search(rule.pattern, node_name)), None)


def layer_of(node_name: str) -> int | None:
    """The decoder layer in a node's name, or None."""
    match = re.search(r"/layers\.(\d+)/", node_name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class WeightRecipe:
    """How to quantize: precision (or bits per class and layers), weights per scale, scheme, the kernels' accuracy level."""

    precision: str
    block_size: int = 32
    scheme: Scheme = "search"
    accuracy_level: int = FAST_ACCURACY
    layer_bits: LayerBits = field(default_factory=dict)
    provider: Provider = "cpu"


@dataclass
class PackedClasses:
    """What was written, per class of tensors."""

    bytes: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)
    bits: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def add(self, weight_class: str, bits: int, weights: int, stored: list[ir.Value]) -> None:
        """Count the initializers `stored`, which hold `weights` numbers."""
        self.bits[weight_class].add(bits)
        self.weights[weight_class] += weights
        self.bytes[weight_class] += sum(value.const_value.nbytes for value in stored if value.const_value is not None)


class Packer:
    """Rewrites one graph in place."""

    def __init__(self, model: ir.Model, recipe: WeightRecipe, importance: Importance) -> None:
        self.graph, self.recipe, self.importance = model.graph, recipe, importance
        self.report = PackedClasses()
        self.dense = not any(node.op_type == "MoE" for node in self.graph)

    def run(self) -> PackedClasses:
        """Rewrite every node that carries weights; norms and whatever has no rule stay as they are."""
        rewrite: dict[str, Callable[[ir.Node, NodeRule, int], None]] = {
            "MatMul": self._matmul,
            "MoE": self._moe,
            "Gather": self._gather,
        }
        jobs = [(node, rule) for node in self.graph if node.op_type in rewrite and (rule := rule_of(node.name or ""))]
        # The head comes before a tied embedding, which reads the head's tensors.
        jobs.sort(key=lambda job: job[1].weight_class == "embedding")
        for node, rule in track(jobs, "quantizing"):
            bits = self._bits(node, rule)
            if node.op_type == "Gather" and _input(node, 0).producer() is not None:
                self._tied_gather(node)
            elif bits in QUANTIZED_BITS:
                rewrite[node.op_type](node, rule, bits)
            else:
                self._keep_float(node, rule, bits)
        self._drop_unused()
        self.graph.sort()
        return self.report

    def _bits(self, node: ir.Node, rule: NodeRule) -> int:
        layer = layer_of(node.name or "")
        return bits_of(self.recipe.precision, rule.weight_class, layer, self.recipe.layer_bits, self.dense)

    def _matmul(self, node: ir.Node, rule: NodeRule, bits: int) -> None:
        name, weight_KN = _weight(node, 1)
        weight_NK = weight_KN.T
        rows, columns = weight_NK.shape
        block = fitting_block(self.recipe.block_size, columns)
        importance = self.importance.of(rule.imatrix_key, layer_of(node.name or ""))
        blocks = quantize(weight_NK, bits, block, importance, self.recipe.scheme)
        codes = pack_codes(blocks.codes, bits).reshape(rows, columns // block, block * bits // 8)
        stored = self._store(name, codes, blocks.scale, blocks.zero, bits, rule, weight_NK.numel())
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        self._replace(node, "MatMulNBits", [node.inputs[0], *stored], attributes | self._accuracy())

    def _gather(self, node: ir.Node, rule: NodeRule, bits: int) -> None:
        name, table = _weight(node, 0)
        block = fitting_block(self.recipe.block_size, table.shape[1])
        blocks = quantize(table, bits, block, None, self.recipe.scheme)
        codes = pack_codes(blocks.codes, bits)
        data, *stored = self._store(name, codes, blocks.scale, blocks.zero, bits, rule, table.numel())
        self._gather_blocks(node, data, stored, bits, block)

    def _tied_gather(self, node: ir.Node) -> None:
        """An embedding that is the head's matrix: read the head's quantized tensors instead of Transpose(head)."""
        head = next(
            (n for n in self.graph if n.op_type == "MatMulNBits" and (n.name or "").startswith("/lm_head/")), None
        )
        if head is None:
            return
        bits, block, columns = (head.attributes[name].as_int() for name in ("bits", "block_size", "K"))
        shape = ir.tensor([-1, columns * bits // 8], dtype=ir.DataType.INT64)
        reshape = ir.node(
            "Reshape", [head.inputs[1], self._initializer(f"{node.name}/shape", shape)], name=f"{node.name}/Reshape"
        )
        self.graph.insert_before(node, reshape)
        self._gather_blocks(node, reshape.outputs[0], list(head.inputs[2:4]), bits, block)

    def _gather_blocks(self, node: ir.Node, data: ir.Value, scale_zero: list[Any], bits: int, block: int) -> None:
        attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        self._replace(node, "GatherBlockQuantized", [data, node.inputs[1], *scale_zero], attributes)

    def _moe(self, node: ir.Node, rule: NodeRule, bits: int) -> None:
        layer = layer_of(node.name or "")
        block = fitting_block(self.recipe.block_size, *(_row_length(_input(node, at)) for at, *_ in EXPERT_INPUTS))
        inputs: list[ir.Value | None] = [*node.inputs[:2], *[None] * (ROUTER_WEIGHTS - 1)]
        for source, key, weight_at, zero_at in EXPERT_INPUTS:
            name, experts_ENK = _weight(node, source)
            quantized = [
                quantize(expert_NK, bits, block, self.importance.of(key, layer, e), self.recipe.scheme)
                for e, expert_NK in enumerate(experts_ENK)
            ]
            codes, scale, zero = (
                torch.stack([getattr(b, part) for b in quantized]) for part in ("codes", "scale", "zero")
            )
            stored = self._store(name, pack_codes(codes, bits), scale, zero, bits, rule, codes.numel())
            inputs[weight_at], inputs[weight_at + 1], inputs[zero_at] = stored
        for source, target in EXPERT_BIASES:
            inputs[target] = node.inputs[source] if source < len(node.inputs) else None
        attributes = {name: value.value for name, value in node.attributes.items()}
        if CHOICE in node.meta:
            inputs[ROUTER_PROBS], inputs[ROUTER_WEIGHTS], renormalise = node.meta[CHOICE]
            attributes["normalize_routing_weights"] = int(renormalise)
            self._drop_mass(node)
        attributes |= {"expert_weight_bits": bits, "block_size": block}
        attributes |= {"weights_prepacked": 0} if self.recipe.provider == "cuda" else {}
        self._replace(node, "QMoE", inputs, attributes | self._accuracy())

    def _drop_mass(self, node: ir.Node) -> None:
        """Remove the product with the weights' sum, by which QMoE does not divide."""
        for use in node.outputs[0].uses():
            if (use.node.name or "").endswith(f"/{MASS}"):
                use.node.outputs[0].replace_all_uses_with(node.outputs[0])
                self.graph.remove(use.node, safe=True)

    def _keep_float(self, node: ir.Node, rule: NodeRule, bits: int) -> None:
        """Leave the weights in float32, or store them as float16 and widen them at load."""
        for at in WEIGHT_INPUTS[node.op_type]:
            value = stored = _input(node, at)
            if not value.is_initializer():
                continue  # a tied embedding reads the head's matrix, which is already counted
            if bits == 16 and value.dtype == ir.DataType.FLOAT:
                name, weight = _weight(node, at)
                stored, half = self._scales(f"{name}_half", weight.half())
                value.replace_all_uses_with(half)
            assert value.const_value is not None and stored.dtype is not None
            stored_bits = min(bits, int(8 * stored.dtype.itemsize))
            self.report.add(rule.weight_class, stored_bits, value.const_value.size, [stored])

    def _accuracy(self) -> dict[str, int]:
        """Only CPU kernels have levels."""
        return {"accuracy_level": self.recipe.accuracy_level} if self.recipe.provider == "cpu" else {}

    def _store(
        self, name: str, codes: Any, scale: torch.Tensor, zero: torch.Tensor, bits: int, rule: NodeRule, weights: int
    ) -> list[ir.Value]:
        """Register packed codes, scales and zero points; returns the values that a node reads."""
        scales, widened = self._scales(f"{name}_scale", scale)
        data = self._initializer(f"{name}_Q{bits}", codes)
        zeros = self._initializer(f"{name}_zp", pack_codes(zero, bits))
        self.report.add(rule.weight_class, bits, weights, [data, scales, zeros])
        return [data, widened, zeros]

    def _initializer(self, name: str, array: Any) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        assert isinstance(tensor.shape, ir.Shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _scales(self, name: str, half: torch.Tensor) -> tuple[ir.Value, ir.Value]:
        """A float16 initializer, and the value that operators read: itself in a float16 graph, or a Cast to float32."""
        stored = self._initializer(name, half.numpy())
        if self.recipe.provider == "cuda":
            return stored, stored
        cast = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)}, name=f"/widen/{name}")
        self.graph.append(cast)
        out = cast.outputs[0]
        out.name, out.dtype, out.shape = f"{name}_float", ir.DataType.FLOAT, stored.shape
        return stored, out

    def _replace(self, node: ir.Node, op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        """Put a com.microsoft node in `node`'s place, with its output's name and consumers."""
        old = node.outputs[0]
        new = ir.node(op_type, inputs, attributes=attributes, domain=MICROSOFT, name=f"{node.name}_{op_type}")
        out = new.outputs[0]
        out.name, out.type, out.shape = old.name, old.type, old.shape
        self.graph.insert_before(node, new)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _drop_unused(self) -> None:
        """Remove what nobody reads: a tied embedding's Transpose, the way to logits that QMoE does without."""
        for node in reversed(self.graph):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name in [n for n, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]


def _input(node: ir.Node, at: int) -> ir.Value:
    """An input that every node of its kind has."""
    value = node.inputs[at]
    assert value is not None
    return value


def _weight(node: ir.Node, at: int) -> tuple[str, torch.Tensor]:
    """The name and the float32 numbers of an initializer that a node reads."""
    value = _input(node, at)
    assert value.name is not None and value.const_value is not None
    return value.name, torch.from_numpy(value.const_value.numpy()).float()


def _row_length(value: ir.Value) -> int:
    """Columns of a matrix, known without reading it."""
    assert value.shape is not None
    length = value.shape[-1]
    assert isinstance(length, int)
    return length
