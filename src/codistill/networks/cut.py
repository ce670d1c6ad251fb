"""Cut a network of somebody else's into stages and a head: its own modules under their own names, and its own weights.

The forward of the module is traced with its submodules as they are, by torch.fx, and the trace is cut where a single
tensor passes on. Each piece holds the submodules and parameters that it uses under the names that they have in the
module, so that state_dicts go both ways; see `Network.original_names`.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from codistill.core.errors import UsageError, in_words
from codistill.core.randomness import CPU, draws_kept, seed_draws
from codistill.core.registry import near_matches
from codistill.networks.network import Network

Maps = Float[Tensor, "batch channel height width"]
Tokens = Float[Tensor, "batch token channel"]
Path = str
SIZES = ((128, 128), (224, 224), (32, 32))  # of the images that modules are tried on, pixels, one after the other
QUARTERS = 4  # stages of a network whose maps all have one size
DROPOUTS = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
ADVICE = "make a Network(stages, head, widths) of its parts: docs/networks.md has an example"


@dataclass(frozen=True)
class Form:
    """How the tensors within a module lie: `maps`, as they shall be, `last`, with channels last, or `tokens`.

    Attributes:
        kind: One of these.
        prefix: Number of tokens before those of the patches: of the class, and registers.
        grid: Rows and columns of patches.
        centred: Whether the classifier reads the class token: the map is then that of the patches around it.
    """

    kind: str = "maps"
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    centred: bool = False


def maps_last(features: Float[Tensor, "batch height width channel"]) -> Maps:
    """Bring maps with channels last into the usual form."""
    return features.permute(0, 3, 1, 2)


def last_maps(features: Maps) -> Float[Tensor, "batch height width channel"]:
    """Undo `maps_last`."""
    return features.permute(0, 2, 3, 1)


def column_of_tokens(tokens: Tokens) -> Float[Tensor, "batch channel token 1"]:
    """Bring tokens into the form of maps that are one pixel wide."""
    return tokens.transpose(1, 2).unsqueeze(3)


def tokens_of_column(features: Float[Tensor, "batch channel token 1"]) -> Tokens:
    """Undo `column_of_tokens`."""
    return features.squeeze(3).transpose(1, 2)


def map_of_tokens(tokens: Tokens, prefix: int, height: int, width: int, centred: bool) -> Maps:
    """Make a map of the patches' tokens; `centred`: the mean over its places is moved to the first token, the class.

    What reads the mean of the map, as classifiers do, then reads the class token, and what works on maps sees the
    patches around it.
    """
    patches = tokens[:, prefix:]
    if centred:
        patches = patches - patches.mean(1, keepdim=True) + tokens[:, :1]
    # Not by the length of the batch, which an export would take for a constant.
    return patches.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def tokens_of_map(feature_map: Maps, prefix: int) -> Tokens:
    """Undo `map_of_tokens`: patches behind the mean over them, as often as there were tokens before them."""
    patches = feature_map.flatten(2).transpose(1, 2)
    return torch.cat([*[patches.mean(1, keepdim=True)] * prefix, patches], dim=1)


@dataclass(frozen=True)
class Plan:
    """Where a module is cut: `ends` are nodes of its trace, one for each stage; parts that are `cloned` get a copy."""

    ends: tuple[str, ...]
    widths: tuple[int, ...]
    form: Form = Form()
    cloned: tuple[int, ...] = ()


class _Root(nn.Module):
    """A module below another one, so that the tracer goes by the forward of an instance, with one argument."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, images: Tensor) -> Any:
        return self.whole(images)


class _Tracer(fx.Tracer):
    """Traces the forward of the module itself, of Sequentials, and of what has one of the names within."""

    def __init__(self, within: Collection[Path]) -> None:
        super().__init__()
        self.within = within

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is taken as it is."""
        path = module_qualified_name.removeprefix("whole").removeprefix(".")
        inside = not path or any(each.startswith(f"{path}.") for each in self.within)
        return not inside and type(m).forward is not nn.Sequential.forward


class Trace:
    """The forward of a module as a graph of calls of its submodules, by the names that they have in it."""

    def __init__(self, module: nn.Module, within: Collection[Path] = ()) -> None:
        modes = [(each, each.training) for each in module.modules()]
        root, self.attributes = _Root(module), dict[str, Any]()
        try:
            self.graph = self._traced(root.train(), within)
            evaluated = self._traced(root.eval(), within)
        except UsageError:
            raise
        except Exception as error:  # control flow by values, which has types of its own
            raise UsageError(f"its forward cannot be traced: {in_words(error)}") from error
        finally:
            for each, mode in modes:
                each.training = mode
        if self.graph.python_code("self").src != evaluated.python_code("self").src:
            raise UsageError("its forward takes another way in evaluation than in training")
        self.nodes = [node for node in self.graph.nodes if node.users or node.op == "output"]
        for node in self.nodes:
            if node.op in ("call_module", "get_attr"):
                target = str(node.target)
                if target not in self.attributes:
                    self.attributes[target] = attrgetter(target)(root)

    def _traced(self, root: _Root, within: Collection[Path]) -> fx.Graph:
        graph = _Tracer(within).trace(root)
        for node in graph.nodes:
            node.type = None
            kind = DROPOUTS.get(node.target) if node.op == "call_function" else None
            if kind is not None:  # a trace would keep whether it is training
                bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
                name = f"whole.functional_{node.name}"
                self.attributes.setdefault(name, kind(bound.get("p", 0.5)))
                node.op, node.target, node.args, node.kwargs = "call_module", name, (bound["input"],), {}
        return graph

    def path(self, node: fx.Node) -> Path:
        """Return the name of the submodule that a node calls; empty: it calls none."""
        return str(node.target).removeprefix("whole.") if node.op == "call_module" else ""

    def has_weights(self, node: fx.Node) -> bool:
        """Whether a node is a call of a submodule with parameters, or a parameter."""
        if node.op == "call_module":
            return any(True for _ in self.attributes[str(node.target)].parameters())
        return node.op == "get_attr"

    def passes(self) -> list[fx.Node]:
        """Return the nodes at which nothing but their result passes on, in order."""
        found, alive = [], dict[fx.Node, int]()
        for node in self.nodes:
            for used in node.all_input_nodes:
                if used in alive:
                    alive[used] -= 1
                    if not alive[used]:
                        del alive[used]
            if node.op not in ("get_attr", "output"):
                alive[node] = len(node.users)
                if list(alive) == [node] and node.op != "placeholder":
                    found.append(node)
        return found

    def end_of(self, path: Path) -> fx.Node | None:
        """Return the last node that calls a submodule, or one below it."""
        called = [node for node in self.nodes if f"{self.path(node)}.".startswith(f"{path}.")]
        return called[-1] if called else None

    @torch.no_grad()
    def results(self, images: Tensor) -> dict[fx.Node, Any]:
        """Run the trace on images, and return the result of each node."""
        results = dict[fx.Node, Any]()

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                results[n] = super().run_node(n)
                return results[n]

        Recorder(fx.GraphModule(self.attributes, self.graph), garbage_collect_values=False).run(images)
        return results

    def pieces(self, plan: Plan) -> Iterator[nn.Module]:
        """Yield the stages that a plan names, and then the head, with maps between them."""
        ends = list(plan.ends)
        graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
        known[self.nodes[0]] = graph.placeholder("features")
        for node in self.nodes[1:]:
            if node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node):
                    raise UsageError(f"it returns a {type(result).__name__}, not logits alone")
                graph.output(known[result])
                yield self._piece(graph)
            elif node.op != "get_attr":  # parameters are copied where they are used
                self._copy(node, graph, known)
            if ends and node.name == ends[0]:
                del ends[0]
                graph.output(leaving(graph, known[node], plan.form, not ends))
                yield self._piece(graph)
                graph = fx.Graph()
                features = graph.placeholder("features")
                if len(plan.ends) - len(ends) in plan.cloned:
                    features = graph.call_method("clone", (features,))
                known = {node: entering(graph, features, plan.form, not ends)}

    def _copy(self, node: fx.Node, graph: fx.Graph, known: dict[fx.Node, fx.Node]) -> None:
        """Copy a node, and parameters that it uses, into the graph of a piece, where nodes before it are known."""
        for each in (*node.all_input_nodes, node):
            if each not in known:
                known[each] = graph.node_copy(each, known.__getitem__)
                if each.op in ("call_module", "get_attr"):
                    known[each].target = str(each.target).removeprefix("whole.")

    def _piece(self, graph: fx.Graph) -> nn.Module:
        used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        return fx.GraphModule({name: self.attributes[f"whole.{name}"] for name in used}, graph, "Piece")


def leaving(graph: fx.Graph, node: fx.Node, form: Form, last: bool) -> fx.Node:
    """Add to a graph the step from the form of a module's tensors to maps; `last`: to the feature map."""
    if form.kind == "last":
        return graph.call_function(maps_last, (node,))
    if form.kind == "tokens" and last:
        return graph.call_function(map_of_tokens, (node, form.prefix, *form.grid, form.centred))
    return graph.call_function(column_of_tokens, (node,)) if form.kind == "tokens" else node


def entering(graph: fx.Graph, node: fx.Node, form: Form, last: bool) -> fx.Node:
    """Add to a graph the step back from what `leaving` has returned."""
    if form.kind == "last":
        return graph.call_function(last_maps, (node,))
    if form.kind == "tokens" and last:
        return graph.call_function(tokens_of_map, (node, form.prefix))
    return graph.call_function(tokens_of_column, (node,)) if form.kind == "tokens" else node


Chooser = Callable[[Trace, nn.Module, Tensor], tuple[list[fx.Node], Form]]


def network_from(
    module: nn.Module, stages: Sequence[str] = (), image_size: tuple[int, int] | None = None, name: str = ""
) -> Network:
    """Cut any image classifier into stages and a head, by the names of submodules.

    Nothing is copied: training the network trains the module. The weights stay as they are.

    Args:
        module: Maps normalised images [batch, 3, height, width] to logits [batch, classes].
        stages: Names of submodules, `layer1` or `backbone.blocks.3`, in the order of the forward pass: each ends a
            stage, and the result of the last one is the feature map. All that follows is the head. Empty: where the
            resolution changes, up to the last map before pooling.
        image_size: Height and width of images to try it on, pixels; None: of 128x128, and of 224x224 or 32x32 where it
            cannot take these.
        name: What errors call it; empty: its class.

    Returns:
        The network, of the user's own: only the program that makes it can build it again, unless a function that
        returns it is registered (`@NETWORKS.register`).

    Raises:
        UsageError: It cannot be cut there; the line says what to do.
    """

    def chosen(trace: Trace, module: nn.Module, images: Tensor) -> tuple[list[fx.Node], Form]:
        return (named_ends(trace, module, stages) if stages else found_ends(trace, trace.results(images))), Form()

    if not isinstance(module, nn.Module):
        raise UsageError(f"network_from: {module!r} is no torch.nn.Module: hand in a network that is made already")
    name = name or type(module).__name__
    return cut(module, planned(module, chosen, name, image_size, stages), stages)


def cut(module: nn.Module, plan: Plan, within: Collection[Path] = ()) -> Network:
    """Cut a module as planned; the parts hold its submodules, not copies."""
    *stages, head = Trace(module, within).pieces(plan)
    built = Network(stages, head, plan.widths, initialised=True)
    built.is_cut = True
    return built


def planned(
    module: nn.Module,
    choose: Chooser,
    name: str,
    image_size: tuple[int, int] | None = None,
    within: Collection[Path] = (),
) -> Plan:
    """Plan where to cut a module, and try that the parts compute what it computes.

    Raises:
        UsageError: They cannot.
    """
    device = next((each.device for each in module.parameters()), CPU)
    modes = [(each, each.training) for each in module.modules()]
    try:
        with draws_kept(CPU), torch.no_grad():
            images = accepted_images(module.eval(), device, image_size)
            trace = Trace(module, within)
            ends, form = choose(trace, module, images)
            return _tried(module, trace, Plan(tuple(each.name for each in ends), (), form), images)
    except UsageError as error:
        raise UsageError(f"{name} cannot be cut into stages and a head: {error}: {ADVICE}") from error
    finally:
        for each, mode in modes:
            each.training = mode


_PLANS: dict[tuple[str, str, tuple[int, int]], Plan] = {}


def planned_once(module: nn.Module, choose: Chooser, name: str, spec: str, image_size: tuple[int, int]) -> Plan:
    """Plan where to cut a network of a library, once for each spec and size; see `planned`."""
    key = name, spec, image_size
    if key not in _PLANS:
        found = planned(module, choose, name, image_size)
        if next(module.parameters()).is_meta:  # what its parts compute was not tried
            return found
        _PLANS[key] = found
    return _PLANS[key]


def accepted_images(module: nn.Module, device: torch.device, image_size: tuple[int, int] | None) -> Tensor:
    """Return two random images of a size that a module can take; raise `UsageError` where there is none."""
    reason = ""
    for size in (image_size,) if image_size else SIZES:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), device=CPU).to(device)
        try:
            module(images)
            return images
        except Exception as error:  # of somebody else's code
            reason = reason or f"it cannot take {size[0]}x{size[1]} images ({in_words(error)})"
    raise UsageError(reason)


def named_ends(trace: Trace, module: nn.Module, names: Sequence[str]) -> list[fx.Node]:
    """Return the nodes at which stages end that are named, or raise `UsageError`."""
    ends, passes = [], trace.passes()
    for name in names:
        end = trace.end_of(name)
        if end is None:
            known = [path for path, _ in module.named_modules() if path]
            here = "its forward does not call it" if name in known else near_matches(name, known)
            raise UsageError(f"stage {name!r}: {here}")
        if end not in passes:
            free = [path for path in dict.fromkeys(map(trace.path, passes)) if path]
            raise UsageError(
                f"stage {name!r}: more than its result passes on to what follows; choose from {', '.join(free)}"
            )
        ends.append(end)
    if [passes.index(end) for end in ends] != sorted({passes.index(end) for end in ends}):
        raise UsageError(f"stages {', '.join(names)} are not in the order of the forward pass")
    return ends


def found_ends(
    trace: Trace, results: dict[fx.Node, Any], final: fx.Node | None = None, last: bool = False
) -> list[fx.Node]:
    """Find the nodes at which stages end: where the resolution changes or, where it never does, after each quarter.

    Args:
        trace: The forward of a module.
        results: Those of its nodes.
        final: The end of the last stage; None: that of `last_map`.
        last: Whether channels are the last axis.
    """
    dimensions = 4 if final is None else results[final].ndim
    passes = [node for node in trace.passes() if isinstance(results.get(node), Tensor)]
    spots = [node for node in passes if results[node].ndim == dimensions]
    sizes = {
        node: tuple(results[node].shape[1:3] if last or dimensions == 3 else results[node].shape[2:]) for node in spots
    }
    final = last_map(trace, spots, sizes) if final is None else final
    if final not in spots:
        raise UsageError("more than its feature map passes on to the head")
    spots = spots[: spots.index(final) + 1]
    ends = {node for node, after in itertools.pairwise(spots) if sizes[node] != sizes[after]}
    if not ends or dimensions == 3:
        # Blocks of equal form; what comes before them, as patches without the class token, has another one.
        heavy = [node for node in spots[:-1] if trace.has_weights(node) and sizes[node] == sizes[final]]
        quarters = range(1, QUARTERS) if len(heavy) >= QUARTERS else ()
        ends = {heavy[len(heavy) * quarter // QUARTERS - 1] for quarter in quarters}
    kept, weights = list[fx.Node](), False
    for node in trace.nodes[: trace.nodes.index(final)]:
        weights = weights or trace.has_weights(node)
        if node in ends and weights:
            kept.append(node)
            weights = False
    return [*kept[: len(kept) if weights or trace.has_weights(final) else -1], final]


def last_map(trace: Trace, spots: Sequence[fx.Node], sizes: dict[fx.Node, tuple[int, ...]]) -> fx.Node:
    """Find the last map before pooling, of these spots with the sizes of their maps: with weights on both its sides."""
    places = {node: index for index, node in enumerate(trace.nodes)}
    last_weights = max((places[node] for node in trace.nodes if trace.has_weights(node)), default=0)
    before = [node for node in spots if places[node] < last_weights]
    large = [node for node in before if max(sizes[node]) > 1] or before
    weighted = [index for index, node in enumerate(large) if trace.has_weights(node)]
    if not weighted:
        raise UsageError("its forward does not pass maps from submodule to submodule")
    final, *others = large[weighted[-1] :]
    for node in others:  # the activation after it
        if sizes[node] != sizes[final] or "drop" in str(node.target).lower():
            break
        final = node
    return final


@torch.no_grad()
def _tried(module: nn.Module, trace: Trace, plan: Plan, images: Tensor) -> Plan:
    """Return a plan with widths and with what writes to its input, or raise `UsageError` where the parts differ."""
    parts, features = [each.eval() for each in trace.pieces(plan)], images
    widths, cloned = [], []
    for index, part in enumerate(parts):
        version = features._version
        result = part(features)
        if features._version > version:
            cloned.append(index)
        features = result
        widths.append(features.shape[1] if isinstance(features, Tensor) and features.ndim > 1 else 0)
    plan = Plan(plan.ends, tuple(widths[:-1]), plan.form, tuple(cloned))
    if images.is_meta:
        return plan
    # In training, on weights that are not zero, as those of many residual branches are at first.
    whole, parts = copy.deepcopy((module, list(trace.pieces(plan))))
    for parameter in whole.parameters():
        if parameter.ndim < 2:
            parameter.uniform_(0.5, 1.5)
    results = []
    for run in (whole, nn.Sequential(*parts)):
        seed_draws(0, CPU)
        results.append(run.train()(images))
    wanted, got = results
    if not isinstance(wanted, Tensor):
        raise UsageError(f"in training it returns a {type(wanted).__name__}, not logits alone")
    if wanted.shape != got.shape or not torch.allclose(wanted, got, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UsageError("the parts do not compute what the whole does")
    return plan
