"""The run file: everything that shapes a run, and nothing about anyone's disk.

Field names are Hugging Face's where Hugging Face has a name for the thing. A site receives this same
configuration with every request, so it must never hold paths of data, secrets or code.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from quorate.shared.adapters.patterns import MOST, check_regular
from quorate.shared.aggregation import AggregationRule, FedAvg
from quorate.shared.config.config_model import LIST, ONE, ONE_OR_LIST, ConfigModel, Name, Sha256
from quorate.shared.config.evaluation_config import EvaluationConfig
from quorate.shared.config.privacy_config import ClientPrivacy, PrivacyConfig
from quorate.shared.config.privacy_rules import check_privacy_rules
from quorate.shared.tasks import TaskConfig

Pattern = Annotated[str, StringConstraints(min_length=1), AfterValidator(check_regular)]
"""Names arrays of the adapter, see `quorate.shared.adapters.selection`."""


class ModelConfig(ConfigModel):
    """The frozen base model. Weights are safetensors; remote code is never run."""

    model_name_or_path: str = Field(min_length=1)
    """A folder, a hub id, or `package:NAME/FOLDER` for a resource inside an installed package.
    `${VARIABLE}` is replaced from the environment."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; ignored for folders and packages."""
    sha256: Sha256 | None = None
    """SHA-256 of `model.safetensors` (for several files: of the sorted lines `sha256  name`). Checked when
    given; written into the resolved run file otherwise."""
    pad_token: str | None = None
    """Token to pad with when the tokenizer has none, for instance its end-of-text token."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (NF4); needs an NVIDIA GPU and `pip install 'quorate[quant]'`."""
    load_in_8bit: bool = False
    """Hold the frozen base in 8 bits; needs the same."""

    @property
    def quantised(self) -> bool:
        """Whether the base is held in fewer bits than it was stored in."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _one_number_of_bits(self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; keep one")
        return self


class HeadConfig(ConfigModel):
    """The layers between a row's features and what is said of it, and what they start from."""

    init: Literal["random", "analytic"] = "random"
    """What the head starts from: random numbers, or, for a head of one linear layer, the least-squares
    solution over all sites' rows on the frozen model's features. For that sites send sums over their rows
    once, before round 1."""
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Width of each hidden layer; left out: the model's own single layer."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """After each hidden layer."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """After each activation, in training; drawn from a generator per site."""

    @model_validator(mode="after")
    def _fits_its_layers(self) -> Self:
        if self.hidden_sizes and self.init == "analytic":
            raise ValueError(
                "init analytic solves one linear layer; leave hidden_sizes out, or choose init: random"
            )
        if not self.hidden_sizes and (self.dropout or self.activation != "gelu"):
            raise ValueError(
                "activation and dropout follow hidden layers; give hidden_sizes, or leave them out"
            )
        return self


class AdapterConfig(ConfigModel):
    """The LoRA adapter, in PEFT's own words."""

    r: int = Field(8, ge=1, le=1024)
    """Rank of the factors."""
    lora_alpha: float = Field(16, gt=0)
    """Scaling numerator: the update is lora_alpha / r * B A (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input, drawn from a generator per site."""
    target_modules: Annotated[Annotated[tuple[str, ...], LIST] | Annotated[str, ONE], ONE_OR_LIST] | None = (
        None
    )
    """Module name endings, or one regular expression; PEFT's default for the architecture when left out."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained whole besides the task's head, such as a pooler that the base model's files lack."""
    head: HeadConfig | None = None
    """The task's head: of several layers, or with a start that is solved; it is trained whole."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353); refused with rules that need plain B A products."""

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, targets: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if targets is not None and not targets:
            raise ValueError("names no module; name some, or leave the field out for PEFT's default")
        if isinstance(targets, str):
            try:
                check_regular(targets)
            except ValueError as error:
                message = f"{error}; mend it, or write name endings as a list: [query, value]"
                raise ValueError(message) from error
        return targets


class TrainingConfig(ConfigModel):
    """How a site trains in one round, in the words of Hugging Face's TrainingArguments."""

    learning_rate: float = Field(2e-3, gt=0, le=1e6)
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    """Schedule over all rounds of the run, not over one. Each begins with the warmup, if one is asked for."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of all steps of the run in which the learning rate rises linearly from 0."""
    warmup_steps: float = Field(0.0, ge=0)
    """The same as a number of steps of the run; below 1 a share of them, as in transformers 5."""
    optim: Literal["adamw_torch", "adamw_bnb_8bit", "adafactor", "sgd"] = "adamw_torch"
    """Local optimiser; its state starts afresh each round, as a site keeps nothing between rounds.
    adamw_bnb_8bit needs a CUDA device and `quorate[quant]`."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW, Adafactor) or L2 term (SGD); biases are not decayed."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """Order of a site's rows: reshuffled epochs, or every label of the site equally often."""
    examples_per_class: int | None = Field(None, ge=1)
    """Train on so many rows of each label of a site, drawn by the seed (without labels: so many rows)."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip each site's gradient to this global L2 norm; 0 leaves it unclipped. Under record- or group-level
    privacy `privacy.max_grad_norm` takes its place."""
    freeze: tuple[Pattern, ...] = Field((), max_length=MOST)
    """Adapter arrays, or modules with adapters, that stay at their start and never travel: endings of names
    (`query`, `classifier`, `lora_A`), or regular expressions that match a whole name."""
    freeze_layers: int = Field(0, ge=0)
    """Adapters of the first so many layers of the base model stay at their start; found as by PEFT's
    layers_to_transform."""
    learning_rates: dict[Pattern, Annotated[float, Field(gt=0)]] = Field({}, max_length=MOST)
    """Pattern, as in `freeze` -> factor on the learning rate; factors of several are multiplied."""
    layer_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate per layer below the last one: lower layers learn more slowly."""
    per_device_train_batch_size: int = Field(16, ge=1, le=2**16)
    """Rows of one site in one forward pass."""
    per_device_eval_batch_size: int = Field(32, ge=1, le=2**16)
    """Rows in one forward pass of an evaluation."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16)
    """Forward passes per optimiser step."""
    max_steps: int | None = Field(None, ge=1, le=10**9)
    """Optimiser steps of each site in ONE round; takes the place of num_train_epochs."""
    num_train_epochs: int = Field(1, ge=1, le=10**9)
    """Passes over the site's rows in ONE round, when max_steps is left out."""
    bf16: bool = False
    """Run the forward pass under bfloat16 autocast; adapters and optimisers stay float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the base's layers and compute the rest again in the backward pass: less memory,
    about a third more time, the same gradients."""
    base_dropout: bool = False
    """Use the base model's own dropout. Sites stacked in one pass then no longer equal sites alone."""
    max_stack: int = Field(8, ge=1)
    """How many sites at most share one forward pass in simulation."""

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingConfig:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps both say how long the warmup is; keep one")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is neither a whole number of steps nor a share below 1"
            )
        return self


class RoundsConfig(ConfigModel):
    """Rounds, cohort and quorum."""

    rounds: int = Field(ge=1, le=10**6)
    """Number of rounds."""
    sites_per_round: int | None = Field(None, ge=1)
    """Sites asked in a round, drawn by seed; all of them when left out."""
    quorum: int = Field(1, ge=1)
    """A round needs at least this many good updates, else the run stops with exit code 3."""
    timeout_seconds: float = Field(3600, gt=0)
    """Longest wait for replies, in joining, training, evaluation and delivery alike."""
    grace_seconds: float = Field(60, ge=0)
    """How long to wait for the rest once the quorum has replied. Afterwards a site that is still silent is
    known to be away: it is asked again, and not waited for until it answers. In an exchange that the round
    can do without (evaluation, the local reference, delivery) a site that is heard of otherwise is away only
    after it missed two."""
    reask_seconds: float = Field(300, ge=0)
    """How long a site that cannot be reached is waited for, and asked again; more than a restart takes."""
    approval_seconds: float = Field(3600, ge=0)
    """How long sites whose people must approve the run first are waited for, before round 1; then it goes on
    with the others, or ends where they are fewer than the quorum."""
    max_update_norm: float | None = Field(None, gt=0)
    """Set aside an update that moved further than this L2 norm [parameter units]."""
    max_norm_ratio: float | None = Field(10.0, gt=1)
    """Set aside an update that moved more than so many times as far as the median of the round's updates;
    null for none. A site that by its rows takes more steps than others may move so much further, 100 times at
    most. Not with client-level privacy, which clips updates."""
    max_weight_share: float | None = Field(0.5, gt=0, le=1)
    """Largest share of a round's weight that one site may have, of two sites 0.9 at least; null for none."""


class RunConfig(ConfigModel):
    """One run. The same file, byte for byte, in simulation and in production."""

    name: Name
    """Name of the run, used in reports."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The one seed; every random choice derives from it."""
    task: TaskConfig
    """What is learnt: the task, its labels and its options."""
    data: Name
    """Alias of the data; every site says for itself what it stands for."""
    model: ModelConfig
    """The frozen base model."""
    adapter: AdapterConfig = AdapterConfig()
    """The LoRA adapter."""
    training: TrainingConfig = TrainingConfig()
    """Training at the sites."""
    federation: RoundsConfig
    """Rounds, cohort and quorum."""
    aggregation: AggregationRule = FedAvg()
    """How updates become the next global adapter."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Metrics, the best round and reference runs."""
    privacy: PrivacyConfig | None = None
    """Differential privacy; none when left out."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints kept in output_dir; the best round's is kept besides."""
    report_to: tuple[Literal["tensorboard"], ...] = ()
    """Trackers to write to besides the run's own files."""

    @property
    def private_clients(self) -> bool:
        """Whether the server adds noise that hides whole sites."""
        return isinstance(self.privacy, ClientPrivacy)

    @property
    def hides_participation(self) -> bool:
        """Whether nobody but the coordinator may know which sites were drawn in which round."""
        return isinstance(self.privacy, ClientPrivacy) and self.privacy.participation_hidden

    @property
    def solves_head(self) -> bool:
        """Whether the head starts from sums that the sites send before round 1."""
        return self.adapter.head is not None and self.adapter.head.init == "analytic"

    @property
    def picks_best(self) -> bool:
        """Whether validation rows pick the round that is kept; else it is the last.

        Under client-level privacy they do not: they are a site's data too, and no noise hides which round
        they would choose.
        """
        return self.evaluation.share_outcomes and not self.private_clients

    def measures_after(self, round: int) -> bool:
        """Whether sites are asked to measure the model after `round` on their validation rows."""
        due = round % self.evaluation.every == 0 or round == self.federation.rounds
        return self.evaluation.share_outcomes and due

    @property
    def metric(self) -> str:
        """The metric that picks the best round."""
        return self.evaluation.metric_for_best_model or self.task.default_metric

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        """Hold the parts against one another; each of them was checked by itself before."""
        self.aggregation.check_compatible(use_dora=self.adapter.use_dora)
        if self.model.quantised and self.aggregation.changes_base:
            raise ValueError(
                f"aggregation {self.aggregation.name} adds to the base weights, which a quantised base "
                "cannot take exactly; choose fedavg or leave model.load_in_4bit and load_in_8bit out"
            )
        if self.aggregation.weighting == "tokens" and not self.task.counts_tokens:
            raise ValueError(
                f"aggregation.weighting tokens: task {self.task.name} trains rows and counts no tokens; "
                "choose examples or uniform"
            )
        metric, known = self.evaluation.metric_for_best_model, self.task.metrics_for_best_model
        if metric is not None and metric not in known:
            raise ValueError(
                f"evaluation.metric_for_best_model {metric!r} cannot pick the best round of this task; "
                f"choose one of {', '.join(known)}"
            )
        if self.training.sampling == "balanced" and not self.task.labels_each_row:
            raise ValueError(
                f"training.sampling balanced needs rows with labels, which {self.task.name} has not; "
                "use sampling: shuffle"
            )
        check_privacy_rules(self)
        if self.solves_head:
            _check_head_can_be_solved(self)
        asked = self.federation.sites_per_round
        if asked is not None and self.federation.quorum > asked:
            raise ValueError(
                f"federation.quorum {self.federation.quorum} is above federation.sites_per_round {asked}; "
                "lower the quorum or ask more sites"
            )
        return self


def _check_head_can_be_solved(run: RunConfig) -> None:
    if run.task.least_squares(()) is None:
        raise ValueError(
            f"adapter.head.init analytic: task {run.task.name} has no head that least squares solves; "
            "choose init: random"
        )
    if run.privacy is not None:
        raise ValueError(
            "adapter.head.init analytic has sites send exact sums over their rows, which no privacy "
            "covers; choose init: random, or leave privacy out"
        )
