"""The k-shot table on real CT: `make benchmark BENCHMARK=kshot`, or this script with options.

Draws support sets from the `support` split, trains an adapter on each support set by every method, and scores the
adapter on `test`, on the lattices of the scans. `--on support` scores on the other scans of `support` instead; use this
option for choosing settings.

Every result is a line of OUTPUT/results.jsonl, which is written at once; existing results are not computed again.
Several runs may write to one folder. `--report` prints the table and draws the plot of the existing results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import headneck
import numpy as np
import torch
from bench import Bench
from finetuning import RATES, fine_tune
from kshot_report import markdown, plot, tuning_markdown

from fseft_edge.adaptation.adapt import describe, zero_shot_adapter
from fseft_edge.adaptation.cross_validation import OrganScores
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import expected_range, move_thresholds
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adaptation.transduction import TransductionSettings, support_of, transduce
from fseft_edge.adapters.file import AdapterFile, read_adapter, write_adapter
from fseft_edge.adapters.network import AdapterSettings, Levels, Method
from fseft_edge.finetuning.finetune import describe_tuning, load_tuning_support
from fseft_edge.finetuning.merging import merge
from fseft_edge.finetuning.settings import TUNING_METHODS, Decoder, TuningSettings
from fseft_edge.finetuning.tuning_file import write_tuning
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.feature_store import FeatureStore, open_store
from fseft_edge.runtime.encoder.session import open_session, resolve_device
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.system.progress import SilentProgress

LEVELS: tuple[Levels, ...] = ("finest", "all")
ADAPTERS = {
    settings.name: settings
    for method in get_args(Method)
    for levels in LEVELS
    for settings in [AdapterSettings(method, levels)]
}
TRANSDUCED = " + transduction"
FOLLOWING_SIZE = " + size"
"""Added to an adapter: the thresholds of all organs follow their sizes, without asking a cross-validation."""
_ADDITIONS = (TRANSDUCED, FOLLOWING_SIZE)
DECODERS: tuple[Decoder, ...] = ("frozen", "tuned")
TUNINGS = {
    settings.name: settings
    for method in TUNING_METHODS
    for decoder in DECODERS
    for levels in LEVELS
    if (method, decoder) != ("decoder", "frozen")
    for settings in [TuningSettings(method, decoder, levels)]
}
METHODS = (
    "zero-shot",
    *ADAPTERS,
    *(name + addition for addition in _ADDITIONS for name in ADAPTERS),
    *RATES,
    *TUNINGS,
)
DEFAULT = (
    "zero-shot",
    "linear on the finest level",
    "linear on all levels",
    "pointwise on all levels",
    "spatial on the finest level",
    "spatial on all levels",
)


@dataclass(frozen=True)
class Run:
    """The key of a result: a method, a support set and a seed.

    Attributes:
        repeat: number of the seed, from 0; the seed of the training is ``draw + 10 * repeat``.
    """

    method: str
    shots: int
    draw: int
    repeat: int
    on: str
    folder: Path
    model: Path | None
    device: torch.device

    @property
    def name(self) -> str:
        """Text for file names."""
        return f"{self.method.replace(' ', '_')}-{self.shots}-{self.draw}{self.suffix}"

    @property
    def suffix(self) -> str:
        """Text for file names of further seeds."""
        return f"-{self.repeat}" if self.repeat else ""

    @property
    def seed(self) -> int:
        """Seed of the training."""
        return self.draw + 10 * self.repeat

    @property
    def support(self) -> list[str]:
        """Names of the cases of the support set."""
        return headneck.draw_support(self.shots, self.draw) if self.shots else []

    @property
    def cases(self) -> list[str]:
        """Names of the cases that are scored."""
        return [case for case in headneck.split(self.on) if case not in self.support]


@dataclass(frozen=True)
class Made:
    """The result of a training: a file (adapter or model), and the time and memory of the training.

    Seconds are processor time on a CPU and elapsed time on a GPU. Peaks are those of the process's memory and of the
    GPU memory. The loss is the mean over the last fifth of the fine-tuning.
    """

    path: Path
    parameters: int
    seconds: float
    peak_mib: float
    gpu_mib: float | None = None
    loss: float | None = None


def main() -> None:
    """Compute missing results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of an encoder; default: the built-in encoder")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 30])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each support set, each with its own seed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="METHOD")
    parser.add_argument("--device", default="auto", help="device for training and encoding")
    parser.add_argument("--on", choices=["test", "support"], default="test")
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "kshot")
    parser.add_argument("--report", action="store_true", help="only print the existing results")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    bundle = headneck.encoder(arguments.model)
    if not arguments.report:
        arguments.output.mkdir(parents=True, exist_ok=True)
        pool = len(headneck.split("support"))
        if max(arguments.shots) > pool:
            parser.error(f"the pool of support scans holds {pool}")
        for shots in arguments.shots:
            for draw in range(arguments.draws if shots < pool else 1):
                for method, repeat in itertools.product(arguments.methods, range(arguments.seeds)):
                    number = (0, 0, 0) if method == "zero-shot" else (shots, draw, repeat)
                    run = Run(method, *number, arguments.on, arguments.output, arguments.model, device)
                    try:
                        _do(run, bundle)
                    except UsageError as error:  # the method cannot be used with this encoder
                        print(f"{method}: {error.message}", flush=True)
    results = [result for result in read_results(arguments.output) if result["encoder"] == bundle.encoder_id[:12]]
    others = [result for result in results if result["method"] not in TUNINGS]
    print(markdown(others, arguments.on))
    plot(others, arguments.on, arguments.output / "kshot.png")
    if len(others) < len(results):
        print()
        print(
            tuning_markdown(
                results, arguments.on, ("spatial on the finest level", "spatial on all levels", *RATES), tuple(TUNINGS)
            )
        )


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return all results in a folder."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _do(run: Run, bundle: EncoderBundle) -> None:
    identity = {
        "method": run.method,
        "shots": run.shots,
        "draw": run.draw,
        "on": run.on,
        "encoder": bundle.encoder_id[:12],
        **({"repeat": run.repeat} if run.repeat else {}),
    }
    if _is_there(identity, run.folder):
        return
    made = None
    if run.shots:
        # in a separate process, so that its peak memory is that of the method
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            made = executor.submit(_make, run, bundle.path).result()
    started = time.monotonic()
    scores = _scores(run, bundle, made)
    result = {
        **identity,
        "parameters": made.parameters if made else 0,
        "seconds": round(made.seconds, 1) if made else 0,
        "peak_mib": round(made.peak_mib) if made else None,
        **({"gpu_mib": round(made.gpu_mib), "device": str(run.device)} if made and made.gpu_mib else {}),
        **({"loss": round(made.loss, 4)} if made and made.loss is not None else {}),
        "seconds_a_case": round((time.monotonic() - started) / len(run.cases), 2),
        "scores": {case: {organ: round(dsc, 4) for organ, dsc in of_case.items()} for case, of_case in scores.items()},
    }
    if _is_there(identity, run.folder):  # another run has written this result in the meantime
        return
    with (run.folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(markdown([result], run.on).splitlines()[-1], flush=True)


def _is_there(identity: dict[str, Any], folder: Path) -> bool:
    return any(
        identity.items() <= result.items() and result.get("repeat") == identity.get("repeat")
        for result in read_results(folder)
    )


def _make(run: Run, encoder: Path) -> Made:
    """Train and write the result."""
    if run.method in RATES:
        tuned = fine_tune(
            run.method, run.support, run.model, device=run.device, seed=run.seed, output=run.folder / "models"
        )
        return Made(tuned.model, tuned.parameters, tuned.seconds, _peak_mib(), _gpu_mib(run.device))
    if run.method in TUNINGS:
        return _fine_tuned(run, encoder)
    name = _adapter_of(run.method)
    path = run.folder / "adapters" / f"{name.replace(' ', '_')}-{run.shots}-{run.draw}{run.suffix}.adapter"
    bundle = EncoderBundle.open(encoder)
    path.parent.mkdir(exist_ok=True)
    with open_session(bundle, str(run.device)) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        # before the time measurement, so that the features are in the cache
        support = bench.support(run.support, variations=None, seed=run.draw)
        started = time.process_time()
        if name != run.method and path.exists():
            file = read_adapter(path)
            file.check_encoder(bundle, path=path)
            adapter = file.adapter
        else:
            trained = bench.train(support, ADAPTERS[name], TrainingSettings(seed=run.seed))
            adapter = trained.adapter
            write_adapter(path, describe(trained, support, headneck.ORGANS, bundle=bundle, seed=run.seed))
        seconds = time.process_time() - started
    return Made(path, sum(parameter.numel() for parameter in adapter.parameters()), seconds, _peak_mib())


def _fine_tuned(run: Run, encoder: Path) -> Made:
    path = run.folder / "tunings" / f"{run.name.replace(',', '')}.tuning"
    annotated = [(headneck.image_path(case), read_label_map(headneck.label_path(case))) for case in run.support]
    support = load_tuning_support(annotated, headneck.ORGANS, EncoderBundle.open(encoder), SilentProgress())
    settings = replace(TUNINGS[run.method], seed=run.seed, device=run.device)
    clock = time.monotonic if run.device.type == "cuda" else time.process_time
    started = clock()
    tuned = support.tuned(settings, range(len(annotated)), SilentProgress())
    seconds = clock() - started
    write_tuning(path, describe_tuning(tuned, support, settings, *OrganScores(len(headneck.ORGANS)).summary()))
    loss = float(np.mean(tuned.losses[-max(1, len(tuned.losses) // 5) :]))
    return Made(path, tuned.parameters, seconds, _peak_mib(), _gpu_mib(run.device), loss)


def _scores(run: Run, bundle: EncoderBundle, made: Made | None) -> dict[str, dict[str, float]]:
    if made is not None and made.path.suffix == ".tuning":
        with TemporaryDirectory() as folder, open_store(None, None) as store:
            merged = merge(made.path, Path(folder) / "merged.encoder", encoder=bundle.path, onnx=False)
            with open_session(merged.bundle, str(run.device)) as session:
                bench = Bench(merged.bundle, session, store)
                adapter = read_adapter(merged.adapter).adapter
                return {case: bench.score(case, adapter) for case in run.cases}
    if made is not None and made.path.suffix != ".adapter":
        tuned = headneck.encoder(made.path)
        with open_session(tuned, str(run.device)) as session, open_store(None, None) as store:
            bench = Bench(tuned, session, store)
            adapter = zero_shot_adapter(tuned, headneck.ORGANS).adapter
            return {case: bench.score(case, adapter) for case in run.cases}
    with open_session(bundle, str(run.device)) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        if made is None:
            known = [organ for organ in headneck.ORGANS if organ.name in bundle.manifest.organs]
            head = zero_shot_adapter(bundle, known).adapter
            return {case: bench.score(case, head, known) for case in run.cases}
        file = read_adapter(made.path)
        if run.method.endswith(FOLLOWING_SIZE):
            return _following_size(bench, run, file)
        if run.method.endswith(TRANSDUCED):
            return _transduced(bench, run, file)
        return {case: bench.score(case, file.adapter) for case in run.cases}


def _adapter_of(method: str) -> str:
    """Return the name of the adapter of a method, without what is added to it."""
    for addition in _ADDITIONS:
        method = method.removesuffix(addition)
    return method


def _following_size(bench: Bench, run: Run, file: AdapterFile) -> dict[str, dict[str, float]]:
    ranges = [expected_range(organ.support_volumes_ml) for organ in file.description.organs]
    return {
        case: bench.score(case, move_thresholds(file.adapter, bench.encoded(case), ranges)[0]) for case in run.cases
    }


def _transduced(bench: Bench, run: Run, file: AdapterFile) -> dict[str, dict[str, float]]:
    support = support_of(file.adapter, bench.support(run.support), TransductionSettings())
    priors = [SizePrior.from_volumes(organ.support_volumes_ml) for organ in file.description.organs]
    scores = {}
    for case in run.cases:
        tuned = transduce(file.adapter, bench.encoded(case), support, priors)
        scores[case] = bench.score(case, tuned.adapter)
    return scores


def _gpu_mib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
