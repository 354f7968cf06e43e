"""`SwiftHead`: the reward head, a drop-in `nn.Module` of two rows of weights (arXiv 2505.12225)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from swift_kernels import features, schema
from swift_kernels.state import ScoreState

SPANS = ("fed", "all")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class HeadConfig:
    """What a head reads and how; stored as `config.json` beside its weights.

    Attributes:
        widths: width of each selected entry; their sum is the number of features F.
        features: "hidden_states", "logits" (the raw logits, one entry of vocabulary width), or "top_logprobs" (the k
            largest log-probabilities and three columns more, one entry of width k + 3; see `features.top_logprobs`).
        layers: ascending indices into Hugging Face's `hidden_states` (0 the first layer's input, L the final
            output), or None for the other sources and for heads used without a model.
        num_hidden_layers: L of the model the head was made for.
        gate: whether a sigmoid gate weighs the tokens; without one the score is the plain mean of the rewards.
        span: "fed", the response tokens fed to the model (all but the last sampled one, no end-of-sequence), or
            "all", which adds those (not with top_logprobs: no token follows the last).
        dtype: dtype of the weights, "float32" or "bfloat16".
        base_model: fingerprint of the model the head was trained on.
        task, metrics: what it was trained for, and how it did; with a "calibration", sigmoid(score) is P(correct).
    """

    widths: tuple[int, ...]
    features: str = features.HIDDEN_STATES
    layers: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    gate: bool = True
    span: str = "fed"
    dtype: str = "float32"
    base_model: dict[str, Any] | None = None
    task: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if not self.widths or any(not isinstance(width, int) or width < 1 for width in self.widths):
            raise ValueError(f"widths is {list(self.widths)}: expected one positive width per selected entry")
        if self.features not in features.FEATURE_SOURCES:
            raise ValueError(f"features is {self.features!r}: expected one of {list(features.FEATURE_SOURCES)}")
        if not isinstance(self.gate, bool):
            raise ValueError(f"gate is {self.gate!r}: expected true or false")
        if not isinstance(self.metrics, dict) or not isinstance(self.task, str | None):
            raise ValueError(f"metrics is {self.metrics!r}, task {self.task!r}: expected an object, and text or null")
        if self.span not in SPANS:
            raise ValueError(f"span is {self.span!r}: expected one of {list(SPANS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: expected one of {list(DTYPES)}")
        if self.features in features.FROM_LOGITS and (len(self.widths) != 1 or self.layers is not None):
            raise ValueError(f"a {self.features} head reads one entry and no layers")
        if self.features == features.TOP_LOGPROBS:
            if self.widths[0] < 5:
                raise ValueError(f"widths is {list(self.widths)}: expected k + 3 for k top_logprobs, k at least 2")
            if self.span == "all":
                raise ValueError('span="all" scores the last token, which none follows: a top_logprobs head has "fed"')
        if self.layers is not None:
            if len(self.layers) != len(self.widths):
                raise ValueError(f"{len(self.layers)} layers but {len(self.widths)} widths: expected one width a layer")
            if self.num_hidden_layers is None:
                raise ValueError("layers are given but num_hidden_layers is not")
            if features.resolve_layers(self.layers, self.num_hidden_layers) != self.layers:
                raise ValueError(f"layers is {list(self.layers)}: expected ascending indices, none negative")

    @property
    def num_features(self) -> int:
        return sum(self.widths)

    @property
    def top_logprobs(self) -> int | None:
        """k of a head that reads the k largest log-probabilities, None for the other sources."""
        return self.widths[0] - 3 if self.features == features.TOP_LOGPROBS else None

    @property
    def is_calibrated(self) -> bool:
        return "calibration" in self.metrics

    @property
    def num_outputs(self) -> int:
        """Rows of the weight: gate and reward, or the reward alone."""
        return 2 if self.gate else 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SwiftHead(nn.Module):
    """Gate and reward of every token from one linear layer; the score is the gate-weighted mean of the rewards.

    Attributes:
        weight: `[2, features]`, row 0 the gate, row 1 the reward (`[1, features]`, the reward, without a gate).
        bias: `[2]` (or `[1]`).
        config: the `HeadConfig`.
    """

    def __init__(
        self, config: HeadConfig | Sequence[int], *, gate: bool = True, device: torch.device | str | None = None
    ) -> None:
        """Makes a head from a `HeadConfig`, or from the widths of its entries alone (`gate` then as given)."""
        super().__init__()
        if not isinstance(config, HeadConfig):
            config = HeadConfig(widths=tuple(config), gate=gate)
        self.config = config
        dtype = DTYPES[config.dtype]
        self.weight = nn.Parameter(torch.empty(config.num_outputs, config.num_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(config.num_outputs, dtype=dtype, device=device))
        self.reset_parameters()

    @classmethod
    def for_model(
        cls,
        model: Any,
        layers: str | Sequence[int] = "all",
        gate: bool = True,
        span: str = "fed",
        dtype: str = "float32",
        task: str | None = None,
        top_logprobs: int | None = None,
    ) -> SwiftHead:
        """A new, untrained head for a transformers model, on the model's device.

        `layers` is "all" (0..L), a list of indices (negative ones count from the end), "logits" or "top_logprobs";
        the last reads the `top_logprobs` largest log-probabilities, 20 unless told otherwise.
        """
        from swift_kernels.fingerprint import fingerprint

        model = features.unwrapped(model)
        features.check_devices(model)
        layout = features.model_layout(model)
        common: dict[str, Any] = {
            "gate": gate,
            "span": span,
            "dtype": dtype,
            "task": task,
            "base_model": fingerprint(model),
        }
        if top_logprobs is not None and layers != features.TOP_LOGPROBS:
            raise ValueError(f'top_logprobs is {top_logprobs}, layers {layers!r}: expected layers="top_logprobs"')
        if layers == features.TOP_LOGPROBS:
            k = features.DEFAULT_TOP if top_logprobs is None else top_logprobs
            features.check_top(k, layout.vocab_size)
            config = HeadConfig(widths=(k + 3,), features=features.TOP_LOGPROBS, **common)
        elif layers == features.LOGITS:
            config = HeadConfig(widths=(layout.vocab_size,), features=features.LOGITS, **common)
        else:
            indices = features.resolve_layers(layers, layout.num_hidden_layers)
            config = HeadConfig(
                widths=tuple(layout.widths[index] for index in indices),
                layers=indices,
                num_hidden_layers=layout.num_hidden_layers,
                **common,
            )
        return cls(config, device=model.get_input_embeddings().weight.device)

    @classmethod
    def from_pretrained(cls, path: str, *, model: Any | None = None, allow_mismatch: bool = False, **hub: Any):
        """Loads a head from a folder or from the Hugging Face Hub; see `checkpoint.load`."""
        from swift_kernels import checkpoint

        return checkpoint.load(path, model=model, allow_mismatch=allow_mismatch, **hub)

    @classmethod
    def from_upstream(cls, path: str, *, model: Any, layers: str | Sequence[int] = "all", **options: Any):
        """Loads a `.pt` file of the authors' code; see `checkpoint.load_upstream`."""
        from swift_kernels import checkpoint

        return checkpoint.load_upstream(path, model=model, layers=layers, **options)

    def save_pretrained(self, path: str) -> None:
        """Writes `config.json` and `model.safetensors` into a folder."""
        from swift_kernels import checkpoint

        checkpoint.save(self, path)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Uploads the head to the Hugging Face Hub and returns the address of the commit."""
        from swift_kernels import checkpoint

        return checkpoint.push(self, repo_id, **hub)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(features), as `nn.Linear` starts and upstream trains from."""
        bound = 1 / math.sqrt(self.config.num_features)
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def with_config(self, **changes: Any) -> SwiftHead:
        """A head of the same weights whose config has the given fields changed."""
        head = SwiftHead(replace(self.config, **changes), device=self.weight.device)
        head.load_state_dict(self.state_dict())
        return head

    def calibrated(self, temperature: float, offset: float, **facts: Any) -> SwiftHead:
        """A head whose scores are `score / temperature + offset`, log-odds of being right; it ranks answers as before.

        The score is linear in the reward's weights, so they take in both. `facts` are kept in the config beside them.
        """
        if not 0 < temperature < math.inf or not math.isfinite(offset):
            raise ValueError(f"temperature is {temperature}, offset {offset}: expected finite ones, the first above 0")
        before = self.config.metrics.get("calibration", {"temperature": 1.0, "offset": 0.0})
        record = {
            "temperature": before["temperature"] * temperature,
            "offset": before["offset"] / temperature + offset,
            **facts,
        }
        head = self.with_config(metrics={**self.config.metrics, "calibration": record})
        with torch.no_grad():
            head.weight[-1] /= temperature
            head.bias[-1] /= temperature
            head.bias[-1] += offset
        return head

    def init_state(
        self, slots: int, device: torch.device | str | None = None, max_rows: int | None = None
    ) -> ScoreState:
        """An empty state for `slots` sequences (on the head's device unless told otherwise)."""
        return ScoreState(slots, self.config.widths, self.weight.device if device is None else device, max_rows)

    def step(
        self,
        hidden_states: Sequence[Tensor],
        state: ScoreState,
        slots: Tensor,
        gate_reward: Tensor | None = None,
    ) -> None:
        """Scores one decoded token of every row into `state`: one fused kernel, nothing kept, no synchronisation.

        Args:
            hidden_states: one `[rows, width]` tensor per selected layer (float32, bfloat16 or float16).
            state: updated in place.
            slots: int64 `[rows]`, the slot each row belongs to; distinct where not negative, and below the number of
                slots. A negative slot skips its row. On the CPU, and elsewhere under `SWIFT_KERNELS_DEBUG=1`, other
                slots are an error. On a GPU nobody waits to look at them: a row whose slot does not exist is skipped,
                and of rows that share a slot any one may count.
            gate_reward: optional float32 `[rows, 2]` that receives each scored row's sigmoid gate and reward.
        """
        if state.widths != self.config.widths:
            raise ValueError(f"the state is for widths {list(state.widths)}, the head has {list(self.config.widths)}")
        schema.score_step(
            hidden_states,
            self.weight.detach(),
            self.bias.detach(),
            slots,
            state.sums,
            state.token_count,
            state.partials,
            state.arrivals,
            gate_reward,
        )

    def warmup(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        rows: int = 1,
        gate_reward: bool = False,
    ) -> None:
        """Compiles what `step` runs: the Triton kernel on CUDA, the C++ library on the CPU. Scores nothing.

        Call it before a step is captured into a CUDA graph: nothing can be compiled in the middle of a capture.

        Args:
            device: where the steps will be (the head's device unless told otherwise).
            dtype: of the hidden states.
            rows: of the step that is tried. Steps of any other number of rows find everything compiled too.
            gate_reward: compiles also the step that returns gates and rewards.
        """
        state = self.init_state(1, device, max_rows=rows)
        slots = torch.full((rows,), -1, dtype=torch.int64, device=state.device)
        hidden_states = [torch.zeros(rows, width, dtype=dtype, device=state.device) for width in self.config.widths]
        self.step(hidden_states, state, slots)
        if gate_reward:
            self.step(hidden_states, state, slots, torch.zeros(rows, 2, device=state.device))

    def scores(self, state: ScoreState) -> Tensor:
        """float32 `[slots]` scores so far; NaN where no token was scored."""
        return state.scores()

    def forward(self, hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
        """Scores whole packed sequences, differentiable; the backward pass reads the hidden states once more.

        Args:
            hidden_states: one `[tokens, width]` tensor per selected layer, as it lies, with unit stride along the
                width (float32, bfloat16 or float16; float64 with a head of float64).
            cu_seqlens: int32 or int64 `[sequences + 1]`, cumulative lengths from 0 to `tokens`.

        Returns:
            float32 `[sequences]`; NaN for a sequence of no tokens.
        """
        return score_heads([self], hidden_states, cu_seqlens)[:, 0]

    def extra_repr(self) -> str:
        config = self.config
        layers = config.features if config.layers is None else f"layers={list(config.layers)}"
        return f"{layers}, features={config.num_features}, gate={config.gate}, span={config.span!r}"


def score_heads(heads: Sequence[SwiftHead], hidden_states: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
    """Scores packed sequences with several heads that share one read of the hidden states, differentiable.

    For sweeps over seeds or losses; a head of fewer layers joins in with zeros for the others. Arguments as in
    `SwiftHead.forward`.

    Returns:
        float32 `[sequences, heads]`.
    """
    if not heads:
        raise ValueError("heads is empty: expected at least one head")
    first = heads[0].config
    for index, head in enumerate(heads):
        if (head.config.layers, head.config.widths) != (first.layers, first.widths):
            raise ValueError(
                f"heads[{index}] reads layers {head.config.layers} of widths {list(head.config.widths)}, heads[0] "
                f"layers {first.layers} of widths {list(first.widths)}: heads that share one read have the same entries"
            )
        if head.config.gate != first.gate or head.weight.dtype != heads[0].weight.dtype:
            raise ValueError(
                f"heads[{index}] has gate={head.config.gate} and {head.weight.dtype} weights, heads[0] "
                f"gate={first.gate} and {heads[0].weight.dtype}: expected heads of one kind"
            )
    _check_packed(hidden_states, first.widths)
    weight = heads[0].weight if len(heads) == 1 else torch.cat([head.weight for head in heads])
    bias = heads[0].bias if len(heads) == 1 else torch.cat([head.bias for head in heads])
    return schema.score_sequence(hidden_states, weight, bias, cu_seqlens, first.gate)[0]


def _check_packed(hidden_states: Sequence[Tensor], widths: Sequence[int]) -> None:
    if len(hidden_states) != len(widths):
        raise ValueError(f"{len(hidden_states)} hidden states: expected {len(widths)}, one a layer")
    tokens = hidden_states[0].shape[0]
    for index, (entry, width) in enumerate(zip(hidden_states, widths, strict=True)):
        if entry.dim() != 2 or tuple(entry.shape) != (tokens, width):
            raise ValueError(f"hidden_states[{index}] has shape {list(entry.shape)}: expected [{tokens}, {width}]")


def check_finite(head: SwiftHead, source: str) -> None:
    """Raises when a weight of `head` is NaN or infinite."""
    for name, parameter in head.named_parameters():
        bad = ~torch.isfinite(parameter)
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{source}: {name}{place} is {parameter[tuple(place)].item()}; expected finite weights "
                "(did the training diverge?)"
            )
