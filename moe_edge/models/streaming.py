"""A model that needs less memory than its weights: one part at a time, straight from its safetensors files.

`StreamedModel` is built without memory for its weights. `loaded(part)` fills in one decoder layer, the embedding or the
head and gives the memory back afterwards; `embed`, `step` and `finish` run the forward in pieces. Each of them calls
the body's own forward with every layer but one skipped, so that masks, rotary embeddings and all else that a layer is
given are the model's own, whatever its family.

`recomputed` saves memory in another way: a whole model keeps only the inputs of its layers, which run again in the
backward pass. transformers does so only while a model trains, and a model in training mode may drop out or jitter; a
teacher whose routers alone have gradients wants the memory without that.

Shape suffixes: B rows, S tokens of a row, D model width, T tokens, K top-k, n tokens of an expert.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_edge.contracts.checkpoint import CheckpointHeaders
from moe_edge.contracts.errors import InputRejected
from moe_edge.families import student_family
from moe_edge.models.dense import DENSE_TYPES
from moe_edge.models.loading import load_config, stored_dtype
from moe_edge.models.taps import body, decoder_layers
from moe_edge.models.views import MoELayerView, down_project, expert_activations, moe_layers
from moe_edge.models.weight_sources import WeightTarget, read_weights, targets_of
from moe_edge.storage.checkpoint import inspect_checkpoint
from moe_edge.storage.files import Closing
from moe_edge.storage.tensor_files import PieceReader

log = logging.getLogger(__name__)
Part = int | Literal["embedding", "head", "rest"]  # a number: that decoder layer; rest: norms and the like


def meta_model(headers: CheckpointHeaders, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The causal language model of a checked folder, in eval mode, with shapes only: no weight is read or allocated.

    Raises:
        InputRejected: unsupported, or its tensors do not fit its config.json.
    """
    student_family(headers.config).tensors(headers.config, headers.tensors)
    stored_dtype(headers)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            load_config(headers), dtype=dtype
        )
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    return model


class StreamedModel(Closing):
    """A model whose parts are in memory only while they are needed; a context manager that closes its files.

    Args:
        path: a checkpoint folder.
        dtype: of the loaded weights and of the computation.
        compact: hold stacked experts in the dtype that they are stored in, where that is smaller, and convert one at a
            time; the results are the same up to the order of a sum.

    Raises:
        ConfigError, InputRejected: as `loading.load_model`.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        compact: bool = False,
    ) -> None:
        headers = inspect_checkpoint(Path(path), require_tokenizer=False)
        self.model, self.dtype, self.device = meta_model(headers, dtype), dtype, torch.device(device)
        self.layers = decoder_layers(self.model)
        self._reader = PieceReader(headers)
        self._empty = self._as_loaded(stored_dtype(headers) if compact else dtype)
        self._names = _names_by_part(self.model, self.layers)
        self._targets = self._targets_by_part(headers)
        if compact:
            for view in _moe_layers(self.model):
                view.experts.forward = partial(experts_one_by_one, view)
        self._load("rest")

    @property
    def width(self) -> int:
        """D, the columns of the residual stream."""
        embedding: Tensor = self.model.get_input_embeddings().weight  # type: ignore[assignment]
        return embedding.shape[1]

    @contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """The part's weights are in memory while the context is open."""
        self._load(part)
        try:
            yield
        finally:
            self._free(part)

    def part_bytes(self, part: Part) -> int:
        """Memory of a part's weights in the dtype of the computation."""
        return sum(self._empty[name].numel() * self._empty[name].itemsize for name in self._names[part])

    def embed(self, ids_BS: Tensor) -> Tensor:
        """What the first layer reads; needs the part "embedding". [B, S, D]"""
        taken: list[Tensor] = []
        with ExitStack() as undo:
            self._skip_layers(None, undo)
            undo.callback(self.layers[0].register_forward_pre_hook(_take_input(taken), with_kwargs=True).remove)
            self._run_body(ids_BS)
        return taken[0]

    def step(self, layer: int, ids_BS: Tensor, hidden_BSD: Tensor) -> Tensor:
        """The residual stream behind a loaded layer, from that before it. [B, S, D]"""
        taken: list[Tensor] = []
        with ExitStack() as undo:
            self._skip_layers(layer, undo)
            self._enter_at(layer, hidden_BSD, undo)
            undo.callback(self.layers[layer].register_forward_hook(_take_output(taken)).remove)
            self._run_body(ids_BS)
        return taken[0]

    def finish(self, ids_BS: Tensor, hidden_BSD: Tensor) -> Tensor:
        """The head's input, from the residual stream behind the last layer. [B, S, D]"""
        with ExitStack() as undo:
            self._skip_layers(None, undo)
            self._enter_at(len(self.layers) - 1, hidden_BSD, undo)
            return self._run_body(ids_BS)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._reader.close()

    def _run_body(self, ids_BS: Tensor) -> Tensor:
        hidden_BSD: Tensor = body(self.model)(input_ids=ids_BS.to(self.device), use_cache=False).last_hidden_state
        return hidden_BSD

    def _skip_layers(self, but: int | None, undo: ExitStack) -> None:
        for number, layer in enumerate(self.layers):
            if number != but:
                undo.enter_context(replaced_forward(layer, _same_hidden))

    def _enter_at(self, layer: int, hidden_BSD: Tensor, undo: ExitStack) -> None:
        """Let `layer` read `hidden_BSD`; what the body itself embeds is of the right shape and never used."""
        embedding = self.model.get_input_embeddings()
        unused_BSD = torch.zeros(hidden_BSD.shape, dtype=self.dtype, device=self.device)
        undo.enter_context(replaced_forward(embedding, lambda ids_BS: unused_BSD))
        given = hidden_BSD.to(self.device, self.dtype)
        hook = self.layers[layer].register_forward_pre_hook(
            lambda module, inputs, keywords: ((given, *inputs[1:]), keywords), with_kwargs=True, prepend=True
        )
        undo.callback(hook.remove)

    def _as_loaded(self, of_experts: torch.dtype) -> dict[str, Tensor]:
        """Empty tensors of the parameters' shapes and final dtypes; some stay in float32 whatever the model's dtype."""
        float32 = [re.compile(key.replace("*", ".*")) for key in self.model._get_dtype_plan(self.dtype)]
        stacks = {
            id(tensor) for view in _moe_layers(self.model) for tensor in view.experts.parameters() if tensor.ndim == 3
        }
        smaller = of_experts if of_experts.itemsize < self.dtype.itemsize else self.dtype
        empty = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            wide = any(pattern.search(name) for pattern in float32)
            dtype = torch.float32 if wide else smaller if id(tensor) in stacks else tensor.dtype
            empty[name] = torch.empty_like(tensor, dtype=dtype)
        return empty

    def _targets_by_part(self, headers: CheckpointHeaders) -> dict[Part, list[WeightTarget]]:
        part_of = {name: part for part, names in self._names.items() for name in names}
        found: dict[Part, list[WeightTarget]] = defaultdict(list)
        for target in targets_of(self.model, headers.tensors, self._empty):
            found[part_of[target.name]].append(target)
        if self.model.config.get_text_config().tie_word_embeddings:
            weight = next(name for name in self._names["head"] if name.endswith("weight"))
            others = [target for target in found["head"] if target.name != weight]
            found["head"] = [replace(found["embedding"][0], name=weight), *others]
        return found

    @torch.no_grad()
    def _load(self, part: Part) -> None:
        for target in self._targets[part]:
            for name, values in read_weights(target, self._empty[target.name], self.device, self._reader, self.model):
                self._put(name, values)
        for module in self._modules(part):
            self._compute_buffers(module)
        if hollow := [name for name in self._names[part] if self._get(name).is_meta]:
            why = f"{len(hollow)} of the model's parameters have no tensor, first: {hollow[0]}"
            raise InputRejected("the checkpoint lacks tensors", where=str(self._reader.headers.folder), why=why)

    def _free(self, part: Part) -> None:
        for name in self._names[part]:
            self._put(name, self._empty[name])

    def _get(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        value: Tensor = getattr(self.model.get_submodule(module), leaf)
        return value

    def _put(self, name: str, values: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = values
        else:
            module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        getattr(module, leaf)._is_hf_initialized = True  # or transformers would draw it anew

    def _modules(self, part: Part) -> list[nn.Module]:
        if isinstance(part, int):
            return list(self.layers[part].modules())
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        return [module for module in self.model.modules() if id(module) not in inside] if part == "rest" else []

    def _compute_buffers(self, module: nn.Module) -> None:
        """Buffers that no checkpoint holds, rotary frequencies for example, are computed by the model's own code."""
        found = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        hollow = {name: buffer for name, buffer in found.items() if buffer is not None and buffer.is_meta}
        for name, buffer in hollow.items():
            module._buffers[name] = torch.empty_like(buffer, device=self.device)
        if hollow:
            self.model._init_weights(module)  # type: ignore[no-untyped-call]


def _moe_layers(model: PreTrainedModel) -> list[MoELayerView]:
    """The MoE layers; a dense student has none."""
    return [] if model.config.model_type in DENSE_TYPES else moe_layers(model)


def _names_by_part(model: PreTrainedModel, layers: list[nn.Module]) -> dict[Part, list[str]]:
    """The names of all parameters and stored buffers, by part."""
    parts: dict[int, Part] = {id(layer): number for number, layer in enumerate(layers)}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    parts |= {id(model.get_input_embeddings()): "embedding", id(head): "head"}
    prefixes = {name + ".": parts[id(module)] for name, module in model.named_modules() if id(module) in parts}
    names: dict[Part, list[str]] = defaultdict(list)
    for name in model.state_dict():
        part: Part = next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "rest")
        names[part].append(name)
    return names


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a module computes something else."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@torch.no_grad()
def experts_one_by_one(view: MoELayerView, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' result as transformers computes it, one expert after the other, from weights in any dtype."""
    result_TD = torch.zeros(hidden_TD.shape, device=hidden_TD.device)
    for expert in range(view.count):
        token_n, slot_n = (index_TK == expert).nonzero(as_tuple=True)
        out_nD = down_project(view, expert_activations(view, hidden_TD[token_n], expert), expert)
        result_TD.index_add_(0, token_n, out_nD.float() * weight_TK[token_n, slot_n].float().unsqueeze(-1))
    return result_TD.to(hidden_TD.dtype)


def _same_hidden(hidden_states: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
    """A skipped layer."""
    return hidden_states


def _take_input(taken: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        taken.append(inputs[0] if inputs else keywords["hidden_states"])

    return hook


def _take_output(taken: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    return hook


@contextmanager
def recomputed(model: nn.Module) -> Iterator[nn.Module]:
    """While open, every decoder layer keeps its input only, and runs again when gradients pass through it.

    The backward pass, too, must come before it closes, and before anything else closes that changes how layers run.
    """
    with ExitStack() as undo:
        for layer in decoder_layers(model):
            undo.enter_context(replaced_forward(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
        yield model
