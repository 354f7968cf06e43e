"""Which models a head takes for the one it was trained on: copies pass, fine-tunes warn, others are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swift_kernels import SwiftHead, checkpoint
from swift_kernels.checkpoint import ModelMismatchError
from swift_kernels.fingerprint import compare_model, fingerprint
from tests.architectures import fresh_model, randomised, tiny_model


@pytest.fixture(scope="module")
def original(smollm2: tuple[Any, Any]) -> Any:
    """SmolLM2 as before it was quantised: what lies on a grid already, no further rounding to it would change."""
    model = copy.deepcopy(smollm2[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def recorded(original: Any) -> dict[str, Any]:
    return fingerprint(original)


@pytest.fixture
def model(original: Any) -> Any:
    return copy.deepcopy(original)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def quantise(model: Any, bits: int, block: int | None) -> Any:
    """Rounds matrices to so many bits: all of them by blocks as GGUF does, or the layers' by rows as LLM.int8 does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and (block or ".layers." in name):
                values = parameter.view(-1, block) if block else parameter
                scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
                values.copy_((values / scale).round() * scale)
    return model


def trained(model: Any, which: Callable[[str], bool], steps: int = 3) -> Any:
    """Trained on a few tokens; of the parameters only those whose names `which` takes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which(name))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(20, 32)[None]
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model


def with_adapter(model: Any, targets: list[str], merged: bool) -> Any:
    """A LoRA adapter as after some training: its weights are changed by a hundredth."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=2e-3)
    return adapted.merge_and_unload() if merged else adapted


COPIES = {
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "float16, then bfloat16": lambda model: model.half().bfloat16(),
    "8-bit blocks": lambda model: quantise(model, 8, 32),
    "8-bit rows": lambda model: quantise(model, 8, None),
    "8-bit blocks in bfloat16": lambda model: quantise(model, 8, 32).bfloat16(),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_copies_pass(recorded: dict[str, Any], model: Any, make: Callable[[Any], Any]) -> None:
    assert compare_model(recorded, make(model)) == ("", True)


@pytest.mark.filterwarnings("ignore:.*quantization.*:DeprecationWarning", "ignore:.*quantize.*:UserWarning")
def test_a_copy_whose_matrices_are_packed_passes(recorded: dict[str, Any], model: Any) -> None:
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert "Parameter" not in str(type(packed.model.layers[0].self_attn.q_proj.weight))
    assert compare_model(recorded, packed) == ("", True)


def test_a_copy_saved_in_shards_passes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert compare_model(fingerprint(model), type(model).from_pretrained(tmp_path)) == ("", True)


@pytest.mark.usefixtures("process_group")
def test_a_sharded_copy_passes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = fresh_model(), init_device_mesh("cpu", (1,))
    sharded = fresh_model()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert compare_model(fingerprint(model), sharded) == ("", True)


FINE_TUNES = {
    "layers trained, embeddings frozen": lambda model: trained(model, lambda name: ".layers." in name),
    "one matrix of one layer trained": lambda model: trained(model, lambda name: "layers.17.mlp.up_proj" in name),
    "norms trained": lambda model: trained(model, lambda name: name.endswith("layernorm.weight"), steps=12),
    "embeddings trained": lambda model: trained(model, lambda name: "embed" in name, steps=40),
    "LoRA merged": lambda model: with_adapter(model, ["q_proj", "v_proj"], merged=True),
    "LoRA of one matrix merged": lambda model: with_adapter(model, ["o_proj"], merged=True),
    "LoRA beside": lambda model: with_adapter(model, ["q_proj", "v_proj"], merged=False),
    "LoRA merged, in bfloat16": lambda model: with_adapter(model, ["q_proj", "v_proj"], merged=True).bfloat16(),
    "4-bit blocks": lambda model: quantise(model, 4, 32),
}


@pytest.mark.parametrize("make", FINE_TUNES.values(), ids=FINE_TUNES.keys())
def test_fine_tunes_differ_and_are_the_same_model(
    recorded: dict[str, Any], model: Any, make: Callable[[Any], Any]
) -> None:
    difference, same = compare_model(recorded, make(model))
    assert "fine-tune" in difference
    assert same


def test_noise_in_every_layer_warns() -> None:
    head, other = SwiftHead.for_model(tiny_model("llama")), copy.deepcopy(tiny_model("llama"))
    for layer in other.model.layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match=r"the weights of its layer 0 are .* as a fine-tune's would be.*may be off"):
        checkpoint.check_model(head, other)


def test_a_changed_embedding_warns() -> None:
    model = randomised(tiny_model("llama").config)
    head = SwiftHead.for_model(model)
    model.get_input_embeddings().weight.data *= 1.05
    with pytest.warns(UserWarning, match="as a fine-tune's would be"):
        checkpoint.check_model(head, model)


def test_a_head_of_an_adapted_model_knows_it_from_the_bare_one() -> None:
    pytest.importorskip("peft")
    model = fresh_model()
    adapted = with_adapter(fresh_model(), ["q_proj"], merged=False)
    own = fingerprint(adapted)
    assert compare_model(own, adapted) == ("", True)
    difference, same = compare_model(own, model)
    assert "lacks the adapter" in difference
    assert same


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_another_model_is_refused_with_both_named(name: str) -> None:
    head = SwiftHead.for_model(tiny_model("llama"))
    other = tiny_model(name)
    with pytest.raises(ModelMismatchError, match=rf"LlamaForCausalLM.*{type(other).__name__}"):
        checkpoint.check_model(head, other)
    with pytest.warns(UserWarning, match="scores may be off"):
        checkpoint.check_model(head, other, allow_mismatch=True)


def test_a_fingerprint_without_layers_compares_what_it_has(recorded: dict[str, Any], model: Any) -> None:
    """As earlier versions recorded them."""
    old = {key: value for key, value in recorded.items() if key != "layers"}
    assert compare_model(old, trained(model, lambda name: ".layers." in name)) == ("", True)


def test_many_experts_are_sampled() -> None:
    layers = fingerprint(tiny_model("mixtral"))["layers"]
    assert all(sum(map(len, layer.values())) <= 24 for layer in layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.check_model(SwiftHead.for_model(tiny_model("mixtral")), tiny_model("mixtral"))


def keep_routers(model: Any) -> Any:
    """As GGUF files of 8 bits do."""
    routers = [layer.mlp.gate.weight.detach().clone() for layer in model.model.layers]
    quantise(model, 8, 32)
    with torch.no_grad():
        for layer, router in zip(model.model.layers, routers, strict=True):
            layer.mlp.gate.weight.copy_(router)
    return model


def keep_first_layer(model: Any) -> Any:
    first = copy.deepcopy(model.model.layers[0])
    quantise(model, 8, 32)
    model.model.layers[0] = first
    return model


def test_an_8_bit_copy_may_keep_the_routers_of_experts() -> None:
    assert compare_model(fingerprint(tiny_model("mixtral")), keep_routers(copy.deepcopy(tiny_model("mixtral")))) == (
        "",
        True,
    )


def test_an_8_bit_copy_may_keep_a_layer(recorded: dict[str, Any], model: Any) -> None:
    assert compare_model(recorded, keep_first_layer(model)) == ("", True)


def test_another_output_projection_warns() -> None:
    """What a head of logits reads; here it is not the embedding."""
    model = tiny_model("llama")
    other = copy.deepcopy(model)
    assert other.lm_head.weight is not other.model.embed_tokens.weight
    torch.nn.init.normal_(other.lm_head.weight)
    difference, same = compare_model(fingerprint(model), other)
    assert "output projection" in difference
    assert same


def test_the_bias_of_the_last_norm_counts() -> None:
    model = tiny_model("gpt2")
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.transformer.ln_f.bias)
    assert "ln_f.bias" in compare_model(fingerprint(model), other)[0]


@pytest.mark.parametrize("key", ["embedding_values", "final_norm_values"])
def test_values_that_are_no_numbers_are_no_likeness(key: str) -> None:
    model = tiny_model("llama")
    recorded = fingerprint(model)
    assert not compare_model({**recorded, key: [float("nan")] * len(recorded[key])}, model)[1]


@pytest.mark.parametrize(
    "damage",
    [
        {"embedding_row": -5000},
        {"embedding_row": True},
        {"embedding_values": [10**400]},
        {"final_norm_values": [True]},
        {"projection_values": "x"},
        {"layers": [{}]},
        {"layers": [{"matrices": {"a": [10**400]}, "vectors": {}, "adapters": {}}]},
    ],
    ids=str,
)
def test_a_damaged_fingerprint_is_named(damage: dict[str, Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="the fingerprint of the base model is damaged"):
        compare_model({**fingerprint(model), **damage}, model)
