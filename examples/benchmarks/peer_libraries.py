"""One network for `peers.py`, and its steps of predictive coding and of backprop in each library.

Nothing of a library is imported before its steps are built: each is measured by an interpreter of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float32]]
Kind = tuple[str, float | str, int]  # coordinates, step size and T
BACKPROP: Kind = ("backprop", 0.0, 0)
REST: Kind = ("errors", "auto", 100)  # of hf_pc, after which the free energy is at its minimum; not timed


class Problem(NamedTuple):
    """Weights [out, in] and biases of each layer, and a batch."""

    weights: list[tuple[Array, Array]]
    inputs: Array
    targets: Array

    @classmethod
    def of(cls, args: argparse.Namespace) -> Problem:
        random, sizes = np.random.default_rng(args.seed), args.sizes
        weights = [
            (random.normal(0, fan_in**-0.5, (out, fan_in)).astype("f"), np.zeros(out, "f"))
            for fan_in, out in pairwise(sizes)
        ]
        inputs = random.uniform(0, 1, (args.batch, sizes[0])).astype("f")
        return cls(weights, inputs, np.eye(sizes[-1], dtype="f")[random.integers(0, sizes[-1], args.batch)])

    def free_energy(self, states: list[Array]) -> float:
        """F, nats per sample, of the hidden states; of the feedforward ones where there are none."""
        found, below = 0.0, self.inputs
        for i, (weight, bias) in enumerate(self.weights):
            last = i == len(self.weights) - 1
            predicted = below @ weight.T + bias if last else np.tanh(below @ weight.T + bias)
            below = self.targets if last else states[i] if states else predicted
            found += 0.5 * float(np.square(below - predicted, dtype="d").sum()) / len(self.inputs)
        return found


class Library(NamedTuple):
    """The steps of a library, each of which returns once it is done, and what reads one's states and gradient."""

    steps: dict[Kind, Callable[[], Any]]
    read: Callable[[Any], tuple[list[Array], list[Array]]]


def hf_pc(args: argparse.Namespace, problem: Problem) -> Library:
    import torch
    from torch import nn

    from hf_pc import NodeSpec, PCConfig, PCModel

    torch.set_num_threads(1)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = [nn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in problem.weights]
            with torch.no_grad():
                for layer, (weight, bias) in zip(linear, problem.weights, strict=True):
                    layer.weight.copy_(torch.from_numpy(weight))
                    layer.bias.copy_(torch.from_numpy(bias))
            self.hidden = nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in linear[:-1])
            self.head = linear[-1]

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            for layer in self.hidden:
                pixels = layer(pixels)
            return {"logits": self.head(pixels)}

    inputs, targets = torch.from_numpy(problem.inputs), torch.from_numpy(problem.targets)

    def stepper(coordinates: str, step_size: float | str, updates: int) -> Callable[[], Any]:
        model = Network()
        nodes = [NodeSpec(f"hidden.{i}") for i in range(len(model.hidden))]
        common: dict[str, Any] = {"nodes": nodes, "output": "gaussian", "precision": 1.0, "step_size": step_size}
        solver = coordinates.removesuffix("s")
        pc = PCModel(model, PCConfig(**common, solver=solver, sweeps=updates + 1)) if updates else None

        def step() -> Any:
            model.zero_grad()
            if pc is not None:
                return model, pc.accumulate_grad(pixels=inputs, labels=targets)
            loss = 0.5 * (model(inputs)["logits"] - targets).square().sum() / len(targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return model, None

        return step

    def read(found: Any) -> tuple[list[Array], list[Array]]:
        model, relaxed = found
        states = relaxed.states.values() if relaxed else ()
        return [x.detach().numpy() for x in states], [p.grad.numpy() for p in model.parameters()]

    ways: list[tuple[str, float | str]] = [("errors", args.step_size), ("states", args.step_size), ("errors", "auto")]
    kinds: list[Kind] = [BACKPROP, REST, *((*way, updates) for way in ways for updates in args.T)]
    return Library({kind: stepper(*kind) for kind in kinds}, read)


def fabricpc(args: argparse.Namespace, problem: Problem) -> Library:
    import jax
    import optax
    from fabricpc.core.activations import IdentityActivation, TanhActivation
    from fabricpc.core.inference import InferenceSGD
    from fabricpc.core.inference_epc import EPCInference
    from fabricpc.core.topology import Edge
    from fabricpc.graph_assembly import TaskMap, graph
    from fabricpc.graph_initialization import initialize_params
    from fabricpc.nodes import Linear
    from fabricpc.training import make_train_step

    last, batch = len(args.sizes) - 1, {"x": jax.numpy.array(problem.inputs), "y": jax.numpy.array(problem.targets)}

    def zeros(tree: Any) -> Any:
        return jax.tree_util.tree_map(jax.numpy.zeros_like, tree)

    keep = optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))

    def stepper(algorithm: str, inference: Any) -> Callable[[], Any]:
        squash = [TanhActivation() if 0 < i < last else IdentityActivation() for i in range(last + 1)]
        nodes = [Linear(shape=(n,), name=f"n{i}", activation=squash[i]) for i, n in enumerate(args.sizes)]
        edges = [Edge(source=a, target=b.slot("in")) for a, b in pairwise(nodes)]
        structure = graph(nodes=nodes, edges=edges, task_map=TaskMap(x=nodes[0], y=nodes[-1]), inference=inference)
        params, key = initialize_params(structure, jax.random.PRNGKey(args.seed)), jax.random.PRNGKey(args.seed)
        for i, (weight, bias) in enumerate(problem.weights, 1):
            node = params.nodes[f"n{i}"]
            (edge,) = node.weights
            node.weights[edge], node.biases["b"] = jax.numpy.array(weight.T), jax.numpy.array(bias[None])
        step, state = make_train_step(structure, keep, algorithm=algorithm), keep.init(params)
        return lambda: jax.block_until_ready(step(params, state, batch, key))

    def read(found: Any) -> tuple[list[Array], list[Array]]:
        _, gradient, _, state = found
        return [np.asarray(state.nodes[f"n{i}"].z_latent) for i in range(1, last)], jax.tree_util.tree_leaves(gradient)

    solvers = {"errors": EPCInference, "states": InferenceSGD}
    kinds: dict[Kind, Callable[[], Any]] = {
        (coordinates, args.step_size, updates): stepper("pc", solver(eta_infer=args.step_size, infer_steps=updates))
        for coordinates, solver in solvers.items()
        for updates in args.T
    }
    return Library({BACKPROP: stepper("backprop", InferenceSGD()), **kinds}, read)


def pcx(args: argparse.Namespace, problem: Problem) -> Library:
    import jax
    import optax
    import pcx.functional as pxf
    import pcx.nn as pxnn
    import pcx.predictive_coding as pxc
    import pcx.utils as pxu

    class Network(pxc.EnergyModule):
        def __init__(self, learns_by_pc: bool) -> None:
            super().__init__()
            self.layers = [pxnn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in problem.weights]
            for layer, (weight, bias) in zip(self.layers, problem.weights, strict=True):
                layer.nn.weight.set(jax.numpy.array(weight))
                layer.nn.bias.set(jax.numpy.array(bias))
            self.vodes = [pxc.Vode() for _ in self.layers] if learns_by_pc else []
            for vode in self.vodes[-1:]:
                vode.h.frozen = True

        def __call__(self, x: Any, y: Any) -> Any:
            for i, layer in enumerate(self.layers[:-1]):
                x = jax.nn.tanh(layer(x))
                x = self.vodes[i](x) if self.vodes else x
            x = self.layers[-1](x)
            for vode in self.vodes[-1:]:
                vode(x)
                if y is not None:
                    vode.set("h", y)
            return x

    of_samples = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))
    of_weights = pxu.M(pxnn.LayerParam).to([False, True])

    @pxf.vmap(of_samples, in_axes=(0, 0), out_axes=0)
    def forward(x: Any, y: Any, *, model: Any) -> Any:
        return model(x, y)

    @pxf.vmap(of_samples, in_axes=0, out_axes=None, axis_name="batch")
    def energy(x: Any, *, model: Any) -> Any:
        model(x, None)
        return jax.lax.psum(model.energy(), "batch")

    @pxf.vmap(pxu.M(pxnn.LayerParam).to((None, None)), in_axes=(0, 0), out_axes=None, axis_name="batch")
    def loss(x: Any, y: Any, *, model: Any) -> Any:
        return jax.lax.psum(0.5 * jax.numpy.square(model(x, None) - y).sum(), "batch")

    @pxf.jit(static_argnums=0)
    def predictive_coding(updates: int, x: Any, y: Any, *, model: Any, optimizer: Any) -> Any:
        with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            forward(x, y, model=model)
        optimizer.init(pxu.M_hasnot(pxc.VodeParam, frozen=True)(model))
        of_states = pxu.M_hasnot(pxc.VodeParam, frozen=True).to([False, True])
        for _ in range(updates):
            with pxu.step(model, clear_params=pxc.VodeParam.Cache):
                _, gradient = pxf.value_and_grad(of_states)(energy)(x, model=model)
            optimizer.step(model, gradient["model"])
        with pxu.step(model, clear_params=pxc.VodeParam.Cache):
            _, gradient = pxf.value_and_grad(of_weights)(energy)(x, model=model)
        return [vode.h.get() for vode in model.vodes[:-1]], weights_of(gradient["model"])

    @pxf.jit()
    def backprop(x: Any, y: Any, *, model: Any) -> Any:
        _, gradient = pxf.value_and_grad(of_weights)(loss)(x, y, model=model)
        return [], weights_of(gradient["model"])

    def weights_of(model: Any) -> list[Any]:
        return [part.get() for layer in model.layers for part in (layer.nn.weight, layer.nn.bias)]

    x, y = jax.numpy.array(problem.inputs), jax.numpy.array(problem.targets)

    def stepper(updates: int) -> Callable[[], Any]:
        model = Network(learns_by_pc=updates > 0)
        if not updates:
            return lambda: jax.block_until_ready(backprop(x, y, model=model))
        optimizer = pxu.Optim(lambda: optax.sgd(args.step_size))
        return lambda: jax.block_until_ready(predictive_coding(updates, x, y, model=model, optimizer=optimizer))

    kinds: list[Kind] = [BACKPROP, *(("states", args.step_size, updates) for updates in args.T)]
    return Library({kind: stepper(kind[2]) for kind in kinds}, lambda found: found)


#: what to measure, the package beneath it, and a module that no other project of the same name has
LIBRARIES: dict[str, tuple[Callable[[argparse.Namespace, Problem], Library], str, str]] = {
    "hf_pc": (hf_pc, "torch", "hf_pc"),
    "fabricpc": (fabricpc, "jax", "fabricpc.core.inference_epc"),
    "pcx": (pcx, "jax", "pcx.predictive_coding"),
}
