"""Hand-written and compiled loops, and what scoring keeps alive: twelve bytes a sequence, and no earlier step."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers

from swift_kernels import SwiftHead, attach
from swift_kernels.integrations.generation import NotScoredError, Run
from tests.architectures import fresh_model
from tests.integrations.helpers import generate
from tests.recorded import Recording, decode_both_ways, recorded


def decode_loop(model, inputs, steps, before_step=lambda step: None):
    """Greedy decoding by hand: the prefill, then one position at a time."""
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        tokens = [output.logits[:, -1].argmax(-1)]
        mask = inputs["attention_mask"]
        for step in range(steps):
            before_step(step)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            output = model(
                input_ids=tokens[-1][:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            tokens.append(output.logits[:, -1].argmax(-1))
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_begin_scores_a_hand_written_loop(model, head, prompts, fuse):
    inputs = {**prompts, "position_ids": (prompts["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    slots = torch.tensor([2, 0, 1])
    with attach(model, head, fuse=fuse) as scorer:
        generate(model, prompts, do_sample=False, max_new_tokens=9, eos_token_id=None)
        expected, counts = scorer.scores(), scorer.token_counts()
        scorer.begin(slots)
        decode_loop(model, inputs, 8)
        torch.testing.assert_close(scorer.scores()[slots], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(scorer.token_counts(), counts)

        scorer.begin(slots, num_slots=5)

        def finish_row_1(step):
            if step == 3:
                slots[1] = -1

        decode_loop(model, inputs, 8, finish_row_1)
        assert scorer.token_counts().tolist() == [3, 8, 8, 0, 0]
        assert scorer.scores()[3:].isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_begin_scores_a_loop_step_compiled_as_one_graph(model, head, backend):
    """`fullgraph=True` raises on any graph break; attached first, the compiled step scores as the eager one does."""
    slots = torch.tensor([1, 0, 2])
    tokens = torch.randint(6, 96, (6, 3, 1), generator=torch.Generator().manual_seed(0))

    def step(token_ids):
        return model(input_ids=token_ids, use_cache=False).logits

    results = []
    with torch.no_grad(), attach(model, head) as scorer:
        for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
            scorer.begin(slots)
            slots.copy_(torch.tensor([1, 0, 2]))
            logits = [run(token_ids) for token_ids in tokens[:3]]
            slots[1] = -1
            logits += [run(token_ids) for token_ids in tokens[3:]]
            results.append((scorer.scores(), scorer.token_counts(), torch.stack(logits)))
    assert results[0][1].tolist() == results[1][1].tolist() == [3, 6, 6]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_compiled_once_and_copies_no_buffers(model, head):
    """Buffers that torch.compile takes for static are neither copied before a replay of its CUDA graphs, nor keep it
    from recording one, as mutated inputs otherwise do."""
    graphs = []

    def backend(graph, _example_inputs):
        graphs.append(graph)
        return graph.forward

    tokens = torch.full((3, 1), 9)
    slots = torch.tensor([0, 1, 2])
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(slots)
        step = torch.compile(lambda: model(input_ids=tokens, use_cache=False).logits, fullgraph=True, backend=backend)
        for route in ([0, 1, 2], [2, -1, 0], [-1, -1, -1]):
            slots.copy_(torch.tensor(route))
            tokens += 1
            step()
        scorer.begin(slots)
        step()
        assert scorer.token_counts().tolist() == [0, 0, 0]
    assert len(graphs) == 1
    [node] = [node for node in graphs[0].graph.nodes if "score_step" in str(node.target)]
    buffers = [argument for argument in node.args[3:] if argument is not None]
    assert len(buffers) == 5
    for buffer in buffers:
        assert buffer.op == "placeholder", buffer
        assert buffer.meta["tensor_dict"].get("_dynamo_static_input_type"), buffer


@pytest.mark.parametrize(
    ("fuse", "layers"),
    [("gather", "all"), ("norm", "all"), ("gather", "top_logprobs")],
    ids=["gather", "norm", "top-logprobs"],
)
def test_a_recorded_step_scores_without_its_python(model, fuse, layers, monkeypatch):
    """A CUDA graph runs no hook: that it scores is known from the recording, which stays with its slots."""
    # It reads the slots, which is only done on the CPU.
    monkeypatch.setattr("swift_kernels.integrations.top_logprobs.check_slots", lambda *_: None)
    with torch.no_grad(), attach(model, SwiftHead.for_model(model, layers), fuse=fuse) as scorer:
        recording, eager = decode_both_ways(scorer, recorded, model, "cpu")
        assert eager[1].sum() > 0
        assert torch.equal(recording[1], eager[1])
        torch.testing.assert_close(recording[0], eager[0], rtol=1e-5, atol=1e-6)
        for arguments in ((torch.arange(3),), (torch.arange(3), 5)):
            scorer.begin(*arguments)
            with pytest.raises(NotScoredError, match="no forward of one position was scored"):
                scorer.scores()


def test_what_was_recorded_goes_on_after_generate_and_what_did_not_run_is_told(model, head, prompts):
    slots, others = torch.arange(3), torch.arange(3)
    token = torch.full((3, 1), 9)
    mask = torch.ones(3, 1, 1, 1, dtype=torch.bool)
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(slots)
        replay = recorded(lambda: model(input_ids=token, attention_mask=mask, use_cache=False))
        expected = scorer.scores()
        for meanwhile in (lambda: generate(model, prompts), lambda: scorer.begin(others)):
            meanwhile()
            scorer.begin(slots)
            with pytest.raises(NotScoredError, match="no forward of one position was scored"):
                scorer.scores()
            replay()
            assert torch.equal(scorer.scores(), expected)


def test_a_recorded_step_whose_rows_have_all_ended_gives_no_scores(model, head):
    slots = torch.tensor([0, 1])
    token = torch.full((2, 1), 9)
    mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    with torch.no_grad(), attach(model, head) as scorer:
        scorer.begin(slots)
        replay = recorded(lambda: model(input_ids=token, attention_mask=mask, use_cache=False))
        slots.fill_(-1)
        scorer.begin(slots)
        replay()
        assert scorer.scores().isnan().all()
        assert scorer.token_counts().tolist() == [0, 0]


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_attach_compile_detach_and_attach_again(head, fuse):
    model = fresh_model()
    tokens = torch.randint(6, 96, (4, 3, 1), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="eager")
    results = []
    with torch.no_grad():
        stock = [model(input_ids=ids, use_cache=False).logits for ids in tokens]
        for _ in range(2):
            with attach(model, head, fuse=fuse) as scorer:
                scorer.begin(torch.arange(3))
                for ids, expected in zip(tokens, stock, strict=True):
                    torch.testing.assert_close(compiled(ids), expected)
                results.append(scorer.scores())
            # Detached, the step goes on as the stock model: whatever it still writes belongs to nobody.
            for ids, expected in zip(tokens, stock, strict=True):
                torch.testing.assert_close(compiled(ids), expected)
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("first", [True, False], ids=["inference-mode-first", "inference-mode-last"])
def test_inference_mode_and_no_grad_may_alternate(model, head, prompts, first):
    results = []
    with attach(model, head) as scorer:
        for inference in (first, not first):
            with torch.inference_mode(inference):
                generate(model, prompts)
            results.append(scorer.scores())
    assert torch.equal(*results)


@pytest.mark.parametrize(("fuse", "op"), [("gather", "score_step"), ("norm", "rms_norm_score")], ids=["gather", "norm"])
def test_a_step_never_waits_for_the_device(model, head, fuse, op):
    """Also what capture into a CUDA graph requires."""
    slots = torch.tensor([2, -1, 1])
    with attach(model, head, fuse=fuse) as scorer, torch.no_grad():
        scorer.begin(slots)
        mask = torch.ones(3, 1, 1, 1, dtype=torch.bool)  # a model without a mask looks at its positions to make one
        with Recording() as mode:
            model(input_ids=torch.full((3, 1), 9), attention_mask=mask, use_cache=False)
        assert op in mode.ops
        assert scorer.token_counts().tolist() == [0, 1, 1]


def test_the_bookkeeping_of_a_sampled_token_does_not_wait(prompts):
    run = Run(3, torch.device("cpu"))
    slots = torch.full((3,), -1)
    with Recording():
        run.advance(torch.tensor([False, True, False]), torch.tensor([False, True, False]), slots, feed_last=False)
    assert slots.tolist() == [0, -1, 2]
    run.advance(torch.tensor([True, True, True]), torch.tensor([False, True, False]), slots, feed_last=False)
    assert slots.tolist() == [-1, -1, -1]
    assert run.lengths.tolist() == [2, 1, 2]
    assert run.ended.tolist() == [False, True, False]


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_a_forward_that_is_broken_off_does_not_spoil_the_next(fuse):
    model = fresh_model()
    token = torch.full((3, 1), 9)
    with torch.no_grad(), attach(model, SwiftHead.for_model(model), fuse=fuse) as scorer:
        scorer.begin(torch.arange(3))
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=token, use_cache=False)
        handle.remove()
        model(input_ids=token, use_cache=False)
    assert scorer.token_counts().tolist() == [1, 1, 1]


def test_begin_rejects_other_slots(model, head):
    with attach(model, head) as scorer, pytest.raises(ValueError, match="expected int64"):
        scorer.begin(torch.zeros(3, dtype=torch.int32))
    with attach(model, head, trace=True) as scorer, pytest.raises(ValueError, match="trace=True follows"):
        scorer.begin(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("slots", [[0, 0, 1], [0, 1, 3]], ids=["repeated", "out-of-range"])
def test_wrong_slots_are_an_error_on_the_cpu(model, head, prompts, slots):
    with attach(model, head) as scorer:
        scorer.begin(torch.tensor(slots))
        with pytest.raises((ValueError, RuntimeError), match="slots"):
            decode_loop(model, prompts, 1)


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_scoring_holds_the_same_bytes_after_any_number_of_tokens(head, fuse):
    model = fresh_model()
    held = {}
    with attach(model, head, fuse=fuse) as scorer:
        for steps in (32, 4096):
            scorer.begin(torch.arange(3))
            with torch.no_grad():
                for _ in range(steps):
                    model(input_ids=torch.full((3, 1), 9), use_cache=False)
            assert scorer.token_counts().tolist() == [steps] * 3
            held[steps] = (scorer.nbytes, scorer.scratch_nbytes, live_tensor_bytes(model))
    assert held[32] == held[4096]
    assert held[32][0] == 12 * 3


def live_tensor_bytes(model):
    """Bytes of every tensor alive that is no weight of the model."""
    gc.collect()
    weights = {parameter.data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.data_ptr() not in weights:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_no_tensor_of_an_earlier_step_stays_alive(model, head, prompts, fuse):
    alive: list[weakref.ref] = []
    inputs_of_first_layer: list[weakref.ref] = []

    def note(_module, args):
        inputs_of_first_layer.append(weakref.ref(args[0]))

    class Check(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            alive.extend(ref for ref in inputs_of_first_layer if ref() is not None)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with attach(model, head, fuse=fuse):
        handle = model.model.layers[0].register_forward_pre_hook(note)
        try:
            criteria = transformers.StoppingCriteriaList([Check()])
            generate(model, prompts, stopping_criteria=criteria, eos_token_id=None)
        finally:
            handle.remove()
    assert len(inputs_of_first_layer) == 16
    assert not alive
