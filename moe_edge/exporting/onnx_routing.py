"""The router in the ONNX graph: from a token's hidden state to what the MoE operator and its quantized twin read.

The float operator MoE only knows the softmax of the K largest logits. Whatever else weighs a family's experts (sigmoids, a
bias that selects, groups, weights that are not renormalised) is computed in the graph: the float operator gets logits whose
softmax over the chosen experts gives their weights, and where those do not sum to one, its output is multiplied by their
sum. QMoE takes what selects and what weighs as two inputs (router_probs and router_weights); onnx_pack puts them there.

Legend: B batch, S sequence, E experts, K top-k, G groups. Shapes are [B, S, E] until the operator wants [tokens, E].
"""

from typing import Any, NamedTuple

import onnx_ir as ir

from moe_edge.contracts.spec import ModelSpec
from moe_edge.models.views import MoELayerView

NOT_CHOSEN = -10000.0  # a logit whose share in a softmax is exactly 0; float16 holds it
SMALLEST_GATE = {
    ir.DataType.FLOAT: 1e-30,
    ir.DataType.FLOAT16: 1e-7,
}  # before a logarithm; far above NOT_CHOSEN after it


class Choice(NamedTuple):
    """What QMoE reads instead of logits, both of shape (tokens, E)."""

    selects: str  # the K largest are chosen
    weighs: str
    renormalise: bool


class RoutingValues(NamedTuple):
    """Names of the values that a layer's operators read."""

    logits: str  # (tokens, E), for MoE
    normalise: bool  # may MoE divide the K weights by their sum
    choice: Choice | None  # None: QMoE's own softmax, renormalised, is the model's
    mass: str | None  # (B, S, 1): the sum that MoE divided by, where the model does not


class RoutingGraph:
    """Mixin over a builder class: the router of one layer."""

    spec: ModelSpec

    def make_routing(self: Any, layer_id: int, view: MoELayerView, root_input: str) -> RoutingValues:
        """Append the router's nodes."""
        moe, base = self.spec.moe, f"/model/layers.{layer_id}/moe/router"
        name = self.make_matmul(view.router, f"{base}/MatMul", root_input)
        if moe.router_bias:
            self.make_add_bias(view.router.get_parameter("bias").detach(), f"{base}/Add", root_input=f"{name}/output_0")
            name = f"{base}/Add"
        logits, every = f"{name}/output_0", self.make_hidden_state_shape(last_dim=view.count)
        native = moe.gating != "sigmoid" and view.groups[0] == 1 and view.selection_bias is None
        if native and moe.renormalise:
            return RoutingValues(self._by_token(f"{base}/Reshape", logits, view.count), True, None, None)
        gates = self._gates(base, logits, every)
        if native:
            flat, weighs = (
                self._by_token(f"{base}/{n}", v, view.count) for n, v in (("Reshape", logits), ("W", gates))
            )
            return RoutingValues(flat, False, Choice(flat, weighs, False), None)
        selects = self._selecting(base, view, gates, every)
        flat = [self._by_token(f"{base}/{n}", v, view.count) for n, v in (("Selects", selects), ("Weighs", gates))]
        masked, mass = self._chosen(base, view, logits, gates, selects)
        return RoutingValues(
            self._by_token(f"{base}/Reshape", masked, view.count), True, Choice(flat[0], flat[1], moe.renormalise), mass
        )

    def _by_token(self: Any, name: str, value: str, count: int) -> str:
        shape = f"/model/constants/INT64/{[-1, count]}"
        self.make_reshape(name, [value, shape], self.io_dtype, ["tokens", count])
        return f"{name}/output_0"

    def _gates(self: Any, base: str, logits: str, every: list[Any]) -> str:
        """Softmax, or sigmoids in a form that keeps small ones exact: the operator Sigmoid is off by up to 6e-8."""
        dtype = self.io_dtype
        if self.spec.moe.gating != "sigmoid":
            self.make_softmax(f"{base}/Softmax", logits, dtype, every)
            return f"{base}/Softmax/output_0"
        one = f"/model/constants/{self.to_str_dtype(dtype)}/1.0"
        self.make_neg(f"{base}/Neg", logits, dtype, every)
        self.make_exp(f"{base}/Exp", f"{base}/Neg/output_0", dtype, every)
        self.make_add(f"{base}/Add_1", [f"{base}/Exp/output_0", one], dtype, every)
        self.make_reciprocal(f"{base}/Sigmoid", f"{base}/Add_1/output_0", dtype, every)
        return f"{base}/Sigmoid/output_0"

    def _selecting(self: Any, base: str, view: MoELayerView, gates: str, every: list[Any]) -> str:
        """Gates plus the bias that selects, pushed out of reach in groups that are not searched."""
        if view.selection_bias is not None:
            bias = f"{base[1:].replace('/', '.')}.selection_bias"
            self.make_initializer(view.selection_bias.tensor.detach().reshape(-1), bias, to=self.io_dtype)
            self.make_add(f"{base}/Biased", [gates, bias], self.io_dtype, every)
            gates = f"{base}/Biased/output_0"
        groups, searched = view.groups
        return gates if groups == searched else self._in_best_groups(f"{base}/groups", view, gates, every)

    def _in_best_groups(self: Any, base: str, view: MoELayerView, gates: str, every: list[Any]) -> str:
        groups, searched = view.groups
        dtype, best = self.io_dtype, self.spec.moe.fewest_per_group
        four, scored = [*every[:2], groups, view.count // groups], [*every[:2], groups]
        self.make_reshape(f"{base}/Split", [gates, f"/model/constants/INT64/{[0, 0, *four[2:]]}"], dtype, four)
        split = f"{base}/Split/output_0"
        count = f"/model/constants/INT64/{[best]}"
        self.make_topk(f"{base}/Best", [split, count], dtype, [*four[:3], best])
        last = "/model/constants/INT64/[-1]"
        self.make_reduce_sum(f"{base}/Score", [f"{base}/Best/output_0", last], dtype, scored)
        count = f"/model/constants/INT64/{[searched]}"
        self.make_topk(f"{base}/TopK", [f"{base}/Score/output_0", count], dtype, [*every[:2], searched])
        zeros = self._scattered(base, f"{base}/Score/output_0", f"{base}/TopK/output_1", None, scored, searched)
        self.make_unsqueeze(f"{base}/Unsqueeze", [zeros, last], dtype, [*scored, 1])
        self.make_add(f"{base}/Masked", [split, f"{base}/Unsqueeze/output_0"], dtype, four)
        joined = f"/model/constants/INT64/{[0, 0, view.count]}"
        self.make_reshape(f"{base}/Join", [f"{base}/Masked/output_0", joined], dtype, every)
        return f"{base}/Join/output_0"

    def _chosen(
        self: Any, base: str, view: MoELayerView, logits: str, gates: str, selects: str
    ) -> tuple[str, str | None]:
        """Logits of the K chosen experts and NOT_CHOSEN for the others; the sum of the gates, where the model keeps it."""
        moe, dtype = self.spec.moe, self.io_dtype
        every, chosen = (self.make_hidden_state_shape(last_dim=n) for n in (view.count, view.top_k))
        self.make_topk(f"{base}/TopK", [selects, f"/model/constants/INT64/{[view.top_k]}"], dtype, chosen)
        index = f"{base}/TopK/output_1"
        picked = self._picked(f"{base}/Gates", gates, index, chosen)
        if moe.gating == "sigmoid":
            smallest = f"/model/constants/{self.to_str_dtype(dtype)}/{SMALLEST_GATE[dtype]}"
            self.make_clip(f"{base}/Clip", [picked, smallest, ""], dtype, chosen)
            self.make_log(f"{base}/Log", f"{base}/Clip/output_0", dtype, chosen)
            values = f"{base}/Log/output_0"
        else:
            values = self._picked(f"{base}/Logits", logits, index, chosen)
        masked = self._scattered(base, logits, index, values, every, view.top_k)
        if moe.renormalise:
            return masked, None
        one_wide = self.make_hidden_state_shape(last_dim=1)
        self.make_reduce_sum(f"{base}/Mass", [picked, "/model/constants/INT64/[-1]"], dtype, one_wide, keepdims=True)
        return masked, f"{base}/Mass/output_0"

    def _picked(self: Any, name: str, values: str, index: str, shape: list[Any]) -> str:
        self.make_gather_elements(name, [values, index], self.io_dtype, shape, axis=2)
        return f"{name}/output_0"

    def _scattered(
        self: Any, base: str, like: str, index: str, values: str | None, shape: list[Any], count: int
    ) -> str:
        """NOT_CHOSEN everywhere but at the indices, where `values` stand (None: zeros)."""
        dtype = self.io_dtype
        self.make_shape(f"{base}/Shape", like, [3])
        self._filled(f"{base}/Nothing", f"{base}/Shape/output_0", NOT_CHOSEN, shape)
        if values is None:
            self.make_shape(f"{base}/IndexShape", index, [3])
            values = self._filled(f"{base}/Zeros", f"{base}/IndexShape/output_0", 0.0, [*shape[:2], count])
        inputs = [f"{base}/Nothing/output_0", index, values]
        self.make_scatter_elements(f"{base}/ScatterElements", inputs, dtype, shape, axis=2)
        return f"{base}/ScatterElements/output_0"

    def _filled(self: Any, name: str, shape_of: str, number: float, shape: list[Any]) -> str:
        value = ir.tensor([number], dtype=self.io_dtype)
        self.make_constant_of_shape(name, shape_of, value, self.io_dtype, shape)
        return f"{name}/output_0"
