"""Scoring inside Hugging Face `transformers`: `attach` around `model.generate`, unchanged but for the scores.

One decode step as data flows: the model runs, hooks hand over each selected layer's hidden states where the model
left them, and at the last one `SwiftHead.step` launches one kernel that updates the running means. The rows that
count are known from the stopping criteria, which `generate` evaluates on every token that it has sampled.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from swift_kernels import features, schema
from swift_kernels.head import SwiftHead
from swift_kernels.integrations.compatibility import check_head
from swift_kernels.integrations.feed_last import FeedLast
from swift_kernels.integrations.generation import (
    NotScoredError,
    Run,
    UnsupportedGenerationError,
    check_call,
    check_generation,
    refuse_continuous_batching,
)
from swift_kernels.integrations.norm_path import Buffers, NormPath
from swift_kernels.integrations.teacher_forcing import forward_packed, score_texts
from swift_kernels.integrations.top_logprobs import TopLogprobs, input_ids
from swift_kernels.patching import patch
from swift_kernels.state import ScoreState

try:
    import transformers
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'swift_kernels[transformers]'") from error

__all__ = ["NotScoredError", "Scorer", "UnsupportedGenerationError", "attach", "forward_packed", "score_texts"]

_ELSEWHERE = (
    ". Another thread is scored if it runs in the context of the one that attached: contextvars.copy_context().run"
)


def attach(
    model: Any,
    head: SwiftHead,
    *,
    fuse: str = "gather",
    trace: bool = False,
    allow_mismatch: bool = False,
) -> Scorer:
    """Scores what `model` generates inside a `with` block; `generate` itself returns what it would without.

    Scored is what the thread (or `asyncio` task) that enters the block generates. Others may run the model meanwhile,
    attached themselves or not, and do not notice. A thread that is begun inside the block joins in by
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.

    Args:
        model: a decoder-only model of transformers.
        head: its feature source, layers and widths must fit the model.
        fuse: "gather", one kernel beside the model at each step, which leaves generation bitwise as it was; or
            "norm", inside the model's RMSNorms in eager steps, as they are when this is called: faster, also where a
            norm reads nothing that is scored, and may flip a last bit of what the model computes.
        trace: keeps every scored token's gate and reward (`Scorer.trace`), 8 bytes a token.
        allow_mismatch: attaches although the head was trained on another model.

    Raises:
        UnsupportedModelError: the features cannot be read from this model.
        ModelMismatchError: the head was trained on another model.
        ValueError: layers or widths do not fit, the model is attached already, or has no norm to fuse.
    """
    if fuse not in ("gather", "norm"):
        raise ValueError(f'fuse is {fuse!r}: expected "gather" or "norm"')
    model = features.generating_model(model)
    check_head(model, head, allow_mismatch=allow_mismatch)
    return Scorer(model, head, fuse=fuse, trace=trace)


class Scorer:
    """Scores of one model, while its `with` block lasts; made by `attach`."""

    def __init__(self, model: Any, head: SwiftHead, *, fuse: str = "gather", trace: bool = False) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.head = head if head.weight.device == device else copy.deepcopy(head).to(device)
        self._keep_trace = trace
        self._is_read = features.reads_here(self)
        self._state: ScoreState | None = None
        self._slots: Tensor | None = None
        self._own_slots: Tensor | None = None
        self._awaited: Tensor | None = None
        self._gate_reward: Tensor | None = None
        self._norms = (
            NormPath(model, self.head, self._buffers, self._step_scored, self._is_read) if fuse == "norm" else None
        )
        vocab_size = features.model_layout(model).vocab_size
        self._late = None if head.config.top_logprobs is None else TopLogprobs(self.head, vocab_size)
        self._entries: list[Tensor] = []
        self._last_entry = len(head.config.widths) - 1
        self._whole_sequences = False
        self._active = self._generating = False
        self._scored = self._ran_norm = self._ran_gather = False
        self._run: Run | None = None
        self._looping = False
        self._compiled: tuple[Any, Callable[..., Any]] | None = None
        self._patches: ExitStack | None = None

    def __enter__(self) -> Scorer:
        decoder = features.model_layout(self.model).decoder
        for other in features.readers():
            # One that another task has left since still counts as a reader of this one.
            if not isinstance(other, Scorer) or other._patches is None:
                continue
            if other is self or features.model_layout(other.model).decoder is decoder:
                name = type(self.model).__name__
                raise ValueError(f"{name} has a scorer attached already: leave its `with` block first")
        if self._patches is not None:
            raise RuntimeError("the scorer is attached already, in another thread: attach another one there")
        with ExitStack() as patches:
            config = self.head.config
            if self._late is None:
                patches.enter_context(features.tap(self.model, config.features, config.layers, self._consume, self))
            else:
                patches.callback(patch(self.model, "forward", self._run_and_take_logits))
            if self._norms is not None:
                patches.enter_context(self._norms.patch())
            replacements: dict[str, Callable[..., Any]] = {
                "generate": self._generate,
                "_get_stopping_criteria": self._get_stopping_criteria,
                "get_compiled_call": self._get_compiled_call,
            }
            for name in ("generate_batch", "init_continuous_batching"):
                if hasattr(self.model, name):
                    replacements[name] = refuse_continuous_batching
            for name, replacement in replacements.items():
                patches.callback(patch(self.model, name, functools.partial(self._where_read, replacement)))
            patches.enter_context(features.reading(self))
            self._patches = patches.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._patches is not None:
            self._patches.close()
            self._patches = None
        self._forget_step()
        self._active = False

    def begin(self, slots: Tensor, num_slots: int | None = None) -> None:
        """Scores every one-position forward from now on, for a hand-written loop or a captured CUDA graph.

        A step that is compiled or captured within the block scores for whoever runs it: run it in this thread alone,
        and compile another one for another block.

        A head of top_logprobs scores a token once the next one of its slot is known: when a later forward feeds it, or
        the loop tells `commit`. Until then it does not count, so without `commit` the last token fed to a slot never
        does.

        Args:
            slots: int64 `[rows]` on the model's device, the slot of each row, negative to skip it. It is read at
                every step and may be changed in place. A graph that was captured after `begin` goes on scoring when
                that is called again with this tensor. Capture it anew after a `begin` or `generate` of other numbers
                of rows or slots, which replaces the buffers that it knows.
            num_slots: how many slots there are; as many as rows unless told otherwise.
        """
        self._check_inside()
        if self._keep_trace:
            raise ValueError("trace=True follows `generate`: a hand-written loop calls head.step with gate_reward")
        if slots.dtype != torch.int64 or slots.dim() != 1 or slots.device != self.head.weight.device:
            raise ValueError(
                f"slots is {slots.dtype} of shape {list(slots.shape)} on {slots.device}: expected int64 [rows] on "
                f"{self.head.weight.device}"
            )
        self._run = None
        self._looping = True
        self._whole_sequences = self._scored = False
        num_slots = slots.shape[0] if num_slots is None else num_slots
        self._reset(num_slots, slots.shape[0])
        self._slots = slots
        self._awaited = (slots >= 0).any()  # not read until scores are
        if self._late is not None:
            self._late.begin(num_slots)
        self._mark_static()
        self._active = True

    def commit(self, token_ids: Tensor) -> None:
        """Tells a hand-written loop's scorer what was sampled, before any slot changes; needed by top_logprobs alone.

        With it a loop scores the tokens that `generate` does; heads of other sources ignore it.

        Args:
            token_ids: int64 `[rows]`, the tokens sampled after the last forward. Rows of negative slots are ignored.
        """
        self._check_inside()
        if not self._looping:
            raise RuntimeError("commit belongs to a hand-written loop: call scorer.begin(slots) first")
        if self._late is not None:
            self._late.commit(token_ids, *self._present())

    def scores(self) -> Tensor:
        """float32 scores, `[rows]` in the order of the last `generate`'s output, or `[slots]` after `begin`.

        NaN where no token was scored.

        Raises:
            NotScoredError: the kernel did not run at every step, as when the model was compiled before `attach`.
        """
        return self._checked_state().scores()

    def token_counts(self) -> Tensor:
        """int32, how many tokens each score rests on."""
        return self._checked_state().token_count.clone()

    def response_lengths(self) -> Tensor:
        """int64 `[rows]`: tokens the last `generate` sampled for each row, end-of-sequence included, padding not."""
        return self._finished_run().lengths.clone()

    def finished(self) -> Tensor:
        """bool `[rows]`: whether each row of the last `generate` ended by itself, not for lack of length or time."""
        return self._finished_run().ended.clone()

    def trace(self) -> list[Tensor]:
        """For each row of the last `generate`, float32 `[tokens, 2]`: gate and reward of every scored token."""
        if not self._keep_trace:
            raise ValueError("nothing was traced: attach(..., trace=True)")
        run = self._finished_run()
        self._checked_state()
        if not run.trace:
            return [torch.zeros(0, 2)] * run.lengths.shape[0]
        values = torch.stack([gate_reward for gate_reward, _ in run.trace], dim=1).cpu()
        fed = torch.stack([fed for _, fed in run.trace], dim=1).cpu()
        return [row[mask] for row, mask in zip(values, fed, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes scoring holds for the sequences, 12 each, whatever their length."""
        return 0 if self._state is None else self._state.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of scratch, constant: the kernel's partial sums and counters, and the bookkeeping of the rows.

        In a hand-written loop a head of top_logprobs keeps the logits of each slot's last token as well.
        """
        if self._state is None:
            return 0
        held = [self._own_slots, self._gate_reward] + ([] if self._run is None else self._run.tensors())
        held += [] if self._late is None else self._late.buffers()
        return self._state.scratch_nbytes + sum(tensor.nbytes for tensor in held if tensor is not None)

    def warmup(self, rows: int = 1) -> None:
        """Compiles every kernel that scoring runs, whatever the number of rows: nothing compiles afterwards.

        Call it before a hand-written loop is captured into a CUDA graph.
        """
        self._check_inside()
        parameter, config = self.head.weight, self.head.config
        dtype = next(tensor.dtype for tensor in self.model.parameters() if tensor.is_floating_point())
        dtype = dtype if self._late is None else torch.float32
        self.head.warmup(parameter.device, dtype, rows, gate_reward=self._keep_trace)
        if self._norms is not None:
            state = self.head.init_state(rows, parameter.device)
            trace = torch.zeros(rows, 2, device=parameter.device) if self._keep_trace else None
            entries = [torch.zeros(rows, width, dtype=dtype, device=parameter.device) for width in config.widths]
            self._norms.warmup(entries, state, torch.full((rows,), -1, device=parameter.device), trace)

    def describe(self) -> str:
        """What runs where and why, in a line."""
        config = self.head.config
        source = config.features
        if config.layers is not None:
            first, last = config.layers[0], config.layers[-1]
            every = len(config.layers) == last - first + 1 > 1
            source += f" {first}..{last}" if every else f" {list(config.layers)}"
        device = self.head.weight.device
        kernels = schema.implementation(device.type)
        gather = f"gather, one {kernels} call a step on {device}"
        if self._norms is None:
            how = gather
        elif self._norms.reason is not None:
            how = f"{gather}, as {self._norms.reason}"
        else:
            ran = [name for name, did in (("norm", self._ran_norm), ("gather", self._ran_gather)) if did]
            how = (
                f"norm, {self._norms.describe()} by {kernels} on {device}; compiled forwards and those with gradients "
                f"gather; ran so far: {' and '.join(ran) or 'nothing'}"
            )
        return f"{type(self.model).__name__}: {source}, {config.num_features} features, {how}"

    def _where_read(
        self, replacement: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A method of the model as the scorer replaces it, for its own thread or task; for others the original."""
        return replacement(original, *args, **kwargs) if self._is_read() else original(*args, **kwargs)

    def _consume(self, k: int, entry: Tensor) -> None:
        """Receives the selected entries of a forward in turn, and scores the step at the last one."""
        if not self._active:
            return
        if self._norms is not None and self._norms.scores():
            self._norms.expect(k, entry)
            return
        if k == 0 and self._entries:  # of a forward that was broken off
            self._entries = []
        if entry.shape[1] == 1:
            # Inductor has to learn at once, and not by `entry[:, 0]`, that the state is needed: else it computes it a
            # second time. In an eager step little of Python is in the cache here; what can wait is faster at the end.
            if torch.compiler.is_compiling():
                rows, _, width = entry.shape
                entry = entry.as_strided((rows, width), (entry.stride(0), entry.stride(2)))
            self._entries.append(entry)
        elif self._whole_sequences:
            # Without a cache every forward feeds the whole sequence: a copy, so that the rest can be freed.
            self._entries.append(entry[:, -1].clone())
        else:
            return
        if k == self._last_entry:
            entries, self._entries = self._entries, []
            assert self._state is not None
            assert self._slots is not None
            entries = [entry.squeeze(1) if entry.dim() == 3 else entry for entry in entries]
            self.head.step(entries, self._state, self._slots, self._gate_reward)
            self._scored = self._ran_gather = True

    def _run_and_take_logits(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward whose logits are scored later, once the token that follows is known."""
        output = forward(*args, **kwargs)
        if not (self._active and self._is_read()):
            return output
        assert self._late is not None
        if not self._looping:
            # Without a cache every forward feeds the whole sequence: a copy, so that the rest can be freed.
            logits = output.logits[:, -1]
            self._late.hold(logits.clone() if self._whole_sequences else logits)
        elif (token_ids := input_ids(args, kwargs)).shape[1] == 1:
            self._late.feed(output.logits[:, -1].detach(), token_ids[:, 0], *self._present())
        else:
            return output
        self._scored = self._ran_gather = True
        return output

    def _buffers(self) -> Buffers | None:
        """What an eager forward is scored into inside the norms; None where it is not scored, or gathered."""
        if not self._active or self._whole_sequences:
            return None
        return self._present()

    def _present(self) -> Buffers:
        assert self._state is not None
        assert self._slots is not None
        return self._state, self._slots, self._gate_reward

    def _step_scored(self) -> None:
        self._scored = self._ran_norm = True

    def _forget_step(self) -> None:
        self._entries.clear()
        if self._late is not None:
            self._late.forget()
        if self._norms is not None:
            self._norms.reset()

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        check_call(self.model, original, args, kwargs)
        if self._generating:
            raise RuntimeError(
                f"{type(self.model).__name__} is generating already, in another thread: a scorer follows one generate, "
                "attach another there"
            )
        self._generating = True
        self._active = self._looping = False
        self._run = None
        feed = FeedLast(self) if self.head.config.span == "all" else None
        try:
            output = original(*args, **kwargs)
            if self._run is None:
                raise NotScoredError("generate decoded without its stopping criteria: nothing was scored")
            if feed is not None:
                feed.run(output)
            self._run.complete = True
            return output
        finally:
            if feed is not None:
                feed.remove()
            self._forget_step()
            self._active = self._generating = False

    def _get_stopping_criteria(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> _Criteria:
        config = inspect.signature(original).bind(*args, **kwargs).arguments["generation_config"]
        check_generation(config)
        if self.head.config.span == "all" and config.cache_implementation is not None:
            raise UnsupportedGenerationError(
                f'a head of span="all" feeds one token more than a {config.cache_implementation!r} cache has room for: '
                "use the dynamic cache"
            )
        self._whole_sequences = not config.use_cache
        return _Criteria(original(*args, **kwargs), self._sampled)

    def _sampled(self, sequences: Tensor, done: Tensor, ended: Tensor) -> None:
        """Called with every sampled token: settles what the last forward fed, and decides what the next will."""
        run, rows = self._run, done.shape[0]
        if run is None:
            self._reset(rows, rows)
            run = self._run = Run(rows, done.device)
            self._slots = self._own_slots
            self._active = True
        else:
            if not self._scored:
                raise NotScoredError(
                    f"a forward of {type(self.model).__name__} was not scored: a model or layer that was compiled "
                    "before attach() does not run its hooks; attach first, then compile"
                )
            if self._late is not None:
                self._late.settle(sequences[:, -1], *self._present())
            self._keep(run)
        self._scored = False
        assert self._slots is not None
        run.length = sequences.shape[1]
        run.advance(done, ended, self._slots, feed_last=self.head.config.span == "all")

    def _keep(self, run: Run) -> None:
        """Keeps the gates and rewards of the step that was just scored, if they are asked for."""
        if self._gate_reward is not None:
            assert self._slots is not None
            run.trace.append((self._gate_reward.clone(), self._slots >= 0))

    def _get_compiled_call(self, _original: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        stand_in = _StandIn(self.model)
        stock = type(self.model).get_compiled_call(stand_in, *args, **kwargs)
        config = vars(stand_in).get("_last_compile_config")
        if config is None:
            return stock
        if self._compiled is None or self._compiled[0] != config:
            model = self.model

            def scored_forward(*args: Any, **kwargs: Any) -> Any:
                return model(*args, **kwargs)

            # Dynamo caches by code object and does not look for hooks in its guards: a code object of its own makes
            # it trace the hooked model, and keeps the trace out of what the model runs once detached.
            scored_forward.__code__ = scored_forward.__code__.replace()
            self._compiled = (config, torch.compile(scored_forward, **config.to_dict()))
            self._mark_static()
        return self._compiled[1]

    def _reset(self, slots: int, rows: int) -> None:
        """Empties the state, or makes one; buffers of a fitting size are kept, as a recorded graph knows them."""
        device = self.head.weight.device
        if self._state is None or (self._state.slots, self._state.max_rows) != (slots, rows):
            self._state = self.head.init_state(slots, device, max_rows=rows)
            with torch.inference_mode(False):
                self._own_slots = torch.full((rows,), -1, device=device)
                self._gate_reward = torch.zeros(rows, 2, device=device) if self._keep_trace else None
            if self._compiled is not None:
                self._mark_static()
        else:
            self._state.reset_()

    def _mark_static(self) -> None:
        """Tells torch.compile that the buffers stay in place; it records no CUDA graph over other mutated inputs."""
        if self._state is None:
            return
        state = self._state
        for buffer in (
            state.sums,
            state.token_count,
            state.partials,
            state.arrivals,
            self._own_slots,
            self._slots,
            self._gate_reward,
            self.head.weight,
            self.head.bias,
            *([] if self._late is None else self._late.buffers()),
        ):
            if buffer is not None:
                torch._dynamo.mark_static_address(buffer)

    def _check_inside(self) -> None:
        if self._patches is None:
            raise RuntimeError("the scorer is not attached: use it inside `with attach(model, head) as scorer:`")

    def _finished_run(self) -> Run:
        if self._run is None:
            raise RuntimeError(f"nothing was generated: call model.generate inside the `with` block first{_ELSEWHERE}")
        if not self._run.complete:
            raise RuntimeError("the last generate did not return: it has no scores")
        return self._run

    def _checked_state(self) -> ScoreState:
        if self._looping:
            if not self._scored and not self._replayed():
                raise NotScoredError(
                    "no forward of one position was scored since begin(): a model that was compiled or captured "
                    f"before attach() does not run its hooks; attach first{_ELSEWHERE}"
                )
        else:
            run = self._finished_run()
            assert self._state is not None
            # Every row has ended when generate returns: all of its tokens were fed but the last, or that one too.
            fed = run.lengths - (0 if self.head.config.span == "all" else 1)
            if not torch.equal(self._state.token_count, fed.int()):
                raise NotScoredError(
                    f"{self._state.token_count.tolist()} tokens were scored, {fed.tolist()} were fed: something "
                    "else ran the model during generate (a logits processor?), or hooks were skipped"
                )
        assert self._state is not None
        return self._state

    def _replayed(self) -> bool:
        """Whether a captured graph may have scored, which runs no hook: it counts tokens, unless it skips every row."""
        assert self._state is not None
        assert self._awaited is not None
        if bool(self._state.token_count.any()) or (self._late is not None and self._late.waits()):
            return True
        return (self._ran_norm or self._ran_gather) and not bool(self._awaited)


class _StandIn:
    """A model to a method that keeps a compiled call of it: it has none yet, and what it keeps is not for others."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("_compiled_call", "_last_compile_config"):
            raise AttributeError(name)
        return getattr(self._model, name)


class _Criteria(transformers.StoppingCriteriaList):
    """The stopping criteria of a `generate`, which also tell a scorer what was sampled and which rows are done, why."""

    def __init__(
        self, criteria: transformers.StoppingCriteriaList, sampled: Callable[[Tensor, Tensor, Tensor], None]
    ) -> None:
        super().__init__(criteria)
        self.sampled = sampled

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ended = done
        for criterion in self:
            met = criterion(input_ids, scores, **kwargs)
            done = done | met
            if not isinstance(criterion, transformers.MaxLengthCriteria | transformers.MaxTimeCriteria):
                ended = ended | met
        self.sampled(input_ids, done, ended)
        return done
