"""The faults that ``tools.mutants`` plants: pieces of source and their replacements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that must notice it.

    Attributes:
        name: what goes wrong.
        file: where, from the checkout's root.
        old: a piece of source that occurs there once.
        new: what it becomes.
        tests: arguments of pytest.

    """

    name: str
    file: str
    old: str
    new: str
    tests: str


REMOVAL = "tests/test_removal.py tests/test_wiring.py"
BRANCHES = "tests/test_branches.py"
MUTANTS = (
    Mutant(
        "merge: what meets an unlabelled position is not frozen",
        "fxprune/structure/merging.py",
        "none = (left == 0) != (right == 0)",
        "none = (left == 0) & (right == 0)",
        REMOVAL,
    ),
    Mutant(
        "convolution: groups need not keep the same width",
        "fxprune/structure/rules/convolution.py",
        "    flow.merge(node, incoming[:1].expand_as(incoming), incoming)\n",
        "",
        REMOVAL,
    ),
    Mutant(
        "convolution: its input channels do not meet the weight's",
        "fxprune/structure/rules/convolution.py",
        "flow.align(node, [(operand, channel), (weight, 1 - wide)], channel)",
        "flow.align(node, [(weight, 1 - wide)], channel)",
        REMOVAL,
    ),
    Mutant(
        "batch norm: the running variance stays whole",
        "fxprune/structure/rules/normalisation.py",
        'names = ("weight", "bias", "running_mean", "running_var")',
        'names = ("weight", "bias", "running_mean")',
        REMOVAL,
    ),
    Mutant(
        "layer norm: it is not said to mix",
        "fxprune/structure/rules/normalisation.py",
        "        aligned = flow.align(node, met, dim)\n        flow.mix(node, aligned)\n",
        "        aligned = flow.align(node, met, dim)\n",
        REMOVAL,
    ),
    Mutant(
        "softmax: the dimension that it shares out may shrink",
        "fxprune/structure/rules/normalisation.py",
        '    flow.freeze(node, operand.at(dim), "a softmax normalises along it")\n',
        "",
        REMOVAL,
    ),
    Mutant(
        "reshape: a position may belong to two units",
        "fxprune/structure/rules/movement.py",
        "return Labels(shape, flow.sole(node, entries))",
        "return Labels(shape, flow.sole(node, ()) + entries)",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention: grouped queries meet keys in the wrong order",
        "fxprune/structure/rules/contraction.py",
        "entry.ids.repeat_interleave(times)",
        "entry.ids.repeat(times)",
        "tests/test_attention.py",
    ),
    Mutant(
        "attention: the scale follows the head's width",
        "fxprune/structure/rules/contraction.py",
        'node.update_kwarg("scale", 1.0 / math.sqrt(width))',
        'node.update_kwarg("scale", None)',
        "tests/test_attention.py",
    ),
    Mutant(
        "pad: what is cut from the front is counted at the back",
        "fxprune/structure/rules/padding.py",
        "amounts[position] = int(mask[:before].sum())",
        "amounts[position] = int(mask[mask.numel() - before :].sum())",
        REMOVAL,
    ),
    Mutant(
        "pad: the shortcut's zero channels stay",
        "fxprune/structure/rules/padding.py",
        "amounts[position + 1] = int(mask[mask.numel() - after :].sum())",
        "amounts[position + 1] = after",
        REMOVAL,
    ),
    Mutant(
        "group norm: the number of groups stays",
        "fxprune/structure/rules/normalisation.py",
        "node.update_arg(1, int(mask.view(groups, -1).any(1).sum()))",
        "node.update_arg(1, groups)",
        REMOVAL,
    ),
    Mutant(
        "split: every piece loses what the first one loses",
        "fxprune/structure/rules/movement.py",
        "piece) for piece in range(len(remaining.before))]\n    if any(",
        "0) for piece in range(len(remaining.before))]\n    if any(",
        REMOVAL,
    ),
    Mutant(
        "removal: a tied weight is sliced under each of its names",
        "fxprune/structure/removal.py",
        "if id(tensor) not in sliced:",
        "if True:",
        REMOVAL,
    ),
    Mutant(
        "removal: what is left forgets earlier cuts",
        "fxprune/structure/removal.py",
        "indices[node.name][dim] = before[mask]",
        "indices[node.name][dim] = torch.arange(mask.numel())[mask]",
        REMOVAL,
    ),
    Mutant(
        "surgery: aliases of a replaced tensor keep the old one",
        "fxprune/graph/surgery.py",
        "            if tensor is old:\n                setattr(submodule, key, value)\n"
        "    for submodule in list(module.modules()):  # constants",
        "            if tensor is old and submodule is owner:\n"
        "                setattr(submodule, key, value)\n"
        "    for submodule in list(module.modules()):  # constants",
        "tests/test_surgery.py",
    ),
    Mutant(
        "cost: a convolution's groups are ignored",
        "fxprune/graph/macs.py",
        "return [(*every_dimension(source), *every_dimension(weight)[1:])]",
        "return [(*every_dimension(source), *every_dimension(node)[1:2])]",
        "tests/test_cost.py",
    ),
    Mutant(
        "least squares: the bias is fitted without the means",
        "fxprune/calibration/least_squares.py",
        "used = moments.centred() if bias else moments",
        "used = moments",
        "tests/test_least_squares.py",
    ),
    Mutant(
        "least squares: the ridge is absolute",
        "fxprune/calibration/least_squares.py",
        "(max(ridge, MIN_RELATIVE_RIDGE) * scale)",
        "(max(ridge, MIN_RELATIVE_RIDGE) * torch.ones_like(scale))",
        "tests/test_least_squares.py",
    ),
    Mutant(
        "trace: evaluation mode is not restored",
        "fxprune/graph/trace.py",
        "            module.training = mode\n",
        "            module.training = False\n",
        "tests/test_trace.py",
    ),
    Mutant(
        "output: a run that fails leaves its files",
        "fxprune/run/output.py",
        "finally:\n        shutil.rmtree(staging, ignore_errors=True)\n        drop_empty(made)",
        "finally:\n        drop_empty(made)",
        "tests/test_output.py",
    ),
    Mutant(
        "branches: what is read elsewhere goes too",
        "fxprune/structure/branches.py",
        " if _is_closed(inside, add) else ()",
        "",
        BRANCHES,
    ),
    Mutant(
        "branches: sums that broadcast count",
        "fxprune/structure/branches.py",
        " or shapes[0] is None or shapes[0] != shapes[1]",
        " or shapes[0] is None",
        BRANCHES,
    ),
    Mutant(
        "branches: sums with a factor count",
        "fxprune/structure/branches.py",
        'argument(add, "alpha") not in (None, 1) or ',
        "",
        BRANCHES,
    ),
    Mutant(
        "branches: attention that goes leaves its products",
        "fxprune/graph/surgery.py",
        "eliminate_dead_code(lambda node: node.is_impure(impure_random=False))",
        "eliminate_dead_code()",
        BRANCHES,
    ),
)
