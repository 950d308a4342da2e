"""A target: one device class as data (targets/*.yaml), every hardware constant with its source and confidence.

Units live in the keys. A budget is what the plan must meet; a gate is what the measured artifact must meet.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_edge.contracts.units import ByteSize, Seconds, Share

System = Literal["linux", "android"]
_CLOSED = ConfigDict(extra="forbid", frozen=True)


class Fact(BaseModel):
    """A hardware constant with where it comes from; the unit is in its key."""

    model_config = _CLOSED
    value: float | str | list[str] | None = Field(description="the constant, in the unit of its key; null = unknown")
    source: str = Field(description="where it comes from")
    confidence: Literal["measured", "datasheet", "calculated", "reported", "assumed"] = Field(
        description="how far to trust it"
    )


class Hardware(BaseModel):
    """What the device has. A null value means: probe the device."""

    model_config = _CLOSED
    memory_bytes: Fact = Field(description="physical memory, bytes")
    usable_share: Fact = Field(description="share of the memory that an application may use, 0..1")
    bandwidth_gb_per_s: Fact = Field(description="memory bandwidth, 1e9 bytes per second")
    bandwidth_efficiency: Fact = Field(description="share of the bandwidth that decoding reaches, 0..1")
    cores: Fact = Field(description="number of cores that the runtime should use")
    isa: Fact = Field(description="instruction-set features that matter to the kernels")
    accelerator: Fact = Field(description="none, or the accelerator's name")


class Quantization(BaseModel):
    """What the target runs best; `bits: auto` chooses among the GGUF types in this order."""

    model_config = _CLOSED
    gguf: list[str] = Field(description="recipes, the preferred main one first; all are delivered if they fit")
    onnx: Literal["fp32", "fp16", "int8", "int4"] = Field("int4", description="precision of the ONNX weights")


class RuntimeOptions(BaseModel):
    model_config = _CLOSED
    threads: int | None = Field(None, description="threads of the runtimes; null = the device's cores")
    gpu_layers: int = Field(0, description="layers on the accelerator in llama.cpp; -1 = all")
    kv_cache: Literal["auto", "f16", "q8_0"] = Field(
        "auto", description="precision of the KV cache (GGUF); auto = f16, and q8_0 where only that fits the memory"
    )


class Budget(BaseModel):
    """What the plan must meet; all that are given hold together."""

    model_config = _CLOSED
    weights: ByteSize | None = Field(None, description="bytes of the delivered main file, e.g. 4GiB")
    bytes: Share | None = Field(
        None, description="share of the teacher's bytes at 16 bits per weight that the main file may have, e.g. 20%"
    )
    peak_memory: ByteSize | None = Field(None, description="bytes of weights, KV cache and buffers together")
    experts: Share | None = Field(None, description="share of the routed-expert parameters kept, e.g. 62.5%")
    ttft: Seconds | None = Field(None, description="time to first token, seconds")
    decode_tokens_per_s: float | None = Field(None, description="least decode speed, tokens per second")


class Gates(BaseModel):
    """Limits for what is measured on the artifact; null means not gated."""

    model_config = _CLOSED
    kl_to_student_nats: float | None = Field(
        None, description="mean KL(HF student || artifact), nats per token, at most"
    )
    kl_to_teacher_nats: float | None = Field(None, description="mean KL(teacher || artifact), nats per token, at most")
    top1_agreement_to_teacher: float | None = Field(None, description="share of tokens with the same argmax, at least")
    perplexity_ratio: float | None = Field(None, description="artifact perplexity / teacher perplexity, at most")
    bytes_ratio: float | None = Field(None, description="artifact bytes / teacher bytes, at most")
    decode_tokens_per_s: float | None = Field(None, description="median decode tokens per second, at least")
    host_speed: bool = Field(False, description="may the host's speed be gated (only where the host is the target)")


class Target(BaseModel):
    """One device class."""

    model_config = _CLOSED
    schema_: Literal["moe-edge/target@1"] = Field(
        "moe-edge/target@1", alias="schema", description="version of this format"
    )
    name: str = Field(description="the file's name")
    description: str = Field(description="one line for people")
    hardware: Hardware = Field(description="constants of the device, each with source and confidence")
    formats: list[Literal["gguf", "onnx"]] = Field(description="what is delivered")
    quantization: Quantization = Field(description="what the target runs best")
    context_length: int = Field(2048, gt=0, description="tokens the KV cache is planned for")
    context_least: int | None = Field(
        None, gt=0, description="tokens; the plan may halve context_length down to this when nothing else fits"
    )
    runtime: RuntimeOptions = Field(RuntimeOptions(), description="how the runtimes are started")
    system: System = Field(
        "linux", description="of the device; a bundle for android brings a shell script that needs no Python"
    )
    device: str = Field("local", description="default device: local | ssh://user@host[:port] | adb:SERIAL")
    budget: Budget = Field(Budget(), description="what the plan must meet; all that are given hold together")
    gates: Gates = Field(Gates(), description="limits for what is measured on the finished artifact")
