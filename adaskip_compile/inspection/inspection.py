"""What the compiler sees of a model before anything runs: its sublayers, what each costs, what a plan does to them.

Everything follows from the graphs of the model's phases, captured without weights. Costs are expressions in
batch ``b``, query tokens ``q`` and context tokens ``t``; a prefill has ``q = t``, a decode step ``q = 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx, nn

from adaskip_compile.checkpoints.model_config import longest_context
from adaskip_compile.costs.model_costs import Group, find_model_costs
from adaskip_compile.costs.timers import cost_at
from adaskip_compile.inspection.phase_graphs import PhaseGraph, capture_phases
from adaskip_compile.planning.skip_plan import SkipPlan
from adaskip_compile.profiling.profiles import Profile
from adaskip_passes.analysis.cost import Cost
from adaskip_passes.errors import AdaSkipError, CaptureError
from adaskip_passes.ir.graph import fake_tensor
from adaskip_passes.ir.module_paths import source_name, tensors_behind
from adaskip_passes.ir.printer import diff_graphs, print_graph
from adaskip_passes.pipeline.derived_graph import DerivedGraph
from adaskip_passes.pipeline.pipeline import Pass, PassResult, run_pipeline
from adaskip_passes.pipelines import row_passes, skip_passes
from adaskip_passes.specialise.skip_body_rows import SkipBodyRows
from adaskip_passes.stream.stream import Kind

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class InspectedSublayer:
    """One sublayer. ``group`` numbers sublayers that cost the same; ``parameters`` counts those that it reads.

    ``similarity`` and ``scale`` are None without a profile, ``skipped`` is None without a plan.
    ``shared_with`` names sublayers that read its values, and so must be skipped with it.
    """

    path: str
    kind: Kind
    stateful: bool
    group: int
    parameters: int
    shared_with: tuple[str, ...] = ()
    similarity: float | None = None
    scale: float | None = None
    skipped: bool | None = None


@dataclass(frozen=True)
class Unmatched:
    """Parameters that no sublayer holds, and why not: they always run."""

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class PassStep:
    """What one pass does to the graph of one phase under the plan; ``diff`` is a unified diff of its text."""

    phase: str
    text: str
    modified: bool
    matched: int
    nodes_before: int
    nodes_after: int
    diff: str


@dataclass(frozen=True)
class Inspection:
    """What was found in one model. ``rest`` is the cost by phase of all that is in no sublayer.

    ``longest`` is the longest context that the model is made for, None where it does not say. ``body_left`` is by path what
    a prompt still costs of each sublayer that the plan skips for its body, or gives a window: keys and values, edges, and
    what stands for it.
    """

    model: str
    kind: str
    dtype: str
    parameters: int
    longest: int | None = None
    sublayers: tuple[InspectedSublayer, ...] = ()
    groups: tuple[Group, ...] = ()
    rest: Mapping[str, Cost] = field(default_factory=dict)
    unmatched: tuple[Unmatched, ...] = ()
    problems: tuple[str, ...] = ()
    plan: SkipPlan | None = None
    steps: tuple[PassStep, ...] = ()
    body_left: Mapping[str, Cost] = field(default_factory=dict)
    graphs: tuple[PhaseGraph, ...] = field(default=(), repr=False)

    @cached_property
    def phases(self) -> tuple[str, ...]:
        """The phases that there is a graph of."""
        return tuple(phase for phase in PHASES if phase in self.rest)

    @property
    def skipped(self) -> frozenset[str]:
        """The paths that the plan skips from the first token on."""
        return frozenset(sublayer.path for sublayer in self.sublayers if sublayer.skipped)

    @property
    def skipped_at_last(self) -> frozenset[str]:
        """The paths that the plan skips once its ramp is over; without a ramp those of :attr:`skipped`."""
        return self.plan.paths_at(math.inf) if self.plan is not None else frozenset()

    def saved_shares(self, phase: str, context: int) -> dict[str, float]:
        """Return by path what share of a sublayer's operations a prompt of ``context`` tokens saves.

        That is of those sublayers that its body skips, or in which it sees a window.
        """
        prompt = None if self.plan is None else self.plan.prompt
        if phase != "prefill" or prompt is None or not prompt.apply_to(context):
            return {}
        costs = {one.path: self.groups[one.group].cost[phase] for one in self.sublayers}
        found = {path: cost_at(costs[path], phase, context)["flops"] for path in self.body_left}
        left = {path: cost_at(cost, phase, context)["flops"] for path, cost in self.body_left.items()}
        return {path: 1 - left[path] / full if full else 0.0 for path, full in found.items()}

    def skipped_in(self, phase: str) -> frozenset[str]:
        """Return the paths that the plan skips in ``phase``, in decode once its ramp is over."""
        return self.skipped if phase == "prefill" else self.skipped_at_last

    @property
    def watched(self) -> frozenset[str]:
        """The FFNs that are kept in prefill, and that each request decides on after its window."""
        if self.plan is None or self.plan.beta is None or not self.plan.window:
            return frozenset()
        ffns = frozenset(one.path for one in self.sublayers if one.kind == "ffn" and not one.stateful)
        return ffns - self.plan.paths_at(0)


def inspect_model(
    model: nn.Module,
    *,
    name: str = "",
    profile: Profile | None = None,
    plan: SkipPlan | None = None,
) -> Inspection:
    """Return what the compiler finds in ``model``, which may be on the meta device and is not run.

    ``profile`` and ``plan`` are taken to be of this model: check them first. What keeps a model from being
    skipped is no error: it is in ``problems``.

    Raises:
        UnknownSublayerError: The plan names a sublayer that the model lacks.
    """
    found = Inspection(
        model=name or type(model).__name__,
        kind=type(model).__name__,
        dtype=str(next((one.dtype for one in model.parameters()), "")).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        longest=longest_context(model),
    )
    try:
        graphs = capture_phases(model)
    except CaptureError as error:
        return replace(found, problems=(str(error),))
    problems = tuple(f"{graph.phase}: {problem}" for graph in graphs for problem in graph.stream.problems)
    if problems or not graphs:
        return replace(found, problems=problems or ("nothing was captured",), graphs=graphs)
    found = _with_costs(replace(found, graphs=graphs), graphs)
    found = _with_profile(found, profile)
    return found if plan is None else _with_plan(found, plan)


def _with_costs(found: Inspection, graphs: tuple[PhaseGraph, ...]) -> Inspection:
    first = graphs[0]
    costs = find_model_costs({graph.phase: (graph.gm, graph.stream) for graph in graphs})
    numbers = {one.path: one.group for one in costs.sublayers}
    held = tensors_behind(first.gm.graph)
    sublayers = tuple(
        InspectedSublayer(
            one.path, one.kind, one.stateful, numbers[one.path], _count(one.nodes, held), shared_with=one.shared_with
        )
        for one in first.stream.sublayers
    )
    unmatched = tuple(_unmatched(first, held))
    return replace(found, sublayers=sublayers, groups=costs.groups, rest=costs.rest, unmatched=unmatched)


def _count(nodes: Iterable[fx.Node], held: Mapping[fx.Node, frozenset[fx.Node]]) -> int:
    """Return how many parameters ``nodes`` read, each once."""
    read = {parameter for node in nodes for source in node.all_input_nodes for parameter in held.get(source, ())}
    return sum(value.numel() for node in read if isinstance(value := fake_tensor(node), nn.Parameter))


def _unmatched(graph: PhaseGraph, held: Mapping[fx.Node, frozenset[fx.Node]]) -> Iterable[Unmatched]:
    """Yield the parameters that are read by no sublayer, with where they are read."""
    order = {node: index for index, node in enumerate(graph.gm.graph.nodes)}
    sublayers = graph.stream.sublayers
    start, end = order[sublayers[0].nodes[0]], order[sublayers[-1].stream_out]
    inside = {node for sublayer in sublayers for node in sublayer.nodes}
    seen: set[fx.Node] = set()
    for node in graph.gm.graph.nodes:
        for parameter in frozenset().union(*(held.get(source, frozenset()) for source in node.all_input_nodes)):
            value = fake_tensor(parameter)
            if node in inside or node in held or parameter in seen or not isinstance(value, nn.Parameter):
                continue
            seen.add(parameter)
            place = "before the first sublayer" if order[node] < start else "after the last sublayer"
            if start <= order[node] <= end:
                place = "between sublayers, where several of them read its result"
            yield Unmatched(source_name(parameter), value.numel(), f"read {place}")


def _with_profile(found: Inspection, profile: Profile | None) -> Inspection:
    if profile is None:
        return found
    measured = {sublayer.path: sublayer for sublayer in profile.sublayers}
    sublayers = tuple(
        replace(one, similarity=measured[one.path].mean_similarity, scale=measured[one.path].mean_scale("token"))
        if one.path in measured
        else one
        for one in found.sublayers
    )
    return replace(found, sublayers=sublayers)


def _with_plan(found: Inspection, plan: SkipPlan) -> Inspection:
    for path in plan.named_paths:
        found.graphs[0].stream.by_path(path)
    scales = {**({} if plan.prompt is None else plan.prompt.scales), **plan.all_scales}
    sublayers = tuple(
        replace(one, skipped=one.path in plan.scales, scale=scales.get(one.path, one.scale)) for one in found.sublayers
    )
    found = replace(found, sublayers=sublayers, plan=plan)
    try:
        steps = tuple(step for graph in found.graphs for step in _dry_run(graph, found))
        left = _left_of_body(found.graphs[0], plan)
    except AdaSkipError as error:
        return replace(found, problems=(f"the plan cannot be carried out: {error}",))
    return replace(found, steps=steps, body_left=left)


def _left_of_body(graph: PhaseGraph, plan: SkipPlan) -> dict[str, Cost]:
    if plan.prompt is None or not plan.prompt.named_paths:
        return {}
    body = plan.prompt.as_pass(graph.stream.paths)
    graph = _with_rows(graph, body)
    result = run_pipeline(graph.gm, graph.stream, row_passes(body))
    costs = find_model_costs({graph.phase: (result.gm, result.stream)})
    left = {one.path: costs.groups[one.group].cost[graph.phase] for one in costs.sublayers}
    return {path: left[path] for path in (*result.stream.body_skipped, *result.stream.windowed)}


def _with_rows(graph: PhaseGraph, body: SkipBodyRows) -> PhaseGraph:
    """Return a prompt's graph as captured with a prompt that has a body."""
    found = DerivedGraph(graph.gm, graph.stream).for_rows(body.least_rows, body.fewest_rows)
    return replace(graph, gm=found.gm, stream=found.stream)


def _dry_run(graph: PhaseGraph, found: Inspection) -> Iterable[PassStep]:
    """Rewrite the graph of one phase as the plan says, the decode graph also as the window has it, and keep what changed."""
    assert found.plan is not None
    probed = tuple(path for path in graph.stream.paths if path in found.watched)
    runs = [("prefill", found.skipped, ())] if graph.phase == "prefill" else [("steady", found.skipped_at_last, ())]
    if graph.phase == "decode" and probed:
        runs = [("window", found.plan.paths_at(0), probed), *runs]
    for phase, skipped, probes in runs:
        paths = tuple(path for path in graph.stream.paths if path in skipped)
        passes = skip_passes(paths, probes, found.plan.map_forms(paths))
        if phase == "prefill" and found.plan.prompt is not None and found.plan.prompt.named_paths:
            body = found.plan.prompt.as_pass(graph.stream.paths)
            graph, passes = _with_rows(graph, body), (*row_passes(body), *passes)
        yield from _steps(graph, phase, passes)


def _steps(graph: PhaseGraph, phase: str, passes: tuple[Pass, ...]) -> Iterable[PassStep]:
    diffs = []
    text = print_graph(graph.gm)

    def note(_: Pass, gm: fx.GraphModule, result: PassResult) -> None:
        nonlocal text
        before, text = text, print_graph(gm) if result.modified else text
        diffs.append(diff_graphs(before, text, context=1))

    result = run_pipeline(graph.gm, graph.stream, passes, [note])
    for record, diff in zip(result.history, diffs, strict=True):
        yield PassStep(
            phase, record.text, record.modified, record.matched, record.nodes_before, record.nodes_after, diff
        )
