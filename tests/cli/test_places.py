"""Places in files of settings: of what a class refuses, and of files that are missing."""

import pytest

from recis_lightning.cli.places import classless, lines_of, place_of, place_of_value

SETTINGS = """\
trainer:
  callbacks:
    - class_path: HashTableFilterHook
      init_args: {filter_interval: 0}
model:
  class_path: my.Model
  init_args:
    lr: -0.5
    embeddings:
      user: {embedding_dim: 4}
      item: {embedding_dim: 0}
data:
  class_path: ColumnarDataModule
  init_args:
    batch_size: 4
    columns:
      - class_path: recis_lightning.data.Id
        init_args: {name: user, hash: md5}
      - {class_path: recis_lightning.data.Id, init_args: {name: item, hash: xxh64}}
"""


@pytest.mark.parametrize(
    ("owner", "message", "place"),
    [
        (
            "HashTableFilterHook",
            "filter_interval: expected an int, got 0",
            "4: trainer.callbacks.0",
        ),
        ("Id", "hash: expected one of ['xxh64'], got 'md5'", "18: data.columns.0"),
        ("EmbeddingOption", "embedding_dim: expected an int, got 0", "11: model.embeddings.item"),
        ("SparseAdamW", "lr: expected a number >= 0, got -0.5", "8: model"),
        ("Features", "columns: expected each name once, got ['a'] more than once", "16: data"),
        ("Id", "hash: expected a str, got 3", None),  # of two columns
        ("Id", "expected something", None),
        ("HashTableFilterHook", "filter_interval: an int, got -7", None),  # of the command line
        ("Trainer", "devices: expected an int, got 0", None),
    ],
)
def test_the_place_of_a_refused_value(owner, message, place, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(SETTINGS)
    expected = None if place is None else f"{path}, line {place}"
    assert place_of([str(path)], owner, message) == expected


DATA = """\
data:
  class_path: ColumnarDataModule
  init_args:
    train: [a.parquet, none/*.parquet]
    val: none/*.orc
    filter: "country == 'DE' AND price > 1"
    features:
      class_path: Features
      init_args:
        columns:
          - class_path: recis_lightning.data.Label
            init_args:
              name: click
              default: 0
          - {class_path: Label, init_args: {name: buy, default: 1}}
          - {class_path: Number, init_args: {name: price, default: 1}}
        transforms:
          - {class_path: recis_lightning.data.Mod, init_args: {name: usr, modulus: 5}}
model:
  init_args: {embeddings: {user: {rows: "file:/tmp?mem=3"}}}
"""


@pytest.mark.parametrize(
    ("owner", "message", "place"),
    [
        ("Features", "transform Mod 'usr': expected sources among ['user'], got ['usr']",
         "18: data.features.transforms.0"),
        ("ColumnarDataModule", "filter: expected comparisons, got \"country == 'DE' AND price > 1"
         "\", wrong at 'AND price'; 'and' is written small", "6: data"),
        ("EmbeddingOption", "rows: expected 'file:/folder', got 'file:/tmp?mem=3': what follows "
         "'?' is one option", "20: model.embeddings.user"),
        ("ColumnarDataModule", "columns: expected columns or features, got neither", "2: data"),
        ("Features", "columns: expected columns or features, got neither", "8: data.features"),
    ],
)  # fmt: skip
def test_the_place_of_what_is_wrong_in_a_longer_value(owner, message, place, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(DATA)
    assert place_of([str(path)], owner, message) == f"{path}, line {place}"


def test_what_the_command_line_says_is_in_no_file(tmp_path):
    path = tmp_path / "filter_interval.yaml"
    path.write_text(SETTINGS)
    refused = ([str(path)], "HashTableFilterHook", "filter_interval: expected an int >= 1, got 0")
    assert place_of(*refused, ["fit", "-c", str(path)]).endswith("line 4: trainer.callbacks.0")
    for words in (
        ["--trainer.callbacks.filter_interval=0"],
        ["--trainer.callbacks.filter_interval", "0"],
        [
            "--trainer.callbacks",
            "{class_path: HashTableFilterHook, init_args: {filter_interval: 0}}",
        ],
    ):
        assert place_of(*refused, ["fit", "-c", str(path), *words]) is None


def test_the_place_of_a_missing_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(DATA)
    files = [str(path)]
    assert place_of_value(files, "train", "none/*.parquet") == f"{path}, line 4"
    assert place_of_value(files, "val", "none/*.orc") == f"{path}, line 5"
    assert place_of_value(files, "val", "none/*.orc", ["--data.init_args.val=none/*.orc"]) is None
    assert place_of_value(files, "test", "none/*.orc") is None
    assert place_of_value([*files, *files], "val", "none/*.orc") is None


def test_lines_of_settings_of_a_class():
    assert lines_of(DATA, "default", "Label") == [14, 15]
    assert lines_of(DATA, "default", "Number") == [16]
    assert lines_of(DATA, "default", "Id") == []


def test_members_of_a_list_that_lack_the_class_that_others_have():
    text = "a:\n  - {class_path: Id, init_args: {name: user}}\n  - {name: item, hash: xxh64}\n"
    assert classless(text) == [(3, ["name", "hash"], "Id")]
    fine = "a: [{class_path: Id}, Id, 3, {class_path: Label}]\nb: [{c: 1}, {d: 2}]\ne: {f: 1}\n"
    assert classless(fine) == []
