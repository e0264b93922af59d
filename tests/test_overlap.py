"""Held-out rows that the fit has seen: found in every form they can be written in, and no others."""

from __future__ import annotations

import csv
import itertools
import random
import tracemalloc

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import WORDS

from interp_rlhf.concepts.examples import make_examples
from interp_rlhf.validation.overlap import Overlap, overlap, require_apart, spoken

ASK, ANSWER = "Is a walk good for you?", "Yes, an hour of it lifts the mood, and it costs nothing."
OTHER_ASK, OTHER_ANSWER = "Who wrote Faust?", "Goethe did, over almost sixty years of his life."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


FORMS = {
    "messages": lambda p, a: {"messages": [user(p), assistant(a)]},
    "messages of parts": lambda p, a: {"messages": [user([{"type": "text", "text": p}]), assistant([a])]},
    "conversational": lambda p, a: {"prompt": [user(p)], "completion": [assistant(a)]},
    "mixed": lambda p, a: {"prompt": [user(p)], "completion": a},
    "plain": lambda p, a: {"prompt": p, "completion": a},
    "with a space": lambda p, a: {"prompt": p + " ", "completion": "\n" + a.replace(" ", "  ")},
    "capitals": lambda p, a: {"prompt": p.upper(), "completion": a.upper()},
    "zero-width": lambda p, a: {"prompt": p.replace("a", "a\u200b"), "completion": a.replace("s", "s\u00ad")},
    "with ids and tools": lambda p, a: {"prompt": p, "completion": a, "completion_ids": [1], "tools": []},
    "dialogue": lambda p, a: {"text": f"\n\nHuman: {p}\n\nAssistant: {a}"},
    "text": lambda p, a: {"text": f"{p} {a}"},
    "text without a space": lambda p, a: {"text": p + a},
    "ChatML": lambda p, a: {
        "text": f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{a}<|im_end|>"
    },
    "Zephyr": lambda p, a: {"text": f"<|user|>\n{p}</s>\n<|assistant|>\n{a}</s>"},
    "Gemma": lambda p, a: {
        "text": f"<bos><start_of_turn>user\n{p}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n"
    },
    "Mistral": lambda p, a: {"text": f"<s>[INST] {p} [/INST] {a}</s>"},
    "Llama 3": lambda p, a: {
        "text": f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{p}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>"
    },
    "rendered prompt": lambda p, a: {
        "prompt": f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n",
        "completion": a,
    },
    "the answer alone": lambda p, a: {"text": a},
}


def examples(*rows):
    """Rows that are given and one more, so that there are two labels; the last is row `len(rows)`."""
    extra = {"prompt": f"only here {random.Random(repr(rows)).random()}", "completion": "x"}
    return make_examples([*({**row, "label": 1} for row in rows), {**extra, "label": 0}])


def comparable(first, second):
    """Not of two texts: an answer alone and the text that it ends, or a text that lacks a space and one that has it."""
    texts = all("text" in FORMS[form]("p", "a") for form in (first, second))
    return not texts or first == second or not {"the answer alone", "text without a space"} & {first, second}


@pytest.mark.parametrize("first", FORMS)
def test_a_row_is_found_in_every_form(first):
    fit = examples(FORMS[first](OTHER_ASK, OTHER_ANSWER), FORMS[first](ASK, ANSWER))
    forms = [form for form in FORMS if comparable(first, form)]
    found = overlap(fit, examples(*(FORMS[form](ASK, ANSWER) for form in forms)))
    assert [forms[i] for i in found.rows] == forms
    with pytest.raises(ValueError, match=r"^1 rows .*are among the fit's, the first is row 1, '.*Remove them"):
        require_apart(fit, examples({"text": "new"}, FORMS[first](ASK, ANSWER)))


def test_other_rows_in_any_form_are_no_alarm():
    fit = examples(*(form(ASK, ANSWER) for form in FORMS.values()))
    held_out = examples(*(form(OTHER_ASK, OTHER_ANSWER) for form in FORMS.values()))
    assert overlap(fit, held_out) == Overlap([], [], [])
    assert require_apart(fit, held_out) == []


def test_what_is_said_by_hand():
    assert spoken({"text": " Straße  ﬁne\u00a0"}) == ("", "strasse fine")
    turns = [{"role": "system", "content": "Be\nkind."}, user("Hi"), assistant("Hello"), user("Sing")]
    assert spoken({"messages": [*turns, assistant("La LA")]}) == ("be kind. hi hello sing", "la la")
    assert spoken({"prompt": "", "completion": "La"}) == spoken({"messages": [assistant("La")]}) == ("", "la")
    assert spoken({"text": "<|im_start|>user\nUser guide?<|im_end|>"}) == ("", "user guide?")
    assert spoken({"text": "The user: a study"}) == ("", "the user: a study")  # no dialogue: nobody answers
    assert spoken({"text": "</s>"}) == ("", "</s>")  # all that is said
    assert spoken({"text": "broken \ud83d"}) == ("", "broken \ud83d")
    with pytest.raises(ValueError, match="expected one of `text`, `messages`, or `prompt` and `completion`"):
        spoken({"prompt": "Hi", "completion_ids": [1, 2]})


def test_short_equal_answers_to_other_prompts_are_no_leak():
    fit = examples({"prompt": "Is ice cold?", "completion": "Yes."})
    assert overlap(fit, examples({"prompt": "Is fire hot?", "completion": "yes"})) == Overlap([], [], [])
    assert overlap(fit, examples({"text": "Yes."})) == Overlap([], [], [])
    assert overlap(examples({"text": "Yes."}), examples({"text": "YES. "})).rows == [0]


def test_a_long_equal_answer_to_another_prompt_is_a_near_duplicate():
    fit, held_out = (examples({"prompt": ask, "completion": ANSWER}) for ask in (ASK, OTHER_ASK))
    assert overlap(fit, held_out) == Overlap([], [], [(0, 0, 1.0)])


def test_a_seen_prompt_with_another_answer_is_named():
    fit = examples({"prompt": ASK, "completion": ANSWER})
    held_out = examples({"text": "quite another text"}, FORMS["capitals"](ASK, OTHER_ANSWER))
    assert overlap(fit, held_out) == Overlap([], [1], [])
    with pytest.raises(
        ValueError,
        match=r"^1 prompts of the completions are among the fit's, the first is row 1, 'is a walk good for you\? goethe "
        r"did, over almost sixty years…' – expected data that the fit did not see: answers to one prompt are alike",
    ):
        require_apart(fit, held_out, "completions")
    assert (
        overlap(examples({"prompt": "", "completion": "A"}), examples({"prompt": [], "completion": "B"})).prompts == []
    )


def test_a_part_that_is_no_text_is_named_with_its_row():
    picture = {"messages": [user([{"type": "image"}]), assistant("A cat.")]}
    with pytest.raises(ValueError, match=r"^Row 1 of the held-out examples: a message has a part of type `image`"):
        overlap(examples({"text": "a"}), examples({"text": "b"}, picture))


def passage(seed, count=40):
    return " ".join(random.Random(seed).choices([a + b for a in WORDS for b in WORDS], k=count))


def test_one_changed_word_in_a_long_answer_is_a_near_duplicate_of_the_row_it_was():
    fit = make_examples([{"prompt": f"a {i}", "completion": passage(i), "label": i % 2} for i in range(30)])
    new = [passage(seed) for seed in range(100, 120)]
    new[7] = passage(13).replace(passage(13).split()[20], "changed", 1)
    for form in ("messages", "plain", "the answer alone", "Mistral"):
        held_out = make_examples([{**FORMS[form](f"b {i}", text), "label": i % 2} for i, text in enumerate(new)])
        ((row, other, similarity),) = require_apart(fit, held_out)
        assert (row, other) == (7, 13)
        assert 0.8 <= similarity < 1


def test_similarity_by_hand():
    # 60 letters have 56 shingles. The last letter is in one of them: 55 in both, 57 in all.
    letters = "".join(chr(0x4E00 + i) for i in range(60))  # Chinese, without spaces
    held_out = examples({"text": letters[:-1] + "x"})
    assert overlap(examples({"text": "other"}, {"text": letters}), held_out).near == [(0, 1, round(55 / 57, 4))]
    # The middle letter is in five: 51 in both, 61 in all. Two such letters: 46 of 66, less than 0.8.
    one = letters[:20] + "x" + letters[21:]
    two = one[:40] + "y" + one[41:]
    assert overlap(examples({"text": letters}), examples({"text": one})).near == [(0, 0, round(51 / 61, 4))]
    assert overlap(examples({"text": letters}), examples({"text": two})).near == []
    # The best of several, the first of equals.
    many = examples({"text": two}, {"text": letters}, {"text": letters.upper()})
    assert overlap(many, examples({"text": letters[:-1] + "x"})).near == [(0, 1, round(55 / 57, 4))]


def test_what_all_rows_share_makes_no_near_duplicates():
    shots = " ".join(f"Q: {passage(900 + i, 8)} A: {passage(950 + i, 8)}" for i in range(8))
    system = {"role": "system", "content": shots}

    def side(start, form):
        rows = []
        for i in range(start, start + 40):
            ask, answer = passage(i, 4), passage(i + 500, 6)
            prompt = f"{shots} Q: {ask} A:" if form == "few-shot" else [system, user(ask)]
            rows.append({"prompt": prompt, "completion": answer, "label": i % 2})
        return make_examples(rows)

    for form in ("few-shot", "system"):
        assert overlap(side(0, form), side(100, form)) == Overlap([], [], [])


def test_statements_of_one_template_about_other_cities_are_not_near_each_other(data):
    with (data / "truth" / "got_cities.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cities = sorted({row["city"] for row in rows})
    chosen = set(random.Random(1).sample(cities, len(cities) // 2))
    halves = [
        make_examples(
            [{"text": row["statement"], "label": row["label"]} for row in rows if (row["city"] in chosen) == own]
        )
        for own in (True, False)
    ]
    assert overlap(*halves) == Overlap([], [], [])


def test_reviews_of_other_films_are_no_near_duplicates(data):
    rows = []
    for label, name in enumerate(("neg", "pos")):
        text = (data / "sentiment" / f"rt_polarity_{name}.txt").read_text(encoding="utf-8", errors="replace")
        rows += [{"text": line, "label": label} for line in text.splitlines()[:1500] if line.strip()]
    random.Random(0).shuffle(rows)
    assert require_apart(make_examples(rows[::2]), make_examples(rows[1::2])) == []


def test_many_rows_take_no_matrix_of_all_pairs():
    vocabulary = [a + b for a in WORDS for b in WORDS]
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(vocabulary, k=12)), "label": i % 2} for i in range(4000)]
    rows[3500] = {**rows[17], "text": rows[17]["text"] + "s"}
    fit, held_out = make_examples(rows[:3000]), make_examples(rows[3000:])
    tracemalloc.start()
    found = overlap(fit, held_out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row, other) for row, other, _ in found.near] == [(500, 17)]
    assert found == overlap(fit, held_out)
    assert peak < 300e6, "columns take 32 MB a piece, and do not grow with the rows"


letters = st.characters(categories=["Lu", "Ll", "Lo", "Nd", "Po"], max_codepoint=0x9FFF)
words = st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    prompt=words,
    answer=words,
    white=st.lists(st.text(" \t\n\u00a0\u2003\u3000", min_size=1, max_size=3), min_size=1, max_size=4),
    change=st.sampled_from([str.upper, str.lower, str.swapcase, str.title]),
    forms=st.tuples(*[st.sampled_from(["messages", "conversational", "plain", "text"])] * 2),
)
def test_case_and_white_space_never_hide_a_row(prompt, answer, white, change, forms):
    def written(parts):
        spaces = itertools.cycle(white)
        return "".join(next(spaces) + change(part) for part in parts) + next(spaces)

    for part in (*prompt, *answer):  # not so of a dotless i, whose capital is I
        assume(change(part).casefold() == part.casefold())
    fit = examples(FORMS[forms[0]](" ".join(prompt), " ".join(answer)))
    held_out = examples(FORMS[forms[1]](written(prompt), written(answer)))
    assert overlap(fit, held_out).rows[:1] == [0]
