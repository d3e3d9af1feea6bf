"""Files of settings that nothing should parse."""

import pytest

from recis_lightning.cli.settings_files import config_files, settings_files, unreadable

BOMB = ["a: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
BOMB += [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 7)]

UNREADABLE = {
    "latin": (b"# settings\nmodel: \xe9\n", "line 2: this is no UTF-8"),
    "utf16": ("a: 1".encode("utf-16"), "line 1: this is no UTF-8"),
    "in_a_mapping": (b"trainer: &a\n  x: *a\n", "line 1: this value has an alias"),
    "in_a_list": (b"a: 1\nb: &a [*a]\n", "line 2: this value has an alias"),
    "through_another": (b"a: &a {b: &b [{c: *a}]}\n", "line 1: this value has an alias"),
    "bomb": ("\n".join(BOMB).encode(), "its aliases (*) stand for 12,"),
    "deep": (b"[" * 150 + b"]" * 150, "more than 100 levels deep"),
    "deeper": (b"[" * 600 + b"]" * 600, "more than 100 levels deep"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_must_not_be_parsed_is_said_with_its_place(name, tmp_path):
    content, words = UNREADABLE[name]
    good, path = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("trainer: {max_epochs: 1}\n")
    path.write_bytes(content)
    mistake = unreadable([str(good), str(path)])
    assert mistake.message.startswith(str(path))
    assert words in mistake.message
    assert mistake.hint


@pytest.mark.parametrize(
    "text",
    ["", "a: 1", "a: &a [1, 2]\nb: *a\nc: [*a, *a, {d: *a}]\n", "\ufeffa: é", "a: [1", "a: *none"],
)
def test_what_is_right_or_merely_wrong_is_left_to_the_parser(text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    assert unreadable([str(path)]) is None


def test_files_that_a_command_line_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "b.yaml", "c", "d.yml"):
        (tmp_path / name).write_text("a: 1")
    words = ["fit", "-c", "a.yaml", "--config=c", "--data", "b.yaml", "--model=d.yml", "none.yaml"]
    assert config_files(words) == ["a.yaml", "c"]
    assert settings_files([*words, "x" * 5000 + ".yaml"]) == ["a.yaml", "c", "b.yaml", "d.yml"]


def test_a_key_that_is_there_twice(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trainer:\n  max_epochs: 1\nmodel: {lr: 1}\ntrainer:\n  devices: 2\n")
    assert unreadable([str(path)]).message == f"{path}, line 4: trainer is set here, and in line 1"
    path.write_text("a: &x {lr: 1}\nb: {<<: *x, lr: 2}\nc: {lr: 3}\n")
    assert unreadable([str(path)]) is None
