"""A page is written in one step."""

from __future__ import annotations

from pathlib import Path

from rlhf.run import page


def test_a_link_of_a_pages_name_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    other, report = tmp_path / "other.txt", tmp_path / "report.html"
    other.write_text("precious")
    report.symlink_to(other)
    report.with_name(".report.html.writing").symlink_to(other)
    assert page.write(report, "new") == report
    assert not report.is_symlink()
    assert (report.read_text(), other.read_text()) == ("new", "precious")
    assert page.write(report, "caf\udce9").read_text() == r"caf\udce9"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.txt", "report.html"]
