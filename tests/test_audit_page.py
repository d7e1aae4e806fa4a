"""The audit's page: every reason is readable without a click."""

from mirepro.audit import page


def cell(row: str, verdict: str, reason: str) -> dict[str, str]:
    return {"row": row, "column": "knn_1", "verdict": verdict, "reason": reason}


def test_reasons_are_listed_once_worst_first() -> None:
    cells = [cell("a", "EXACT", "same"), cell("b", "DIVERGED", "step 4"), cell("c", "EXACT", "same"),
             cell("d", "DIVERGED", "step 4"), cell("e", "DIVERGED", "step 6"), cell("f", "FAILED", "kill")]  # fmt: skip
    found = [(group["verdict"], group["reason"], group["cells"], group["count"]) for group in page.grouped(cells)]
    assert found[0] == ("FAILED", "kill", ["f / knn_1"], 1)
    assert ("DIVERGED", "step 4", ["b / knn_1", "d / knn_1"], 2) in found
    assert found[-1] == ("EXACT", "same", [], 2)
    assert sum(count for *_, count in found) == len(cells)
    assert page.grouped(cells[:1]) != page.grouped(cells[1:2])
