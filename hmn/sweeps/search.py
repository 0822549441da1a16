"""``sweep.py search``: Optuna proposes values of any settings and judges them by the held-out accuracy of their runs.

``python sweep.py search study=NAME trials=30 batch=2 KEY=VALUE ... KEY=choice(A,B) KEY=tag(log,interval(LOW,HIGH))``

The space is written in Hydra's override grammar: ``choice(...)`` or ``A,B``, ``range(...)`` of integers,
``interval(...)`` or, for integers, ``int(interval(...))``. ``tag(log, ...)`` makes a numeric scale logarithmic.

A study is a journal of plain JSON lines in ``runs/studies/NAME``. A trial is written there as a whole before its run
starts and closed once its run has ended. The same command therefore continues after a kill at any time, with the same
runs. A run that fails after its retries is a failed trial, which is counted and not tried again.

Trials are proposed in batches of ``batch``, each from all earlier batches by a sampler that is seeded with the trial's
number. An interrupted study therefore proposes the same trials as an uninterrupted one, given the same version of
Optuna, the same batch size and runs that are reproducible, as they are bit for bit on a CPU. If the runs are not
reproducible, the first ten trials, which are random, are still the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from hmn import results
from hmn.config import require
from hmn.config.overrides import section_of
from hmn.errors import ArtifactError, ConfigError, HmnError
from hmn.explain import explain
from hmn.files import exclusive, write_json
from hmn.plan import Plan, make_plan
from hmn.report import text_table
from hmn.sweeps import state
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import compose, plan_cells
from hmn.sweeps.sweep import OWN, Sweep, launch, of_arguments

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

JOURNAL = "journal.jsonl"
ASKED = "study.json"
NAME = r"a name of letters, digits, _ and -"
SHOWN_TRIALS = 5
TRIALS_FOR_IMPORTANCE = 10


@dataclass(frozen=True, kw_only=True)
class Search:
    name: str
    trials: int  # to end, measured or failed, over all calls
    batch: int  # trials that run at the same time
    fixed: dict[str, str]  # overrides by key
    space: dict[str, BaseDistribution]  # distributions by key
    sweep: Sweep  # a template without cells, from which each batch is launched

    @property
    def folder(self) -> Path:
        return self.sweep.runs_dir / "studies" / self.name

    def overrides(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The overrides of ``run.py`` for a point of the space."""
        return (*self.fixed.values(), *(f"{key}={value}" for key, value in values.items()))


def search(arguments: Sequence[str]) -> int:
    """Run the study up to its number of trials and print the results; the exit code is 1 if no trial was measured.

    Raises ``ConfigError`` before anything runs if the settings cannot be searched or differ from those of the study.
    """
    given = asked(arguments)
    given.sweep.check_device()
    with exclusive(given.folder, what="this study"):
        _same_as_before(given)
        study = _open(given.folder)
        _refuse_mixtures(given, study)
        ended = _run(given, study)
        print(report(given, study))
        return int(not ended or not _measured(study))


def asked(arguments: Sequence[str]) -> Search:
    """The search for the arguments after ``sweep.py search``, checked as far as possible without running anything."""
    _require_optuna()
    own = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    name, trials, batch = own.get("study", ""), own.get("trials", ""), own.get("batch", "1")
    require("study", re.fullmatch(r"\w[\w-]*", name, re.ASCII) is not None, name or "null", NAME)
    for key, value in (("trials", trials), ("batch", batch)):
        require(key, value.isdecimal() and int(value) >= 1, value or "null", "at least 1")
    rest = [argument for argument in arguments if argument.partition("=")[0] not in ("study", "trials", "batch")]
    of_sweep = [argument for argument in rest if section_of(argument) in OWN]
    fixed, space = _parse([argument for argument in rest if argument not in of_sweep])
    command = shlex.join(["python", "sweep.py", "search", *arguments])
    sweep = dataclasses.replace(of_arguments([*fixed.values(), *of_sweep], command), name=f"study-{name}")
    found = Search(name=name, trials=int(trials), batch=int(batch), fixed=fixed, space=space, sweep=sweep)
    _plan(found.overrides({key: _inner(one) for key, one in space.items()}))
    return found


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, BaseDistribution]]:
    fixed: dict[str, str] = {}
    space: dict[str, BaseDistribution] = {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        require(key, key not in fixed and key not in space, override.get_value_string(), "given once")
        if override.is_sweep_override():
            space[key] = distribution(override)
        else:
            fixed[key] = override.input_line
    if not space:
        raise ConfigError("nothing to search: write a setting as choice(A,B), range(LOW,END) or interval(LOW,HIGH)")
    return fixed, space


def distribution(override: Override) -> BaseDistribution:
    """Optuna's distribution for the values of a setting. Choices are strings, as written in overrides.

    As in Hydra, a range excludes its end. Raises ``ConfigError`` for syntax that has no meaning in a search.
    """
    from optuna import distributions

    key, sweep, line = override.get_key_element(), override.value(), override.input_line
    value = line.partition("=")[2]
    tags, log = getattr(sweep, "tags", set()), "log" in getattr(sweep, "tags", set())
    scaled = isinstance(sweep, RangeSweep | IntervalSweep)
    require(key, not tags - ({"log"} if scaled else set()), value, "without tags except tag(log, ...) of numbers")
    require(key, not getattr(sweep, "shuffle", False), value, "without shuffle, which changes nothing in a search")
    try:
        if isinstance(sweep, ChoiceSweep):
            choices = list(override.sweep_string_iterator())
            require(key, len(set(choices)) == len(choices), value, "different values")
            return distributions.CategoricalDistribution(choices)
        if isinstance(sweep, RangeSweep):
            numbers = sweep.range()
            require(key, isinstance(numbers, range), value, "choice(...) or interval(...): steps of fractions round")
            require(key, len(numbers) > 0, value, "a range with a value in it")
            return distributions.IntDistribution(min(numbers), max(numbers), log=log, step=abs(numbers.step))
        if isinstance(sweep, IntervalSweep):
            whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            return kind(sweep.start, sweep.end, log=log)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from None
    raise ConfigError(f"{key}={value}: must be written out as choice(...)")


def _inner(one: BaseDistribution) -> Any:
    """A value of the distribution; for floats, one inside the interval."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(one, CategoricalDistribution):
        return one.choices[0]
    return one.low if isinstance(one, IntDistribution) else one.low + (one.high - one.low) / 3


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise HmnError("sweep.py search needs Optuna: pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# The study


def _same_as_before(given: Search) -> None:
    """Store the settings and space of a new study, or refuse those that differ from the stored ones."""
    from optuna.distributions import distribution_to_json

    path = given.folder / ASKED
    fixed = {key: line.partition("=")[2] for key, line in given.fixed.items()}
    now = fixed | {key: json.loads(distribution_to_json(one)) for key, one in given.space.items()}
    if not path.exists():
        write_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            was, wanted = (_shown(key, values.get(key)) for values in (before, now))
            raise ConfigError(f"study={given.name} was started with {was}, not {wanted}: use that, or another name")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return f"no {key}"
    if isinstance(value, dict):
        value = f"{value['name']}({', '.join(f'{name}={one}' for name, one in value['attributes'].items())})"
    return f"{key}={value}"


def _open(folder: Path) -> optuna.Study:
    """Load the study from its journal, however the last search ended, or create it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    _drop_cut_line(path)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Held()))
        begin = optuna.load_study if storage.get_all_studies() else partial(optuna.create_study, direction="maximize")
        return begin(storage=storage, study_name="hmn")
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: not a journal of Optuna ({error}): move the study away to start anew") from error


class _Held:  # as optuna.storages.journal.BaseJournalFileLock, which is not public
    """Replaces Optuna's lock file, which a kill would leave behind: the study's folder is locked already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _drop_cut_line(path: Path) -> None:
    """Remove an incomplete last line, left by a kill or a full disk: its trial did not start yet or is closed again."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))


def propose(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Values for the next trial of ``study``, which is not modified."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        # The constant liar counts running trials as bad, which keeps simultaneous trials apart.
        sampler = optuna.samplers.TPESampler(seed=len(trials), constant_liar=True)
    copy = optuna.create_study(sampler=sampler, direction="maximize")
    copy.add_trials(trials)
    return copy.ask(dict(sorted(space.items()))).params


def _ask(given: Search, study: optuna.Study) -> None:
    """Add a trial as one line of the journal: ``study.ask`` would write one line for each value."""
    from optuna.trial import TrialState, create_trial

    values = propose(study, given.space)
    status, known = TrialState.RUNNING, {}
    overrides = given.overrides(values)
    try:
        known["run_id"] = _plan(overrides).run_id
    except Exception as error:  # not every combination of values is valid
        line, _ = explain(error, overrides)
        if line is None:
            raise
        status, known["error"] = TrialState.FAIL, line
        print(f"trial {len(study.get_trials(deepcopy=False))} cannot run: {line}")
    study.add_trial(create_trial(state=status, params=values, distributions=given.space, user_attrs=known))


def _running(study: optuna.Study) -> list[FrozenTrial]:
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def _measured(study: optuna.Study) -> list[FrozenTrial]:
    """Completed trials, best first and oldest first among equals."""
    import optuna

    found = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return sorted(found, key=lambda trial: -trial.value)


# Its runs


def _run(given: Search, study: optuna.Study) -> bool:
    """Run all trials; returns false if a run was stopped, or failed and ``sweep.on_failure=stop``."""
    while True:
        count = len(study.get_trials(deepcopy=False))
        # An incomplete batch is filled up first, so that later batches are the same as without an interruption.
        while count < given.trials and (count % given.batch or not _running(study)):
            _ask(given, study)
            count += 1
        batch = _running(study)
        if not batch:
            return True
        if _measure(given, study, batch):
            return False


def _measure(given: Search, study: optuna.Study, batch: Sequence[FrozenTrial]) -> bool:
    """Make the runs of a batch of trials and close the trials whose runs ended; returns whether to stop the search.

    It stops if a run was stopped, or if one failed and ``sweep.on_failure=stop``.
    """
    from optuna.trial import TrialState

    cells = [_cell(given, trial) for trial in batch]
    launch(dataclasses.replace(given.sweep, cells=tuple(cells)))
    failed = open_ends = False
    for trial, planned in zip(batch, plan_cells(cells), strict=True):
        found = state.read(planned.folder)
        value = results.held_out_accuracy(found.result) if found.result else None
        if value is not None:
            study.tell(trial.number, value)
        elif found.status in ("interrupted", "waiting", "running"):
            # It was stopped, it never began, or it is made by another sweep, for which this one no longer waits.
            open_ends = True
        else:
            failed = True
            print(f"{planned.cell.name} failed: {found.error or 'it left no held-out accuracy'}")
            study.tell(trial.number, state=TrialState.FAIL)
    return open_ends or (failed and given.sweep.settings.on_failure == "stop")


def _cell(given: Search, trial: FrozenTrial) -> Cell:
    labels = {"trial": str(trial.number), **{key: str(value) for key, value in trial.params.items()}}
    return Cell(f"trial {trial.number}", labels, given.overrides(trial.params))


def _plan(overrides: tuple[str, ...]) -> Plan:
    plan = make_plan(compose(overrides), typed=overrides, here=False)
    require("mode", plan.config.condenses, plan.config.mode, "run, with a container that is condensed")
    points = plan.config.evaluation.curve_points
    require("evaluation.curve_points", points >= 2, points, "at least 2: a search selects by held-out accuracy")
    return plan


def _folder(given: Search, trial: FrozenTrial) -> Path:
    return given.sweep.runs_dir / trial.user_attrs["run_id"]


def _refuse_mixtures(given: Search, study: optuna.Study) -> None:
    """Refuse or keep trials of other code versions: a study cannot measure them again."""
    choice = given.sweep.settings.other_code
    require("sweep.other_code", choice != "repeat", choice, "refuse or keep: later proposals depend on earlier results")
    begun = [one for one in study.get_trials(deepcopy=False) if "run_id" in one.user_attrs]
    codes = [results.code_of(found.result) for one in begun if (found := state.read(_folder(given, one))).result]
    others = [code for code in codes if code != results.code_version()]
    if others and choice == "refuse":
        named = ", ".join(sorted(set(others)))
        raise ConfigError(
            f"study={given.name}: trials are from other code versions ({len(others)} from {named}, "
            f"now {results.code_version()}): sweep.other_code=keep continues with them, another name starts a new study"
        )


# What it found


def report(given: Search, study: optuna.Study) -> str:
    """The best trials with their runs, the command of the best one, and the importance of each setting."""
    trials, best = study.get_trials(deepcopy=False), _measured(study)
    ended = sum(trial.state.is_finished() for trial in trials)
    head = f"study {given.name}: {ended} of {given.trials} trials, {ended - len(best)} of them failed"
    if not best:
        return head
    rows = [
        [str(one.number), f"{100 * one.value:.2f}", *(_number(one.params[key]) for key in given.space)]
        + [_folder(given, one).name]
        for one in best[:SHOWN_TRIALS]
    ]
    table = text_table(["trial", "held-out accuracy %", *given.space, "run"], rows)
    command = shlex.join(["python", "run.py", *given.overrides(best[0].params)])
    return "\n".join([head, "", table, "", f"best: {command}", *_importances(study, len(best))])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _importances(study: optuna.Study, measured: int) -> list[str]:
    from optuna import importance

    if measured < TRIALS_FOR_IMPORTANCE or len({one.value for one in _measured(study)}) == 1:
        return []
    evaluator = importance.FanovaImportanceEvaluator(seed=0)  # Hutter et al., ICML 2014
    found = importance.get_param_importances(study, evaluator=evaluator)
    rows = [[key, f"{share:.2f}"] for key, share in found.items()]
    return ["", text_table(["setting", "share of the variance (fANOVA)"], rows)]
