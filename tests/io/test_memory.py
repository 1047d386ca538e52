"""How much memory files may take up, by what the kernel says in files."""

import pytest

from actcache.io import memory


def test_of_this_machine():
    assert 1 << 20 < memory.available() < 1 << 50


@pytest.mark.parametrize(
    ("own", "folder", "limit", "stat"),
    [
        ("0::/a/b", "a/b", "memory.max", "anon 1048576\nfile 4194304\n"),
        ("0::/not/seen/from/here", "", "memory.max", "anon 1048576\nfile 4194304\n"),
        ("9:cpu:/\n4:memory:/a", "memory/a", "memory.limit_in_bytes", "cache 4194304\ntotal_rss 1048576\n"),
        ("4:memory,cpu:/a", "memory", "memory.limit_in_bytes", "cache 4194304\ntotal_rss 1048576\n"),
    ],
)
def test_of_a_container(tmp_path, monkeypatch, own, folder, limit, stat):
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (tmp_path / "own").write_text(own)
    (group / limit).write_text("8388608\n")
    (group / "memory.stat").write_text(stat)
    monkeypatch.setattr(memory, "_ROOT", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "own")
    assert memory.available() == 7 << 20
    (group / limit).write_text("max\n")
    assert memory.available() > 7 << 20
    (group / limit).write_text("1000\n")
    assert memory.available() == 0
