"""`report.md` of a federation: what came out, what it cost, and how much the clients differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rayft.config.federate import Federate
from rayft.federate.heterogeneity import Heterogeneity
from rayft.runs.folder import RunFolder


def save_report(folder: RunFolder, federate: Federate, names: Sequence[str]) -> None:
    """Write report.md and its pictures, also of a run that was stopped."""
    from rayft.federate.plots import plot_clients, plot_rounds

    rows = folder.metrics()
    plain = folder.read_json("clients.json")
    clients = Heterogeneity.of(plain) if plain else None
    pictures = []
    if rows:
        plot_rounds(rows, folder.scratch / "rounds.png", folder.name)
        pictures.append("rounds.png")
    if clients is not None:
        plot_clients(clients, folder.scratch / "clients.png", folder.name)
        pictures.append("clients.png")
    if not folder.location.is_local:
        for picture in pictures:
            folder.write_file(picture, (folder.scratch / picture).read_bytes())
    folder.write_file("report.md", text(folder, federate, rows, clients, len(names)))


def text(
    folder: RunFolder,
    federate: Federate,
    rows: Sequence[Mapping[str, Any]],
    clients: Heterogeneity | None,
    population: int,
) -> str:
    facts = folder.record.facts
    parts = [
        f"# Federation {folder.name}",
        f"{population} clients, strategy {federate.strategy}, aggregation {federate.method}, {len(rows)} of "
        f"{federate.rounds} rounds.",
    ]
    if "best_round" in facts:
        parts.append(
            f"The result is the adapter of round {facts['best_round']}, of rank {facts['rank']}: `adapter/`. "
            + _ENDED.get(facts["ended"], "")
        )
    if rows:
        parts += [
            "## Rounds",
            "![rounds](rounds.png)",
            _rounds(rows),
            "## What it cost",
            _table(_costs(rows, federate)),
        ]
    if federate.privacy is not None and rows:
        parts += ["## Privacy", _privacy(federate, rows, population)]
    if clients is not None:
        parts += ["## Clients", "![clients](clients.png)", _table(clients.summary())]
    if went := _events(folder):
        parts += ["## What went wrong and was survived", went]
    return "\n\n".join(parts) + "\n"


_ENDED = {
    "privacy": "The privacy budget allowed no further round.",
    "communication": "The communication budget allowed no further round.",
}


def _rounds(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = ("loss", "validation_loss", "federated_loss", "federated_worst_decile", "gap", "accumulator_rank", "epsilon")
    shown = [key for key in keys if any(key in row for row in rows)]
    lines = ["| round | clients | " + " | ".join(shown) + " |", "| --- | --- |" + " --- |" * len(shown)]
    for row in rows[-20:]:
        cells = [_number(row.get(key)) for key in shown]
        lines.append(f"| {row['round']} | {row['clients']} of {row['cohort']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _costs(rows: Sequence[Mapping[str, Any]], federate: Federate) -> dict[str, Any]:
    found = {
        "MB down": sum(row["mb_down"] for row in rows),
        "MB up": sum(row["mb_up"] for row in rows),
        "seconds per round": sum(row["seconds"] for row in rows) / len(rows),
        "tokens": rows[-1]["tokens"],
        "base loads": rows[-1]["base_loads"],
        "memory of the largest worker, GB": max(row["worker_memory_gb"] for row in rows),
    }
    if federate.communication_budget_mb is not None:
        found["MB allowed"] = federate.communication_budget_mb
    return found


def _privacy(federate: Federate, rows: Sequence[Mapping[str, Any]], population: int) -> str:
    privacy = federate.privacy
    assert privacy is not None
    delta = privacy.delta or population**-1.1
    spent = rows[-1].get("epsilon")
    said = "unbounded: there was no noise" if spent is None else f"{spent:.4g} at delta {delta:.3g}"
    return (
        f"Client-level, {privacy.mode}: epsilon {said} after {len(rows)} rounds, noise multiplier "
        f"{privacy.noise_multiplier:g}, {federate.cohort.sampling} sampling. It covers the adapter. It does not cover "
        "what else this report shows of the clients: losses, numbers of examples, and who failed."
    )


def _events(folder: RunFolder) -> str:
    kinds = Counter(event["kind"] for event in folder.events())
    lines = [
        f"- {count} {words}"
        for kind, words in (
            ("client_failed", "times a client failed"),
            ("worker_died", "times a worker died and its clients were trained again"),
            ("late", "rounds did not wait for all clients"),
        )
        if (count := kinds[kind])
    ]
    reasons = [event for event in folder.events() if event["kind"] == "client_failed"][:5]
    lines += [f"- round {event['round']}, client {event['client']}: {event['reason']}" for event in reasons]
    return "\n".join(lines)


def _table(facts: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in facts.items())
    return f"| | |\n| --- | --- |\n{rows}"


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
