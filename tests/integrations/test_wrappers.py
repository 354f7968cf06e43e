"""Models inside of wrappers, and models of which something is elsewhere: scored as the model itself, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

from swift_kernels import SwiftHead, attach, score_texts
from swift_kernels.features import UnsupportedModelError
from tests.architectures import fresh_model
from tests.integrations.helpers import check_parity, generate


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def fully_sharded(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fully_sharded_in_place(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "LoRA": lora,
    "torch.compile of LoRA": lambda model: torch.compile(lora(model), backend="eager"),
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "FSDP": fully_sharded,
    "FSDP2": fully_sharded_in_place,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapper_is_the_model_that_it_wraps(wrap: Callable[[Any], Any], prompts: dict, tmp_path: Path) -> None:
    model = fresh_model()
    wrapped = wrap(model)
    head = SwiftHead.for_model(wrapped)
    assert head.config.base_model is not None
    assert head.config.base_model["architecture"] == "LlamaForCausalLM"
    head.save_pretrained(str(tmp_path))
    with attach(wrapped, SwiftHead.from_pretrained(str(tmp_path), model=wrapped)) as scorer:
        tokens = generate(wrapped if hasattr(wrapped, "generate") else wrapped.module, prompts)
    scores = scorer.scores()
    check_parity(model, head, prompts)  # of the model inside
    assert torch.equal(tokens, generate(model, prompts))
    with attach(model, head) as scorer:
        generate(model, prompts)
        assert torch.equal(scorer.scores(), scores)
    texts = [[[6, 7]], [[8, 9, 10]]]
    assert torch.equal(score_texts(wrapped, None, head, *texts), score_texts(model, None, head, *texts))


@pytest.mark.filterwarnings("error:the head was trained on")
def test_a_head_fits_the_model_with_a_wrapper_and_without() -> None:
    model = fresh_model()
    compiled = torch.compile(model, backend="eager")
    for one, other in ((model, compiled), (compiled, model)):
        attach(one, SwiftHead.for_model(other))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_soft_prompts_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    head = SwiftHead.for_model(fresh_model())
    prompted = peft.get_peft_model(fresh_model(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for use in (
        lambda: attach(prompted, head),
        lambda: SwiftHead.for_model(prompted),
        lambda: score_texts(prompted, None, head, [[6]], [[7, 8]]),
    ):
        with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM has soft prompts"):
            use()


def test_offloaded_weights_are_refused_by_name() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = fresh_model()
    head = SwiftHead.for_model(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for use in (
        lambda: attach(model, head),
        lambda: SwiftHead.for_model(model),
        lambda: score_texts(model, None, head, [[6]], [[7, 8]]),
    ):
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has offloaded weights"):
            use()


def test_a_model_whose_forwards_accelerate_has_wrapped_is_scored(prompts: dict) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = fresh_model()
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    check_parity(model, SwiftHead.for_model(model), prompts)
    check_parity(model, SwiftHead.for_model(model), prompts, fuse="norm")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resized_vocabulary_is_read_or_refused(prompts: dict) -> None:
    model = fresh_model()
    states, logits = SwiftHead.for_model(model), SwiftHead.for_model(model, "logits")
    rows = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 16)
    check_parity(model, states, prompts)
    with pytest.raises(ValueError, match=f"the head reads {rows} logits, LlamaForCausalLM has {rows + 16}"):
        attach(model, logits)
    check_parity(model, SwiftHead.for_model(model, "logits"), prompts)


class EightBitEmbedding(torch.nn.Module):
    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        scale = embedding.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (embedding.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[token_ids].float() * self.scale[token_ids]


@pytest.mark.filterwarnings("error:the head was trained on")
def test_quantised_embeddings_are_read(prompts: dict) -> None:
    model = fresh_model()
    head = SwiftHead.for_model(model)
    model.model.embed_tokens = EightBitEmbedding(model.model.embed_tokens)
    check_parity(model, head, prompts)
    check_parity(model, SwiftHead.for_model(model), prompts)


@pytest.mark.parametrize("layers", ["all", [1, 3], "logits"], ids=str)
def test_a_model_whose_decoder_is_the_output_projection(layers: Any, prompts: dict) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 1}
    model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(vocab_size=128, **sizes, **tokens)).eval()
    assert model.get_decoder() is model.get_output_embeddings()
    check_parity(model, SwiftHead.for_model(model, layers), prompts)
