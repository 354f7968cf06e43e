from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from swift_kernels import SwiftHead, checkpoint
from swift_kernels.checkpoint import CheckpointError, ModelMismatchError
from tests.architectures import tiny_model


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture(
    params=[
        {"layers": "all"},
        {"layers": [-1, 1], "gate": False},
        {"layers": "logits", "span": "all", "dtype": "bfloat16", "task": "sums"},
        {"layers": "top_logprobs", "top_logprobs": 5},
    ],
    ids=["all", "subset-mean", "logits-bf16", "top-logprobs"],
)
def head(request, model):
    return SwiftHead.for_model(model, **request.param)


def test_round_trip(head, model, tmp_path):
    head.save_pretrained(tmp_path / "head")
    loaded = SwiftHead.from_pretrained(tmp_path / "head", model=model)
    assert loaded.config == head.config
    assert torch.equal(loaded.weight, head.weight)
    assert torch.equal(loaded.bias, head.bias)
    assert loaded.weight.dtype == head.weight.dtype
    assert loaded.config.top_logprobs == head.config.top_logprobs
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["config.json", "model.safetensors"]


def test_config_says_how_layers_are_numbered(head, tmp_path):
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layers_convention"].startswith("Hugging Face hidden_states: 0 is the input")
    assert config["widths"] == list(head.config.widths)


@pytest.fixture
def saved(model, tmp_path):
    SwiftHead.for_model(model).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, **changes):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda folder: (folder / "config.json").write_text('{"format_version": 1, "wid'), "is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "format version 1"),
        (lambda folder: edit_config(folder, format_version=2), "format version 1"),
        (lambda folder: edit_config(folder, gate=None), r"lacks keys \['gate'\]"),
        (lambda folder: edit_config(folder, color=1), r"unknown keys \['color'\]"),
        (lambda folder: edit_config(folder, layers_convention="vLLM"), "numbers layers otherwise"),
        (lambda folder: edit_config(folder, widths=[32, 32]), "4 layers but 2 widths"),
        (lambda folder: edit_config(folder, gate=False), r"weight is torch\.float32 of shape \[2, 128\]"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:99]),
            "is it truncated",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-8]
            ),
            "is it truncated",
        ),
        (lambda folder: edit_weights(folder, bias=None), r"lacks keys \['bias'\]"),
        (lambda folder: edit_weights(folder, scale=torch.ones(1)), r"extra keys \['scale'\]"),
        (lambda folder: edit_weights(folder, bias=torch.tensor([0.0, torch.nan])), r"bias\[1\] is nan"),
        (lambda folder: edit_weights(folder, weight=torch.full((2, 128), torch.inf)), r"weight\[0, 0\] is inf"),
    ],
    ids=[
        "no-config", "no-weights", "torn-config", "binary-config", "list-config", "version", "missing-key",
        "unknown-key", "convention", "widths", "gate", "truncated-header", "truncated-data", "missing-tensor",
        "extra-tensor", "nan", "inf",
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_refused_by_name(saved, damage, message):
    damage(saved)
    with pytest.raises((CheckpointError, ValueError), match=message) as error:
        SwiftHead.from_pretrained(saved)
    assert str(saved) in str(error.value)


def test_neither_folder_nor_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="is neither a folder"):
        SwiftHead.from_pretrained(str(tmp_path / "nowhere"))


def test_a_diverged_head_is_not_saved(model, tmp_path):
    head = SwiftHead.for_model(model)
    head.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    head.weight.data[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[1, 3\] is nan.*diverge"):
        head.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "mean"])
@pytest.mark.parametrize("layers", ["all", [1, 3], "logits"], ids=["all", "subset", "logits"])
def test_upstream_round_trip(model, gate, layers, tmp_path):
    head = SwiftHead.for_model(model, layers, gate=gate)
    checkpoint.save_upstream(head, tmp_path / "reward_model_ce.pt")
    raw = torch.load(tmp_path / "reward_model_ce.pt", weights_only=True)
    name = "fused_layer" if gate else "reward_layer"
    assert {key: tuple(value.shape) for key, value in raw.items()} == {
        f"{name}.weight": tuple(head.weight.shape),
        f"{name}.bias": tuple(head.bias.shape),
    }
    loaded = SwiftHead.from_upstream(tmp_path / "reward_model_ce.pt", model=model, layers=layers)
    assert torch.equal(loaded.weight, head.weight)
    assert loaded.config.layers == head.config.layers


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: torch.save({"fused_layer.weight": Payload()}, path), "holds more than tensors"),
        (lambda path: path.write_bytes(b"PK\x03\x04 torn"), "is it truncated"),
        (lambda path: path.write_bytes(b""), "is it truncated"),
        (lambda path: torch.save({"linear.weight": torch.ones(2, 128)}, path), "has keys"),
        (lambda path: torch.save([torch.ones(2)], path), "holds a list"),
        (
            lambda path: torch.save({"fused_layer.weight": torch.ones(2, 64), "fused_layer.bias": torch.ones(2)}, path),
            r"has shape \[2, 64\]: expected \[2, 128\]",
        ),
        (
            lambda path: torch.save(
                {"fused_layer.weight": torch.full((2, 128), torch.nan), "fused_layer.bias": torch.ones(2)}, path
            ),
            "is nan",
        ),
    ],
    ids=["pickle", "torn", "empty", "keys", "list", "shape", "nan"],
)
def test_upstream_files_that_cannot_be_used(model, make, message, tmp_path, capsys):
    path = tmp_path / "reward.pt"
    make(path)
    with pytest.raises((CheckpointError, ValueError), match=message) as error:
        SwiftHead.from_upstream(path, model=model)
    assert str(path) in str(error.value)
    assert "must not run" not in capsys.readouterr().out


def test_heads_of_normalised_layers_are_refused(model, tmp_path):
    path = tmp_path / "reward_model_ce_norm_llama.pt"
    checkpoint.save_upstream(SwiftHead.for_model(model), path)
    with pytest.raises(CheckpointError, match="--apply_norm"):
        SwiftHead.from_upstream(path, model=model)
    SwiftHead.from_upstream(path, model=model, apply_norm=False)
    with pytest.raises(CheckpointError, match="from_upstream"):
        SwiftHead.from_pretrained(path)


def test_weights_and_config_of_two_saves_are_told_apart(saved, model, tmp_path):
    """As a kill between the two files leaves them, or who copies one of them."""
    config = (saved / "config.json").read_bytes()
    SwiftHead.for_model(model, [0, 1]).save_pretrained(tmp_path / "other")
    SwiftHead.for_model(model, [2, 3]).save_pretrained(tmp_path / "other")
    SwiftHead.for_model(model, [0, 1]).save_pretrained(tmp_path / "third")
    (tmp_path / "third" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"other weights than config\.json was written with"):
        SwiftHead.from_pretrained(tmp_path / "third")
    (saved / "config.json").write_bytes(config)
    SwiftHead.from_pretrained(saved, model=model)


def test_a_head_of_an_earlier_version_has_no_checksum_and_loads(saved, model):
    config = json.loads((saved / "config.json").read_text())
    del config["weights_sha256"], config["base_model"]["layers"]
    (saved / "config.json").write_text(json.dumps(config))
    SwiftHead.from_pretrained(saved, model=model)


@pytest.mark.parametrize(
    "kept", [["config.json"], ["model.safetensors"], ["config.json", "model.safetensors"]], ids=" ".join
)
def test_no_head_is_saved_over_another_model(model, tmp_path, kept):
    model.save_pretrained(tmp_path)
    for path in list(tmp_path.iterdir()):
        if path.name not in kept:
            path.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"{kept[0]} is no head's and would be lost: expected another folder"):
        SwiftHead.for_model(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_head_is_saved_beside_the_shards_of_a_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-.*expected another folder"):
        SwiftHead.for_model(model).save_pretrained(tmp_path)


def test_a_first_save_that_was_interrupted_is_done_again(saved, model):
    (saved / "config.json").unlink()
    SwiftHead.for_model(model, [1]).save_pretrained(saved)
    assert SwiftHead.from_pretrained(saved).config.layers == (1,)


def test_lists_of_numbers_take_a_line_and_texts_stay(model, tmp_path):
    task = 'one [ 1, 2 ] and "[\n 3\n]"'
    head = SwiftHead.for_model(model, task=task)
    head.save_pretrained(tmp_path)
    assert SwiftHead.from_pretrained(tmp_path).config == head.config
    assert '"layers": [0, 1, 2, 3],' in (tmp_path / "config.json").read_text()


SAVING = """
import resource, signal, sys, time, torch
from swift_kernels import SwiftHead
head = SwiftHead([4096] * 33)
print("ready", flush=True)
{before}
head.save_pretrained(sys.argv[1])
"""


def run_saving(before, folder, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVING).format(before=before), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_a_full_disk_leaves_the_old_checkpoint(saved):
    """A limit on file size is what a full disk looks like to the writer."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    result = run_saving(limit, saved)
    assert result.returncode != 0
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_interrupt_while_writing_leaves_the_old_checkpoint(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    interrupt = (
        "import os, pathlib; original = pathlib.Path.write_bytes\n"
        # Started in the background, this process would have inherited that interrupts are ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "pathlib.Path.write_bytes = lambda *a: (original(*a), os.kill(os.getpid(), signal.SIGINT), time.sleep(60))"
    )
    result = run_saving(interrupt, saved)
    assert result.returncode in (1, -signal.SIGINT, 130)
    assert "KeyboardInterrupt" in result.stderr
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_symbolic_link_is_followed_and_a_pipe_is_left_alone(tmp_path):
    import os

    from swift_kernels.files import write_text

    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is no regular file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    "recorded",
    [{}, "x", {"name": 3}, {"embedding_values": [None]}, {"embedding_row": "1"}],
    ids=["empty", "text", "partial", "values", "row"],
)
def test_a_damaged_fingerprint_is_named(saved, model, recorded):
    if isinstance(recorded, dict) and recorded:
        recorded = {**json.loads((saved / "config.json").read_text())["base_model"], **recorded}
    edit_config(saved, base_model=recorded)
    with pytest.raises(CheckpointError, match="fingerprint of the base model is damaged"):
        SwiftHead.from_pretrained(saved, model=model)


def test_a_fingerprint_of_nans_is_another_model(saved, model):
    config = json.loads((saved / "config.json").read_text())["base_model"]
    edit_config(saved, base_model={**config, "embedding_values": [float("nan")] * 32})
    with pytest.raises(ModelMismatchError):
        SwiftHead.from_pretrained(saved, model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [10**12] * 4}, "the config calls for"),
        ({"gate": "yes"}, "gate is 'yes'"),
        ({"metrics": []}, "metrics is"),
        ({"task": 5}, "task 5"),
    ],
    ids=["huge", "gate", "metrics", "task"],
)
def test_configs_of_wrong_values_are_named(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        SwiftHead.from_pretrained(saved)


def test_heads_of_another_dtype_than_their_config_are_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match=r"the weights are torch\.float16, the config says float32"):
        SwiftHead.for_model(model).half().save_pretrained(tmp_path)


def test_a_head_that_diverged_is_not_attached(model):
    from swift_kernels import attach, score_texts

    head = SwiftHead.for_model(model)
    head.weight.data[0, 3] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[0, 3\] is nan"):
        attach(model, head)
    with pytest.raises(ValueError, match=r"weight\[0, 3\] is nan"):
        score_texts(model, None, head, [[7]], [[8]])
