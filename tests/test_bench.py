"""The benchmark runs on small inputs, compares before it counts, and names what is missing."""

import json

import pytest
from conftest import ragged_rows, write_rows
from test_memo import made

from engine import bench
from engine.errors import BUG, ENVIRONMENT, EngineError


@pytest.fixture
def inputs(tmp_path):
    made("smollm2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}')
    rows = [*ragged_rows(40), {"instruction": "red\n\n  dog", "input": "x", "output": "é <|im_end|> 中文  red"}]
    return ["data", "--model", str(tmp_path), "--rows", str(write_rows(tmp_path / "rows.jsonl", rows)), "--rounds", "1"]


def test_rows_a_second(inputs, capsys):
    bench.main(inputs)
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in table][:4] == ["side", *(text for side, (text, _) in bench.SIDES.items() if side in ("ours", "apart", "together"))]
    assert all(float(row[1].replace(",", "")) > 0 for row in table[1:]) and table[-1][0].strip() == bench.SIDES["cached"][0]


def test_figures_of_sides_that_differ_are_not_printed(inputs, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_timed", lambda args, side, folder: {"seconds": 1.0})
    monkeypatch.setattr(bench, "_differing", lambda one, other: 3 if other.parent.name == "apart" else 0)
    with pytest.raises(EngineError, match="3 rows have other ids or masks in transformers") as caught:
        bench.main(inputs)
    assert caught.value.exit_code == BUG and not capsys.readouterr().out


@pytest.mark.parametrize(("ids", "masks", "count"), [([1, 2, 3], [0, 1, 1], 0), ([1, 2, 4], [0, 1, 1], 1), ([1, 2, 3], [0, 0, 1], 1),
                                                     ([5, 2, 4], [1, 1, 1], 2)])
def test_rows_that_differ_are_counted(tmp_path, ids, masks, count):
    for name, values in (("one", ([1, 2, 3], [0, 1, 1])), ("other", (ids, masks))):
        (tmp_path / name).mkdir()
        bench._save(tmp_path / name, *map(bench.np.array, (*values, [1, 2])))
    assert bench._differing(tmp_path / "one", tmp_path / "other") == count


def test_what_is_missing_is_named(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.errors.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(EngineError, match=r"needs the package transformers: pip install -c constraints.txt -e '.\[dev\]'") as caught:
        bench.main(inputs)
    assert caught.value.exit_code == ENVIRONMENT
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="has no tokenizer.json"):
        bench.main(inputs)
    for wrong in (["data"], ["speed"], [], [*inputs, "--rounds", "0"]):
        with pytest.raises(EngineError, match="E-BENCH-ARGUMENTS"):
            bench.main(wrong)


def test_a_side_that_fails_says_why(inputs, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a"}) + "\n")
    with pytest.raises(EngineError, match="ours: ended with exit code 2: ERROR E-DATA-ROW"):
        bench.main(inputs)
