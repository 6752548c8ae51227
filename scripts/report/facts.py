"""What the numbers of a report were measured on, and a warning for everything that makes them not comparable."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from scripts.report.evidence import LABELS, Evidence
from scripts.report.render import Table

PAPER_SCALE = (73_531_692, 561, 524_288)  # parameters, steps, tokens a step


def facts(evidence: Evidence) -> tuple[Table, list[str]]:
    """The table of what the numbers were measured on, and the warnings."""
    runs = evidence.configs()
    everything = runs + [meta.config for meta in evidence.meta.values()]
    seeds = sorted({seed for by_seed in evidence.runs.values() for seed in by_seed})
    known = {
        "Data": distinct(everything, data),
        "Model": distinct(runs, model),
        "Run": distinct(runs, length),
        "Seeds": [", ".join(map(str, seeds))] if seeds else [],
        "Policies of the JEL runs": policies(evidence),
        "Device": distinct(everything, device),
        "Versions": distinct(everything, versions),
        "Git commit": distinct(everything, lambda config: config["environment"]["commit"] or "not recorded"),
    }
    table = ["What", "These numbers"], [[what, "; ".join(v) or "not measured"] for what, v in known.items()]
    consequence = {
        "Data": "The runs",
        "Model": "The runs",
        "Run": "The runs",
        "Device": "Seconds",
        "Policies of the JEL runs": "The JEL runs",
    }
    warnings = [
        f"{what} {verb} not the same for all: {'; '.join(known[what])}. {runs} cannot be compared."
        for what, runs in consequence.items()
        if len(known[what]) > 1
        for verb in ["are" if what.startswith("Policies") else "is"]
    ]
    other = [seed for seed, run in evidence.runs.get("jel", {}).items() if not own_policy(evidence, seed, run.config)]
    if other and any(meta.result for meta in evidence.meta.values()):
        listed = ", ".join(f"jel-s{seed}" for seed in sorted(other))
        warnings.append(f"{listed}: another policy than the one that this seed's meta-training ended with.")
    warnings += [
        f"The {LABELS[method]} runs do not have the setting that was best in the sweep."
        for method in ("hand_tuned", "best_constant", "schedule_free")
        if not has_best_setting(evidence, method)
    ]
    recovered = [
        f"{method}-s{seed} ({count:.0f})"
        for method in evidence.methods()
        for seed, count in evidence.results(method, "recoveries").items()
        if count
    ]
    if recovered:
        warnings.append(f"Recovered from a divergence, and marked in Table 1: {', '.join(recovered)}.")
    return table, warnings


def policies(evidence: Evidence) -> list[str]:
    """ "One per seed" counts as one kind of policy."""
    runs = evidence.runs.get("jel", {})
    own = [own_policy(evidence, seed, run.config) for seed, run in runs.items()]
    if runs and all(own):
        return ["one per seed, learned by the meta-training of that seed"]
    return distinct([run.config for run in runs.values()], policy)


def own_policy(evidence: Evidence, seed: int, config: dict) -> bool:
    """Whether the run used the policy that its seed's meta-training ended with."""
    meta, used = evidence.meta.get(seed), config["flags"]["policy"]
    return bool(meta and meta.result and used) and stem(used) == stem(meta.result["policy"])


def has_best_setting(evidence: Evidence, method: str) -> bool:
    """Whether the method's runs have the flags that won its sweeps; True if there is no sweep."""
    best = evidence.best_row(method)
    words = best.get("flags", []) if best else []
    wanted = {key.removeprefix("--").replace("-", "_"): value for key, value in zip(words[::2], words[1::2])}
    configs = [run.config for run in evidence.runs.get(method, {}).values()]
    return all(same(config["flags"].get(key), value) for config in configs for key, value in wanted.items())


def same(value, word: str) -> bool:
    """Whether a flag's value is what the command line's word says."""
    try:
        return float(value) == float(word)
    except (TypeError, ValueError):
        return str(value) == word


def at_papers_scale(evidence: Evidence) -> bool:
    return {scale(config) for config in evidence.configs()} == {PAPER_SCALE}


# -----------------------------------------------------------------------------
# one config in words


def distinct(configs: Sequence[dict], describe: Callable[[dict], str]) -> list[str]:
    return list(dict.fromkeys(map(describe, configs)))


def data(config: dict) -> str:
    record = config["data"]
    counts = ", ".join(f"{record[key]:,} {key}" for key in ("files", "documents", "shards") if key in record)
    size = f"{record['bytes']:,} bytes" if "bytes" in record else f"{record['shard_bytes']:,} bytes of shards"
    return f"{record.get('source', config['flags']['data'])}: {counts}, {size}, sha256 {record['sha256'][:16]}"


def model(config: dict) -> str:
    m, parameters = config["model"], config["parameters"]
    return f"{m['n_layer']} layers, {m['n_embd']} wide, vocabulary {m['vocab_size']:,}, {parameters:,} parameters"


def scale(config: dict) -> tuple[int, int, int]:
    return config["parameters"], config["num_iterations"], config["flags"]["total_batch_size"]


def length(config: dict) -> str:
    _, steps, batch = scale(config)
    return f"{steps:,} steps x {batch:,} tokens = {steps * batch:,} tokens, context {config['model']['sequence_len']:,}"


def device(config: dict) -> str:
    """Threads are left out: meta-training and runs use the same cores in another number of processes."""
    e = config["environment"]
    return f"{e['device']}, {e['world_size']} rank{'s' * (e['world_size'] != 1)}"


def versions(config: dict) -> str:
    return f"Python {config['environment']['python']}, torch {config['environment']['torch']}"


def policy(config: dict) -> str:
    chosen = config["flags"]["policy"]
    return stem(chosen) if chosen else "the one shipped with the package"


def stem(path: str) -> str:
    """A policy's path, whole, without the suffix that either of its files has."""
    return os.path.abspath(path.removesuffix(".safetensors").removesuffix(".json"))
