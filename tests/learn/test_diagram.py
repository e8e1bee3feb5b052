"""docs/diagram.svg: its functions are numpygpt's, its parameters too, and it has colours for light and dark."""

import re
import xml.etree.ElementTree as ElementTree

import numpygpt
from numpygpt import GPTConfig, param_shapes
from tests.runs import ROOT

SVG = (ROOT / "docs/diagram.svg").read_text(encoding="utf-8")


def test_functions_are_numpygpts() -> None:
    """Each that is named exists, with its mirror; and none of the model's is missing, except dropout, as it says."""
    named = set(re.findall(r"\w+_(?:forward|backward)", SVG))
    pairs = {name for name in vars(numpygpt) if name.endswith(("_forward", "_backward"))}
    assert pairs - named == {"dropout_forward", "dropout_backward"}
    assert named <= pairs


def test_parameters_are_numpygpts() -> None:
    """Every matrix of a block stands there with its name and shape."""
    sizes = {"C": 6, "3C": 18, "4C": 24}
    shapes = param_shapes(GPTConfig(vocab_size=11, block_size=7, n_layer=1, n_head=2, n_embd=sizes["C"]))
    drawn = re.findall(r"((?:attn|mlp)\.c_\w+\.weight) \((\w+), (\w+)\)", SVG)
    assert {f"h.0.{name}": (sizes[a], sizes[b]) for name, a, b in drawn} == {
        name: shape for name, shape in shapes.items() if name.startswith("h.") and len(shape) == 2
    }


def test_it_needs_nothing_else() -> None:
    """Well-formed, no wider than README, with both colour schemes, and no link to anything outside."""
    root = ElementTree.fromstring(SVG)
    assert float(root.attrib["width"]) <= 880
    assert "@media (prefers-color-scheme: dark)" in SVG
    assert "href" not in SVG
    assert "url(http" not in SVG
