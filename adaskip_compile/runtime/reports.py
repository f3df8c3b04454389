"""What really ran: graphs, requests, what each of them skipped, and where it fell back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from adaskip_compile.display.notebook_text import ShownAsText
from adaskip_compile.lowering.cuda_graphs import RecordedRun
from adaskip_compile.runtime.requests import Request, RequestPhase
from adaskip_compile.runtime.session import CapturedGraph, Session, sessions_of
from adaskip_passes.stream.stream import Phase


@dataclass(frozen=True)
class VariantReport:
    """One specialised graph: how many sublayers it skips and probes, its nodes, and the seconds that making it took.

    ``replays`` counts those of its calls that were replayed from a CUDA graph.
    """

    skipped: int
    probed: int
    nodes: int
    seconds: float
    replays: int = 0


@dataclass(frozen=True)
class GraphReport:
    """One captured graph and the variants made of it.

    ``captured_because`` is the assumption of the earlier graphs that did not hold; None for the first one, and for
    one that is ``restored``: an earlier capture of the same structure, from the cache directory.
    """

    phase: Phase
    calls: int
    variants: tuple[VariantReport, ...]
    captured_because: str | None = None
    restored: bool = False


@dataclass(frozen=True)
class PhaseReport:
    """One phase of one request: tokens a row, seconds in its graphs as seen from the host, and the paths skipped."""

    phase: RequestPhase
    tokens: int
    seconds: float
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class RequestReport:
    """One request. ``tokens`` are a row, by phase; ``seconds`` are spent in its graphs, by phase, as seen from the host.

    ``skipped``, ``ramped`` and ``extra`` map sublayer paths to scales: the prefill set, what the plan's ramp has
    added by now, and what the window added. ``resumed`` are those of the prefill set that run again.
    ``kv_bytes`` is the memory that its cache held after its last step, room to grow included. ``captures`` says which
    graphs had to be captured while it ran, and why; none in steady state. ``prompt_skipped`` maps what is skipped with
    keys and values kept to scales, for ``body_tokens`` tokens of each row; ``prompt_windows`` the attentions that see a
    window there to how many tokens they see. ``began`` is when it began, in seconds on the
    process's own clock.
    """

    number: int
    batch: int
    tokens: dict[RequestPhase, int]
    seconds: dict[RequestPhase, float]
    skipped: dict[str, float]
    extra: dict[str, float]
    kv_bytes: int
    learning: bool
    notes: tuple[str, ...]
    captures: tuple[str, ...] = ()
    ramped: dict[str, float] = field(default_factory=dict)
    resumed: tuple[str, ...] = ()
    prompt_skipped: dict[str, float] = field(default_factory=dict)
    prompt_windows: dict[str, int] = field(default_factory=dict)
    body_tokens: int = 0
    began: float = 0.0

    @property
    def phases(self) -> tuple[PhaseReport, ...]:
        """The phases that it has been through, in order, each with its skip set; of a ramp, as far as it has come."""
        decoding = {path: scale for path, scale in self.skipped.items() if path not in self.resumed} | self.ramped
        sets: dict[RequestPhase, tuple[str, ...]] = {
            "prefill": tuple(self.skipped),
            "window": tuple(decoding),
            "steady": tuple({**decoding, **self.extra}),
        }
        return tuple(
            PhaseReport(phase, self.tokens[phase], self.seconds[phase], skipped)
            for phase, skipped in sets.items()
            if self.tokens[phase]
        )


@dataclass(frozen=True)
class SessionReport:
    """One ``torch.compile`` configuration of the model. ``state`` is ``"learning"`` or ``"specialised"``."""

    state: str
    learned_requests: int
    graphs: tuple[GraphReport, ...]
    unskipped_graphs: tuple[str, ...]
    requests: tuple[RequestReport, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report(ShownAsText):
    """What ran on a model so far; ``str()`` of it is a table, :meth:`to_dict` is JSON-able."""

    sessions: tuple[SessionReport, ...]

    @property
    def requests(self) -> tuple[RequestReport, ...]:
        """The requests of all sessions, in the order in which they began."""
        found = [request for session in self.sessions for request in session.requests]
        return tuple(sorted(found, key=lambda request: request.began))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers; times are seconds, sizes bytes."""
        sessions = [asdict(session) for session in self.sessions]
        for session, plain in zip(self.sessions, sessions, strict=True):
            for request, row in zip(session.requests, plain["requests"], strict=True):
                row["phases"] = [asdict(phase) for phase in request.phases]
        return {"sessions": sessions}

    def __str__(self) -> str:
        if not self.sessions:
            return (
                "nothing ran through adaskip on this model. torch.compile(model).generate() runs the original forward: "
                "use model.compile(backend='adaskip') or adaskip_compile.compile(model)"
            )
        return "\n\n".join(_session_text(session) for session in self.sessions)


def report(model: nn.Module) -> Report:
    """Report what ran on ``model`` so far, through whichever way it was compiled with this backend."""
    return Report(tuple(_session_report(session) for session in sessions_of(model)))


def _session_report(session: Session) -> SessionReport:
    return SessionReport(
        state="learning" if session.learning else "specialised",
        learned_requests=session.learner.seen if session.learner is not None else 0,
        graphs=tuple(map(_graph_report, session.graphs)),
        unskipped_graphs=tuple(session.unskipped),
        requests=tuple(map(_request_report, session.requests.history)),
        notes=tuple(session.notes),
    )


def _graph_report(graph: CapturedGraph) -> GraphReport:
    variants = tuple(
        VariantReport(
            len(variant.skipped),
            len(variant.probed),
            variant.history[-1].nodes_after,
            round(variant.seconds, 3),
            variant.run.replays if isinstance(variant.run, RecordedRun) else 0,
        )
        for variant in graph.variants.values()
    )
    return GraphReport(graph.stream.phase, graph.calls, variants, graph.captured_because, graph.restored)


def _request_report(request: Request) -> RequestReport:
    return RequestReport(
        number=request.number,
        batch=request.batch,
        tokens=dict(request.tokens),
        seconds=dict(request.seconds),
        skipped=request.plan.scales,
        extra=dict(request.extra),
        kv_bytes=request.kv_bytes,
        learning=request.learning,
        notes=tuple(request.notes),
        captures=tuple(request.captures),
        ramped={path: scale for path, scale in request.scales.items() if path not in request.plan.scales},
        resumed=tuple(path for path in request.plan.paths if path not in request.scales),
        prompt_skipped={} if request.plan.prompt is None else request.plan.prompt.scales,
        prompt_windows={} if request.plan.prompt is None else dict(request.plan.prompt.windows),
        body_tokens=request.body_tokens,
        began=request.began,
    )


def _session_text(session: SessionReport) -> str:
    lines = [
        f"{session.state}" + (f", {session.learned_requests} requests so far" if session.state == "learning" else "")
    ]
    for graph in session.graphs:
        variants = "; ".join(
            f"{variant.skipped} skipped, {variant.probed} probed, {variant.nodes} nodes, made in {variant.seconds:.1f} s"
            + (f", {variant.replays} calls replayed from a CUDA graph" if variant.replays else "")
            for variant in graph.variants
        )
        lines.append(f"  graph {graph.phase:<8} {graph.calls:>6} calls  {variants or 'not run yet'}")
        if graph.restored:
            lines.append("        from the cache directory: not captured again")
        if graph.captured_because:
            lines.append(f"        captured because this did not hold: {graph.captured_because}")
    lines.extend(f"  graph run unskipped: {reason}" for reason in session.unskipped_graphs)
    lines.append("  request batch  prefill  window  steady (tokens)  prefill s  ms/token  skipped  extra     KV MB")
    for request in session.requests:
        decoded = request.tokens["window"] + request.tokens["steady"]
        pace = 1e3 * (request.seconds["window"] + request.seconds["steady"]) / decoded if decoded else 0.0
        lines.append(
            f"  {request.number:>7} {request.batch:>5} {request.tokens['prefill']:>8} {request.tokens['window']:>7} "
            f"{request.tokens['steady']:>7} {request.seconds['prefill']:>18.3f} {pace:>9.1f} {len(request.skipped):>8} "
            f"{len(request.extra):>6} {request.kv_bytes / 1e6:>9.2f}{'  learning' if request.learning else ''}"
        )
        ramped, resumed = len(request.ramped), len(request.resumed)
        lines.extend(
            [f"          since decoding: {ramped} more skipped, {resumed} run again"] if ramped or resumed else []
        )
        if request.prompt_skipped or request.prompt_windows:
            windows = f", {len(request.prompt_windows)} attentions within a window" if request.prompt_windows else ""
            lines.append(
                f"          prompt: {len(request.prompt_skipped)} skipped{windows} for {request.body_tokens} of "
                f"{request.tokens['prefill']} tokens, keys and values kept"
            )
        captured = ", ".join(capture.partition(":")[0] for capture in request.captures)
        lines.extend([f"          captured graphs for it: {captured}"] if captured else [])
        lines.extend(f"          note: {note}" for note in request.notes)
    lines.extend(f"  note: {note}" for note in session.notes)
    return "\n".join(lines)
