"""Messages of jsonargparse, of its oldest and newest version that we take, as two lines."""

import pytest

from recis_lightning.cli.mistakes import Mistake, leave, of_files, of_parser

OPTIONS = ["trainer.max_epochs", "trainer.callbacks", "model"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("Subcommand 'fit' does not accept option 'trainer.max_epoch'",
         "trainer.max_epoch: there is no such setting", "did you mean trainer.max_epochs?"),
        ("Validation failed: Subcommand 'fit' does not accept nested key 'trainer.max_epoch'",
         "trainer.max_epoch: there is no such setting", "did you mean trainer.max_epochs?"),
        ("Unrecognized arguments: --modle x", "modle: there is no such setting",
         "did you mean model?"),
        ("unrecognized arguments: stray", "stray: expected an option such as "
         "--trainer.max_epochs 3", None),
        ('Parser key "trainer.max_epochs":\n  Does not validate against any of the Union subtypes\n'
         "  Subtypes: [<class 'NoneType'>, <class 'int'>]\n  Errors:\n    - Expected a ...\n"
         "  Given value type: <class 'str'>\n  Given value: many",
         "trainer.max_epochs: expected None or int, got many", None),
        ('Parser key "model":\n  Errors:\n    - Problem with given class_path \'a.b.Model\':\n'
         "        No module named 'a'",
         "model: there is no module a, of the class a.b.Model",
         "modules are looked for in the current folder, and where Python finds them"),
        ("something\nnobody expected", "something\nnobody expected", None),
    ],
)  # fmt: skip
def test_a_message_becomes_its_place_and_what_is_wrong(text, message, hint):
    assert of_parser(text, OPTIONS, ["LoggerHook"])[:2] == (message, hint)


def test_the_line_of_a_file_is_named_only_where_it_is_certain(tmp_path):
    mistake = Mistake("log_steps: there is no such setting", None, ("log_steps",))
    once, twice = tmp_path / "once.yaml", tmp_path / "twice.yaml"
    once.write_text("a: 1\nlog_steps: 3\nlog_steps_too: 3\n")
    twice.write_text("log_steps: 1\nb: {log_steps: 2}\n")
    assert of_files([str(once)], mistake).message.startswith(f"{once}, line 2: log_steps")
    assert of_files([str(twice)], mistake) == mistake
    assert of_files([str(once), str(twice)], mistake) == mistake
    assert of_files([str(tmp_path / "none.yaml")], mistake) == mistake
    assert of_files([], mistake) == mistake


def test_two_lines_and_status_2(capsys):
    with pytest.raises(SystemExit) as done:
        leave("recis-lightning fit", Mistake("a\n  message of\nlines"))
    assert done.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "recis-lightning fit: error: a message of lines",
        "hint: recis-lightning fit --help lists the settings",
    ]


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            "the following arguments are required: embedding_dim",
            "embeddings: EmbeddingOption: embedding_dim: a value is required",
        ),
        (
            "Not a valid subclass of EmbeddingOption. Got value: [4]",
            "embeddings: EmbeddingOption: expected EmbeddingOption, got [4]",
        ),
    ],
)
def test_the_innermost_mistake_is_said(inner, message):
    text = (
        "Parser key \"embeddings\":\n  Problem with given class_path 'x.EmbeddingOption':\n    "
        f"{inner}\n  - Expected a <class 'NoneType'>\n  Given value: Namespace(embedding_dim=None)"
    )
    assert of_parser(text, [], []).message == message


@pytest.mark.parametrize(
    ("option", "message", "example"),
    [
        ("log_step", "trainer.callbacks: the class_path of log_step is missing",
         "{class_path: LoggerHook, init_args: {log_step: ...}}"),
        ("ProfilerHook.wait", "trainer.callbacks: the class_path of ProfilerHook is missing",
         "{class_path: ProfilerHook, init_args: {wait: ...}}"),
    ],
)  # fmt: skip
def test_arguments_without_a_class_say_so(option, message, example):
    text = (
        'Parser key "trainer.callbacks":\n  Problem with given class_path '
        f"'lightning.pytorch.callbacks.Callback':\n    Key '{option}' is not expected"
    )
    mistake = of_parser(text, [], ["ProfilerHook"])
    assert mistake.message == message
    assert mistake.hint == f"write the class beside its arguments, as in {example}"


def test_of_several_settings_that_a_class_lacks_the_first_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "columns:\n"
        "  - {class_path: Number, init_args: {name: price, default: 0}}\n"
        "  - {class_path: a.b.Label, init_args: {name: click, default: 0}}\n"
        "  - {class_path: Label, init_args: {name: buy, default: 0}}\n"
    )
    text = (
        "Parser key \"data.columns\":\n  Problem with given class_path 'a.b.Label':\n"
        "    Key 'default' is not expected"
    )
    mistake = of_files([str(path)], of_parser(text, [], []))
    assert mistake.message.startswith(f"{path}, line 3: data.columns: Label: default: there is no")


def test_a_member_of_a_list_that_lacks_its_class_is_named_first(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("columns:\n- {class_path: Id, init_args: {name: user}}\n- {name: item}\n")
    mistake = of_files([str(path)], Mistake("columns: expected Features, got a dict"))
    assert mistake.message == f"{path}, line 3: the class_path of name is missing"
    assert mistake.hint.endswith("as in {class_path: Id, init_args: {name: ...}}")
    known = Mistake("columns: the class_path of name is missing")
    assert of_files([str(path)], known) == known
