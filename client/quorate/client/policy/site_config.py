"""The site's own files, which the coordinator never sees: `site.yaml`, and `connection.yaml` from the kit."""

from __future__ import annotations

from typing import Annotated, Self, get_args

from pydantic import Field, StringConstraints, field_validator, model_validator

from quorate.shared.aggregation import RULES
from quorate.shared.config.config_model import ConfigModel, Name, Sha256
from quorate.shared.config.sites_config import SourceConfig

UserName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]


class ConnectionConfig(ConfigModel):
    """`connection.yaml`: where the server is; comes with the start-up kit and is not edited."""

    federation: Name
    """Name of the federation."""
    site: Name
    """Name of this site, which its node key is registered under."""
    server: str = Field(pattern=r"^[A-Za-z0-9.\[\]:-]+:[0-9]{1,5}$")
    """HOST:PORT of the server's public port."""
    mutual_tls: bool = False
    """Whether the server asks for a client certificate."""


class BaseModelAtSite(ConfigModel):
    """A base model that this site holds and allows."""

    path: str = Field(min_length=1)
    """Folder of the model, or `package:NAME/FOLDER`; relative paths start at site.yaml's folder."""
    sha256: Sha256
    """Its content hash, as in the run file (`model.sha256`); verified when it is loaded."""


class PrivacyBudget(ConfigModel):
    """The most that all private runs together may ever spend on one data set."""

    data: Name
    """Data alias. Aliases whose sources are the same, or lie in one another, share what is spent."""
    group: str | None = None
    """Column that says whose row it is, for runs with `privacy.unit: group`; left out: a budget by record."""
    max_epsilon: float = Field(gt=0)
    """Highest epsilon [nats] of all that was ever spent, composed by privacy loss distributions."""
    delta: float = Field(gt=0, lt=1)
    """Delta at which that epsilon is computed; well below 1 / units."""
    also: tuple[str, ...] = ()
    """Further sources, written as in `data`, where the same units lie or lay: copies, extracts, former
    places. What the ledger has of them counts too."""


class PolicyConfig(ConfigModel):
    """What this site allows. A request outside it is refused before any data are read."""

    tasks: tuple[str, ...] | None = None
    """Allowed tasks by name, such as `sequence_classification`; all when left out."""
    data: tuple[Name, ...] | None = None
    """Data aliases that runs may use; all of `data` when left out."""
    max_rank: int = Field(64, ge=1)
    """Highest rank of an adapter."""
    aggregation: tuple[str, ...] | None = None
    """Allowed aggregation rules by name, such as `fedavg`; all when left out. `fedex` changes the weights of
    the base model at this site while a run lasts, within the next two limits."""
    max_residual_rank: int | None = Field(None, ge=1)
    """Highest rank of what such a rule may add to the weight of a layer; the layer's own when left out."""
    max_base_change: float | None = Field(0.5, gt=0)
    """Most that such a rule may change the weight of a layer, as a Frobenius norm over that of the weight;
    no limit when null."""
    modules_to_save: tuple[str, ...] = ()
    """Parts of the base model that a run may train whole, by the names that run files use
    (`adapter.modules_to_save`). The task's own head needs no entry. What is trained whole can hold far more
    of the rows than factors of a low rank."""
    max_head_units: int = Field(1024, ge=0)
    """Most units in the hidden layers of a head (`adapter.head`), all layers together; 0 allows none."""
    min_rows: int = Field(1, ge=1)
    """Fewest training rows of a data set that may be trained on."""
    head_statistics: bool = True
    """Whether runs may ask for sums over the rows' features and labels, from which a head is solved before
    round 1 (`adapter.head.init: analytic`)."""
    min_rows_for_statistics: int | None = Field(None, ge=1)
    """Fewest rows that such sums may be over; left out: one more than the model has features, as the sums
    over fewer give the space away that the rows lie in."""
    approve_each_run: bool = False
    """A person must approve each run (`quorate site approve RUN_ID`) before it may use data."""
    max_rounds: int | None = Field(1000, ge=1)
    """Most rounds of a run; null sets no limit, here and in the limits that follow."""
    max_steps_per_round: int | None = Field(10_000, ge=1)
    """Most forward and backward passes of one round here, as `training.max_steps` says or as epochs over this
    site's rows make. An optimiser step is `training.gradient_accumulation_steps` of them."""
    max_rows_per_round: int | None = Field(10_000_000, ge=1)
    """Most rows that those passes of one round go over, a row counted each time."""
    max_minutes_per_round: float | None = Field(120, gt=0)
    """Longest that one round may be worked on; training ends at the step that passes it."""
    max_minutes_per_day: float | None = Field(720, gt=0)
    """Longest that all runs together may be worked on in any 24 hours."""
    max_runs_per_day: int | None = Field(50, ge=1)
    """Most runs that may begin here in any 24 hours."""
    require_privacy: bool = False
    """Refuse every run without record- or group-level privacy, that is, without noise added at this site."""
    answer_grid_seconds: float = Field(0.0, ge=0, le=3600)
    """Let answers leave only at whole multiples of so many seconds after their request came, so that how long
    the rows took tells less; 0 lets them leave at once. Each answer takes up to so much longer."""
    privacy_budgets: tuple[PrivacyBudget, ...] = ()
    """Budgets by data set and unit. A data set with a budget is closed to runs without record- or group-level
    privacy, and to units without a budget; one without any is spent from without a limit."""

    @field_validator("aggregation")
    @classmethod
    def _rules_exist(cls, rules: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = [str(get_args(rule.model_fields["name"].annotation)[0]) for rule in RULES]
        if unknown := [rule for rule in rules or () if rule not in known]:
            raise ValueError(f"there is no rule {', '.join(unknown)}; choose from {', '.join(known)}")
        return rules

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tasks is None:
            return None
        from quorate.shared.tasks import TASKS  # torch, which other commands of a site need not wait for

        known = [str(get_args(task.model_fields["name"].annotation)[0]) for task in TASKS]
        if unknown := [task for task in tasks if task not in known]:
            raise ValueError(f"there is no task {', '.join(unknown)}; choose from {', '.join(known)}")
        return tasks


class UsersConfig(ConfigModel):
    """Operating-system users, so that what Flower runs cannot read the data; needs root to start."""

    site: UserName
    """Runs the site process: may read the data and the models."""
    supernode: UserName
    """Runs the SuperNode and what it starts: may read its own key, and talk to the socket."""


class SiteConfig(ConfigModel):
    """`site.yaml`: data, models, device and rules of one site."""

    data: dict[Name, SourceConfig] = Field(min_length=1)
    """Data alias of run files -> where this site's rows come from."""
    models: tuple[BaseModelAtSite, ...] = ()
    """Base models that runs may use, by content hash. A model that is not listed is refused."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: the first visible GPU, else the CPU."""
    policy: PolicyConfig = PolicyConfig()
    """What this site allows."""
    users: UsersConfig | None = None
    """Run site process and SuperNode as two operating-system users."""
    state: str = "state"
    """Folder for what the processes write: socket, stored answers, logs, received adapters; relative paths
    start at site.yaml's folder."""
    anchor: str = Field("anchor", min_length=1)
    """Folder in which heads of the privacy ledger are kept (`ledger.head`): away from `state`, best where
    whoever can write there cannot write here; relative paths start at site.yaml's folder. It must be there,
    unless it is the default."""

    @model_validator(mode="after")
    def _policy_names_data(self) -> Self:
        """Hold `policy.data` and the budgets against `data`."""
        if unknown := [alias for alias in self.policy.data or () if alias not in self.data]:
            raise ValueError(
                f"policy.data names {', '.join(unknown)}, which `data` has not; it has {', '.join(self.data)}"
            )
        seen = set[tuple[str, str | None]]()
        for index, budget in enumerate(self.policy.privacy_budgets):
            where = f"policy.privacy_budgets[{index}]"
            source = self.data.get(budget.data)
            if source is None:
                message = f"{where} names {budget.data}, which `data` has not; it has {', '.join(self.data)}"
                raise ValueError(message)
            if budget.group is not None and source.columns.get("group") != budget.group:
                raise ValueError(
                    f"{where} names the group column {budget.group!r}; map it in data.{budget.data} "
                    f"(columns: {{group: {budget.group}}}), or correct one of the two"
                )
            if (budget.data, budget.group) in seen:
                raise ValueError(f"{where} is a second budget for the same data and unit; keep one")
            seen.add((budget.data, budget.group))
        return self
