"""Files of a deployment: written whole, locked, followed, and distinguished from others'."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, default_state_dir, known_names, take_lock, write_whole
from moe_operator.local.logs import Follower, read_tail
from moe_operator.local.record import Alive, find_process, identify, load_record


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(root=tmp_path, name="a")
    made.make()
    return made


def test_the_state_folder_follows_the_xdg_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_state_dir() == Path("/somewhere/moeserving")
    for unset in ("", "not/absolute"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert default_state_dir() == Path.home() / ".local" / "state" / "moeserving"


def test_a_file_is_replaced_whole_and_readable_by_its_owner_alone(folder: Folder) -> None:
    write_whole(folder.token, "one")
    with folder.token.open() as before:
        write_whole(folder.token, "two")
        assert before.read() == "one"
    assert folder.token.read_text() == "two"
    assert folder.token.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in folder.path.iterdir()] == ["token"]


def test_a_lock_is_held_once_until_every_holder_has_closed_it(folder: Folder) -> None:
    lock = take_lock(folder.lock)
    assert lock is not None
    assert take_lock(folder.lock) is None
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(lock,)) as heir:
        os.close(lock)
        assert take_lock(folder.lock) is None
        heir.communicate(b"\n")
    again = take_lock(folder.lock)
    assert again is not None
    os.close(again)


def test_a_folder_that_cannot_be_made_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(Failure, match=r"cannot make .*: file exists"):
        Folder(root=tmp_path, name="a").make()


def test_deployments_are_known_by_their_state(folder: Folder) -> None:
    assert known_names(folder.root / "absent") == []
    folder.lock.touch()
    assert known_names(folder.root) == []
    assert known_names(folder.root, stopped=True) == ["a"]
    folder.state.touch()
    assert known_names(folder.root) == ["a"]


def test_a_state_of_another_kind_is_a_line(folder: Folder) -> None:
    assert load_record(folder) is None
    folder.state.write_text('{"name": 1}')
    with pytest.raises(Failure, match="is not a state of this version"):
        load_record(folder)


def test_a_process_differs_from_a_later_one_with_its_id() -> None:
    alive = identify(os.getpid())
    assert find_process(alive) is not None
    assert find_process(Alive(pid=alive.pid, started=alive.started - 10)) is None
    assert find_process(None) is None


def test_an_ended_process_is_gone_before_and_after_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        alive = identify(child.pid)
        assert find_process(alive) is not None
        assert child.stdin is not None
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert find_process(alive) is None
    assert find_process(alive) is None
    assert find_process(identify(child.pid)) is None


def test_the_last_lines_are_read_and_an_absent_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    assert read_tail(path, 2) == []
    path.write_bytes(b"one\ntwo\n\xffthree\n")
    assert read_tail(path, 2) == ["two", "\ufffdthree"]
    assert read_tail(path, 0) == []


def test_a_follower_gives_whole_lines_also_of_a_file_that_took_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    follower = Follower(path, 0)
    assert follower.read_new() == []
    path.write_text("one\ntw")
    assert follower.read_new() == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert follower.read_new() == ["two"]
    path.rename(tmp_path / "a.log.1")
    path.write_text("three\n")
    assert follower.read_new() == ["three"]
    os.truncate(path, 0)
    path.write_text("4\n")
    assert follower.read_new() == ["4"]
