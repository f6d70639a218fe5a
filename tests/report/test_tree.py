"""Trees and budget curves as SVG: well formed, whatever a model wrote, with the chosen path and the pruned nodes."""

import xml.etree.ElementTree as ET

import pytest

from jaxpost.report.budget_chart import budget_chart
from jaxpost.report.search import write_search
from jaxpost.report.search_curve import write_curve
from jaxpost.report.tree import MOST_NODES, asides, tree_svg
from jaxpost.search.contract import Found, SearchOutput
from jaxpost.search.record import tree_record
from jaxpost.search.tree import Ledger, Node, Problem

EVIL = '</title><script>alert(1)</script>&"\x00\x1b[2J\ud800\u202e' + "x" * 300


def problem_with(texts):
    root = Node(0, None, (1, 2), "")
    problem = Problem(0, "What?", root, Ledger(), str.strip)
    for text in texts:
        problem.child(root, (3,) * 4, text, score=0.25, end="step")
    return problem


def record_of(problem, best=None):
    found = Found.best([best]) if best is not None else Found(())
    return tree_record(SearchOutput(problem, found.candidates, {}))


def parts(svg: str, name: str):
    return [element for element in ET.fromstring(svg).iter() if element.get("class", "").split()[:1] == [name]]


def test_the_chosen_path_and_pruned_nodes_are_marked():
    problem = problem_with(["a", "b"])
    first, second = problem.root.children
    best = problem.child(first, (4, 5), "end", score=0.9, end="stop")
    best.back_up(0.9)
    problem.prune([second])
    svg = tree_svg(record_of(problem, best), title="What?")
    boxes = [element.get("class") for element in parts(svg, "box")]
    assert boxes == ["box chosen", "box chosen", "box chosen done", "box pruned"]
    edges = [element.get("class") for element in parts(svg, "edge")]
    assert sorted(edges) == ["edge chosen", "edge chosen", "edge pruned"]
    assert "score 0.9 · 1 visits · ends · 2 tok" in svg


def test_what_a_model_wrote_cannot_leave_its_text():
    svg = tree_svg(record_of(problem_with([EVIL])), title=EVIL)
    tree = ET.fromstring(svg)
    assert not [element for element in tree.iter() if element.tag.endswith("script")]
    titles = [element.text for element in tree.iter() if element.tag.endswith("title")]
    assert "<script>alert(1)</script>" in titles[1]
    assert "x" * 300 in titles[1], "the whole text stands in the tooltip"


def test_large_trees_are_cut_and_say_so_and_long_chains_are_one_box():
    problem = problem_with([str(i) for i in range(3 * MOST_NODES)])
    svg = tree_svg(record_of(problem))
    assert len(parts(svg, "box")) <= MOST_NODES + 1
    assert "more</text>" in svg
    root = Node(0, None, (1,), "")
    problem = Problem(0, "What?", root, Ledger(), str.strip)
    node = root
    for letter in "abcdef":
        node = problem.child(node, (7,), letter, end="step")
    svg = tree_svg(record_of(problem, node))
    assert len(parts(svg, "box")) == 2
    assert "abcdef" in svg


def test_an_empty_tree_is_a_picture_too():
    assert "the tree is empty" in tree_svg({"nodes": [], "chosen": []})
    ET.fromstring(tree_svg({}))


def test_other_prompts_that_were_asked_stand_beside_the_tree():
    problem = problem_with(["a"])
    aside = problem.child(None, (1, 2), "", facts={"prompt": [{"role": "user", "content": "Is it good?"}]})
    problem.child(aside, (3,), "yes", end="stop")
    record = record_of(problem)
    assert asides(record) == [("user: Is it good?", ["yes"])]
    assert "yes" not in tree_svg(record)


def test_curves_need_lines_and_pages_need_files(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        budget_chart([])
    with pytest.raises(FileNotFoundError, match=r"holds no results\.jsonl"):
        write_search(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no curve\.jsonl"):
        write_curve(tmp_path)


def test_many_methods_have_lines_that_differ():
    lines = [
        {"method": f"m{i}", "budget": b, "accuracy": [0.1 * i / 2, 0.0, 1.0], "tokens": [float(b), 1.0, 2.0]}
        for i in range(18)
        for b in (10, 1000)
    ]
    drawn = [(e.get("class"), e.get("stroke-dasharray")) for e in parts(budget_chart(lines), "line") if e.get("points")]
    assert len(set(drawn)) == 18
