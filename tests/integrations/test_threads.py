"""One model in several threads or tasks: each scores what it runs itself, and notices nothing of the others.

The threads meet in the model's layers, so that their forwards interleave in every run and not by luck.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from swift_kernels import SwiftHead, attach, score_texts
from swift_kernels.features import model_layout
from swift_kernels.integrations.transformers import NotScoredError
from swift_kernels.norms import find_norms
from swift_kernels.patching import patch
from tests.architectures import VOCAB_SIZE, fresh_model

PATIENCE = 60.0
"""Seconds: only a test that fails waits so long."""


@contextmanager
def meeting(model: Any, threads: int = 2) -> Iterator[None]:
    """Forwards of so many threads wait for each other where a layer begins, and where the model's last one ends."""
    barrier = threading.Barrier(threads, timeout=PATIENCE)
    layers = model.model.layers

    def wait(*_: Any) -> None:
        barrier.wait()

    handles = [layer.register_forward_pre_hook(wait) for layer in layers]
    handles.append(layers[-1].register_forward_hook(wait))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What they return; each runs in a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def answer(model: Any, rows: int, seed: int, tokens: int = 5, **options: Any) -> torch.Tensor:
    prompt = torch.randint(6, VOCAB_SIZE, (rows, 4), generator=torch.Generator().manual_seed(seed))
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, **options}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)


def scored(model: Any, head: SwiftHead, *arguments: Any, fuse: str = "gather", **options: Any) -> tuple[Any, Any]:
    with attach(model, head, fuse=fuse) as scorer:
        tokens = answer(model, *arguments, **options)
        return tokens, scorer.scores()


def patched_modules(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module) or "generate" in vars(module)]


@pytest.fixture
def model() -> Any:
    return fresh_model()


@pytest.fixture(params=["all", [2], "logits", "top_logprobs"], ids=str)
def head(request: pytest.FixtureRequest, model: Any) -> SwiftHead:
    torch.manual_seed(0)
    return SwiftHead.for_model(model, request.param)


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_a_plain_request_beside_a_scored_one(model: Any, head: SwiftHead, rows: tuple[int, int]) -> None:
    expected, plain = scored(model, head, rows[0], 1), answer(model, rows[1], 2)
    with meeting(model):
        found, beside = at_once(lambda: scored(model, head, rows[0], 1), lambda: answer(model, rows[1], 2))
    assert_equal(found, expected)
    assert torch.equal(beside, plain)
    assert not patched_modules(model)


@pytest.mark.parametrize("fuse", [("norm", "norm"), ("norm", "gather"), ("gather", "gather")], ids=" and ".join)
@pytest.mark.parametrize("rows", [(3, 3), (1, 4)], ids=str)
def test_two_scored_requests(model: Any, rows: tuple[int, int], fuse: tuple[str, str]) -> None:
    heads = [SwiftHead.for_model(model), SwiftHead.for_model(model, [1, 3])]
    calls = [
        lambda: scored(model, heads[0], rows[0], 1, fuse=fuse[0]),
        lambda: scored(model, heads[1], rows[1], 2, fuse=fuse[1]),
    ]
    expected = [call() for call in calls]
    barrier = threading.Barrier(2, timeout=PATIENCE)

    def attached(index: int) -> Any:
        # Both are attached before either runs: looking for norms, a scorer runs the model's hooks as well.
        with attach(model, heads[index], fuse=fuse[index]) as scorer:
            barrier.wait()
            with meeting(model) if index == 0 else nullcontext():
                barrier.wait()
                tokens = answer(model, rows[index], index + 1)
                barrier.wait()
            assert "ran so far: norm" in scorer.describe() or fuse[index] == "gather"
            return tokens, scorer.scores()

    for one, other in zip(at_once(lambda: attached(0), lambda: attached(1)), expected, strict=True):
        assert_equal(one, other)
    assert not patched_modules(model)


def test_score_texts_in_a_thread_pool(model: Any, head: SwiftHead) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(6, VOCAB_SIZE, (9,), generator=generator).tolist() for _ in range(24)]

    def score(text: list[int]) -> float:
        return score_texts(model, None, head, [text[:3]], [text[3:]]).item()

    expected = [score(text) for text in texts]
    with meeting(model, 4), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, texts)) == expected
    assert not patched_modules(model)


def test_texts_scored_beside_a_scored_request(model: Any, head: SwiftHead) -> None:
    texts = [[7, 8, 9, 10, 11]] * 6
    expected = scored(model, head, 2, 1, tokens=6)
    alone = score_texts(model, None, head, [[6]] * 6, texts, batch_size=1)
    with meeting(model):
        found, together = at_once(
            lambda: scored(model, head, 2, 1, tokens=6),
            lambda: score_texts(model, None, head, [[6]] * 6, texts, batch_size=1),
        )
    assert_equal(found, expected)
    assert torch.equal(together, alone)


def test_texts_scored_inside_of_a_scored_loop_do_not_count(model: Any, head: SwiftHead) -> None:
    def loop(between: Callable[[], Any]) -> torch.Tensor:
        with torch.no_grad(), attach(model, head) as scorer:
            scorer.begin(torch.arange(1))
            for token in (6, 7, 8):
                model(input_ids=torch.tensor([[token]]), use_cache=False)
                between()
            scorer.commit(torch.tensor([9]))
            return torch.cat([scorer.scores(), scorer.token_counts()])

    expected = loop(lambda: None)
    assert torch.equal(loop(lambda: score_texts(model, None, head, [[6]], [[7, 8]])), expected)


def test_a_thread_begun_inside_the_block_joins_in_by_its_context(model: Any) -> None:
    head = SwiftHead.for_model(model)
    expected = scored(model, head, 2, 1)
    with attach(model, head) as scorer:
        thread = threading.Thread(target=answer, args=(model, 2, 1))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match=r"copy_context"):
            scorer.scores()
        thread = threading.Thread(target=contextvars.copy_context().run, args=(answer, model, 2, 1))
        thread.start()
        thread.join()
        assert torch.equal(scorer.scores(), expected[1])


def test_a_loop_that_another_thread_runs_is_a_loud_error(model: Any) -> None:
    with torch.no_grad(), attach(model, SwiftHead.for_model(model)) as scorer:
        scorer.begin(torch.arange(1))
        at_once(lambda: model(input_ids=torch.tensor([[6]])))
        with pytest.raises(NotScoredError, match="copy_context"):
            scorer.scores()


def test_tasks_of_one_loop_are_told_apart(model: Any, head: SwiftHead) -> None:
    expected = [scored(model, head, rows, rows) for rows in (1, 2)]

    async def request(rows: int, barrier: asyncio.Barrier) -> Any:
        with attach(model, head) as scorer:
            await barrier.wait()  # both are attached
            tokens = await asyncio.to_thread(answer, model, rows, rows)
            await barrier.wait()
            return tokens, scorer.scores()

    async def both() -> Any:
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(request(1, barrier), request(2, barrier))

    for one, other in zip(asyncio.run(both()), expected, strict=True):
        assert_equal(one, other)
    assert not patched_modules(model)


def test_a_model_is_inspected_while_another_thread_runs_it(model: Any) -> None:
    """Neither notices: what the other one gets, with hidden states and without, is what it gets alone."""
    ids = torch.tensor([[6, 7, 8, 9, 10]])
    stop = threading.Event()
    begun = threading.Barrier(2, timeout=PATIENCE)
    models = [fresh_model(seed) for seed in range(12)]
    with torch.no_grad():
        alone = [fresh_model(seed)(input_ids=ids, output_hidden_states=True).hidden_states for seed in range(12)]

    def run(index: int) -> bool:
        same = True
        with torch.no_grad():
            begun.wait()
            while not stop.is_set():
                states = models[index](input_ids=ids, output_hidden_states=True).hidden_states
                same &= len(states) == len(alone[index]) and all(map(torch.equal, states, alone[index]))
        return same

    for index, one in enumerate(models):
        stop.clear()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run, index)
            begun.wait()
            layout, norms = model_layout(one), find_norms(one)
            stop.set()
            assert future.result()
        assert all(layout.readable)
        assert not any(isinstance(norm, str) for norm in norms.entries)


class Doubling(torch.nn.Module):
    def forward(self, x: int) -> int:
        return 2 * x


@pytest.mark.parametrize("own", [False, True], ids=["of its class", "of its own"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
def test_patches_overlap_and_end_in_any_order(order: tuple[int, ...], own: bool) -> None:
    module = Doubling()
    if own:
        module.forward = lambda x: 3 * x  # type: ignore[method-assign]
    before, result = dict(vars(module)), module(5)
    restores = [patch(module, "forward", lambda original, x, add=add: original(x) + add) for add in (1, 10, 100)]
    total = result + 111
    assert module(5) == total
    for index in order:
        restores[index]()
        total -= 10**index
        assert module(5) == total
    assert vars(module) == before
    restores[0]()  # once more changes nothing
    assert vars(module) == before


def test_patches_of_many_threads_leave_nothing_behind() -> None:
    module = Doubling()
    before = dict(vars(module))

    def churn() -> bool:
        right = True
        for _ in range(500):
            restore = patch(module, "forward", lambda original, x: original(x))
            right &= module(5) == 10
            restore()
        return right

    assert all(at_once(*[churn] * 4))
    assert vars(module) == before


def test_what_a_user_puts_there_meanwhile_stays(model: Any) -> None:
    """A decorated forward goes around the tap of a scorer, which reads nothing once the block is left."""
    head = SwiftHead.for_model(model)
    expected, layer, calls = scored(model, head, 1, 1, tokens=4), model.model.layers[0], []

    with attach(model, head) as scorer:
        inner = layer.forward

        def own(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(calls))
            return inner(*args, **kwargs)

        layer.forward = own
        assert torch.equal(answer(model, 1, 1, tokens=4), expected[0])
        assert torch.equal(scorer.scores(), expected[1])
        assert len(calls) == 4
        score_texts(model, None, head, [[6]], [[7, 8]])
        assert layer.forward is own
        assert len(calls) == 5
    assert layer.forward is own
    assert torch.equal(answer(model, 1, 1, tokens=4), expected[0])
    assert len(calls) == 9


@pytest.mark.parametrize("leave", ["a thread", "a copy of the context"])
def test_a_scorer_that_is_left_elsewhere_does_not_stay(model: Any, leave: str) -> None:
    head = SwiftHead.for_model(model)
    expected = scored(model, head, 1, 1)
    scorer = attach(model, head)
    scorer.__enter__()
    if leave == "a thread":
        at_once(lambda: scorer.__exit__(None, None, None))
    else:
        contextvars.copy_context().run(scorer.__exit__, None, None, None)
    assert not patched_modules(model)
    assert_equal(scored(model, head, 1, 1), expected)


@pytest.mark.parametrize("what", ["attach", "detach"])
def test_a_model_that_another_thread_compiles_is_not_changed_meanwhile(model: Any, what: str) -> None:
    """The other thread waits: the tracer would find other methods than its guards were made for."""
    head = SwiftHead.for_model(model)
    ids = torch.tensor([[6, 7, 8]])
    scorer = attach(model, head)
    began = []

    def change() -> None:
        scorer.__enter__() if what == "attach" else scorer.__exit__(None, None, None)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        if not began:
            began.append(threading.Thread(target=change))
            began[0].start()
            began[0].join(0.5)
            assert began[0].is_alive()
        return graph.forward

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        if what == "detach":
            at_once(scorer.__enter__)
        torch.compiler.reset()
        compiled = torch.compile(lambda: model(input_ids=ids, use_cache=False).logits, backend=backend)
        assert torch.equal(compiled(), expected)
        began[0].join()
        assert torch.equal(compiled(), expected)
    if what == "attach":
        at_once(lambda: scorer.__exit__(None, None, None))
    assert not patched_modules(model)


def logged(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("where", ["model", "decoder", "layers"])
@pytest.mark.parametrize("fuse", ["gather", "norm"])
def test_models_whose_forwards_are_decorated_are_inspected(where: str, fuse: str) -> None:
    model, plain = fresh_model(), fresh_model()
    head = SwiftHead.for_model(plain)
    decorated = {"model": [model], "decoder": [model.model], "layers": list(model.model.layers)}[where]
    for module in decorated:
        module.forward = logged(module.forward)
    assert all(model_layout(model).readable)
    assert_equal(scored(model, head, 2, 1, fuse=fuse), scored(plain, head, 2, 1, fuse=fuse))


class Slotted(torch.nn.Module):
    __slots__ = ("factor",)

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.factor = 2.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.factor * self.inner(*args, **kwargs)


def test_a_module_with_slots_is_inspected() -> None:
    model = fresh_model()
    model.model.layers[0].mlp = Slotted(model.model.layers[0].mlp)
    assert all(model_layout(model).readable)
