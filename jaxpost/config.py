"""What a run can be told: frozen dataclasses, one per method in a tagged union. Imports no jax.

Each section is read by exactly one place; a key that nothing reads cannot exist, and a key that does not
exist is an error naming the nearest right one (`config_io.load`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which pretrained model, and how it is computed."""

    path: str = "smollm2-135m-instruct"
    """A local folder, a hub id, or the bundled `smollm2-135m-instruct`; tried in that order."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Folder or hub id of another tokenizer than the model's own."""
    chat_template: str | None = None
    """A built-in training template (chatml, llama3, qwen3, gemma ...) or a .jinja file; None: by the tokenizer."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes: nothing, all but matrix products, or whole layers."""


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    """One file, folder or hub dataset, and how its rows are read."""

    path: str
    """A .jsonl, .jsonl.gz, .json or .parquet file, a glob of them, a `datasets` folder or a hub id."""
    split: str = "train"
    subset: str | None = None
    """Configuration name of a hub dataset."""
    format: Literal[
        "auto",
        "language_modeling",
        "prompt_only",
        "prompt_completion",
        "preference",
        "ranking",
        "unpaired_preference",
        "scored",
        "stepwise",
    ] = "auto"
    convert: Literal[
        "auto",
        "none",
        "sharegpt",
        "alpaca",
        "openai",
        "oasst",
        "hh",
        "alpaca_eval",
        "compared",
        "pandalm",
        "stack_exchange",
        "qa_feedback",
        "judge_prompts",
        "solutions",
        "best_of_n",
        "truthful",
        "mathdial",
        "verify_cot",
        "helpsteer",
        "prm800k",
        "math_shepherd",
        "omega_prm",
        "prmbench",
        "big_bench_mistake",
    ] = "auto"
    """Whose rows they are, where their keys are not a format's; auto: recognised by their keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames {prompt: question, completion: answer}, or texts of columns {completion: "{steps} Answer: {answer}"}."""
    weight: float | None = None
    """Share of the mixture's examples (relative); None in all sources: by size, each example once an epoch."""
    limit: int | None = None
    """Use only the first rows."""
    skip: int = 0
    """Leave out the first rows (for a held-out split of one file)."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where examples come from and how they become packed rows."""

    train: tuple[SourceSection, ...] = ()
    eval: tuple[SourceSection, ...] = ()
    seq_len: int = 1024
    packing: bool = True
    mask: Literal["completion", "assistant", "all", "weights"] = "assistant"
    """Which tokens are trained: completions, assistant turns, everything, or assistant turns by `loss_weight`."""
    system_prompt: str | None = None
    """Before conversations without a system turn. None: as the chat template does it; "": not even its own."""
    on_bad_row: Literal["error", "skip"] = "error"
    on_long_row: Literal["truncate", "drop", "error"] = "truncate"
    seed: int = 0
    workers: int = 0
    """Processes that tokenise; 0: in this one."""
    prefetch: int = 4
    """Batches made ahead of the step that reads them."""


@dataclass(frozen=True, kw_only=True)
class AnswerDataSection(DataSection):
    """Rows that say how good answers are. A row of a batch holds whole groups (pairs, rankings, single answers)."""

    max_length: int | None = None
    """Most tokens of a prompt with one answer; None: as many as let the group fit into `seq_len`."""
    cut: Literal["answers", "prompt"] = "answers"
    """What on_long_row: truncate shortens: the ends of the longest answers, or first the beginning of the prompt."""
    on_tie: Literal["skip", "keep", "error"] = "skip"
    """Pairs and rankings in which no answer is better: left out and counted, kept with equal ranks, or an error."""
    grades: dict[str, float] = field(
        default_factory=lambda: {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "marginally": 0.0}
    )
    """Strength of a preference by grade (Llama 2's margins, 2307.09288); numbers in the rows stay as they are."""
    pairs_of_rankings: Literal["all", "best_worst", "neighbours"] = "all"
    """Which two answers of a ranking make pairs."""
    good_score: float | None = None
    """Scored answers from this score on are desirable where unpaired rows are needed."""
    objectives: tuple[str, ...] = ()
    """Of scored answers, where `score` is {name: number}: which of them are learned, each by an output of its own."""
    step_separator: str = "\n"
    """Text that ends every step of an answer given in steps."""
    step_mark: Literal["separator", "last"] = "separator"
    """Where a step's score is read: the separator's last token, or the last token of the step itself."""
    step_labels: Literal["as_given", "hard"] = "as_given"
    """hard: 1 from a probability of 0.5 on, else 0."""
    after_error: Literal["as_given", "ignore", "wrong"] = "as_given"
    """Labels of the steps behind the first wrong one (label below 0.5)."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropySection:
    """-log p(target), weighted by token."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the logits' normaliser near 1 (PaLM, 2204.02311)."""
    label_smoothing: float = 0.0
    chunk_tokens: int | None = None
    """Tokens per device whose logits exist at one time; None: by the platform."""


@dataclass(frozen=True, kw_only=True)
class DFTSection:
    """-sg(p) log p (dynamic fine-tuning, 2508.05629)."""

    kind: Literal["dft"] = "dft"
    z_loss: float = 0.0
    chunk_tokens: int | None = None


LossSection = CrossEntropySection | DFTSection


@dataclass(frozen=True, kw_only=True)
class FullSection:
    """Train the weights themselves, or those whose path matches."""

    kind: Literal["full"] = "full"
    trainable: tuple[str, ...] = ("*",)
    """Glob patterns over parameter paths, e.g. "*norm*", "stacks/0/*"; what matches none is frozen."""


@dataclass(frozen=True, kw_only=True)
class LoRASection:
    """Low-rank updates W + (alpha / r) A B of a frozen base (2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all-linear",)
    """"all-linear", names such as q_proj, or glob patterns over parameter paths."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (2312.03732)."""
    init_from: str | None = None
    """A PEFT adapter folder to go on from."""


AdapterSection = FullSection | LoRASection


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """Learning rate over steps, as a fraction of `lr`."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: float = 0.03
    """Steps (>= 1) or fraction of all steps (< 1) of linear warm-up."""
    decay: float = 0.2
    """wsd only: steps or fraction of the final decay."""
    final: float = 0.0
    """Fraction of `lr` reached at the last step (cosine, linear, wsd)."""


@dataclass(frozen=True, kw_only=True)
class _OptimCommon:
    lr: float = 1e-5
    schedule: ScheduleSection = ScheduleSection()
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained parameters; evaluation and export use it."""


@dataclass(frozen=True, kw_only=True)
class AdamWSection(_OptimCommon):
    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; matrices only (not norms, biases)."""


@dataclass(frozen=True, kw_only=True)
class AdafactorSection(_OptimCommon):
    kind: Literal["adafactor"] = "adafactor"
    weight_decay: float = 0.0
    decay_rate: float = 0.8


@dataclass(frozen=True, kw_only=True)
class LionSection(_OptimCommon):
    kind: Literal["lion"] = "lion"
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MuonSection(_OptimCommon):
    """Muon for hidden matrices, AdamW for embeddings, head, norms and biases."""

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    ns_steps: int = 5
    weight_decay: float = 0.0
    adam_lr: float = 1e-5
    """Learning rate of the AdamW part."""


OptimSection = AdamWSection | AdafactorSection | LionSection | MuonSection


@dataclass(frozen=True, kw_only=True)
class MeshSection:
    """Devices per axis; one of them may be -1 (all that remain)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    seq: int = 1
    expert: int = 1


@dataclass(frozen=True, kw_only=True)
class GuardSection:
    """What happens when a step goes wrong."""

    on_nonfinite: Literal["skip", "stop"] = "skip"
    """Skip the update and count it, or stop at once."""
    max_skips: int = 10
    """Consecutive skipped updates after which the run stops with a sentence."""
    spike_factor: float | None = None
    """Skip a step whose gradient norm exceeds this many times its running mean."""


@dataclass(frozen=True, kw_only=True)
class SampleSection:
    """Answers printed and saved at evaluation."""

    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.0
    tensor: int | None = None
    """Devices that split each layer while sampling; the others hold copies, and a copy of the weights is moved there.
    None: the mesh of training, its weights by reference."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The supervised loop."""

    steps: int | None = None
    """Optimiser steps; None: by `epochs`."""
    epochs: float = 1.0
    batch_size: int = 8
    """Packed rows per optimiser step, over all devices."""
    microbatches: int = 1
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    eval_batches: int | None = None
    """Batches per evaluation; None: all."""
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1
    samples: SampleSection = SampleSection()
    guard: GuardSection = GuardSection()


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run lives and who hears of it."""

    dir: str = "runs/{name}"
    name: str = "sft"
    seed: int = 0
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Beside the console and metrics.jsonl, which are always written."""
    export: bool = True
    """Write a Hugging Face folder (or PEFT folder for LoRA) at the end."""
    resume: Literal["auto", "never", "must"] = "auto"
    allow_changed_config: bool = False
    """Resume although the configuration differs from the checkpoint's."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """`method: sft`: supervised fine-tuning."""

    method: Literal["sft"] = "sft"
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    loss: LossSection = CrossEntropySection()
    adapter: AdapterSection = FullSection()
    optim: OptimSection = AdamWSection()
    mesh: MeshSection = MeshSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
