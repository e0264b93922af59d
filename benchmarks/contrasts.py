"""Contrast pairs of five concepts, for `locate.py`.

In: nothing. Out: rows as `attribution_patching` takes them. Each has two prompts of equal length and two answers of one token in
SmolLM2's vocabulary.
"""

from __future__ import annotations

Row = dict[str, str]

_FILMS = (
    ("wonderful", "terrible"), ("great", "awful"), ("excellent", "horrible"), ("brilliant", "boring"), ("beautiful", "ugly"),
)  # fmt: skip
_NOUNS = (("boy", "boys"), ("car", "cars"), ("dog", "dogs"), ("teacher", "teachers"), ("book", "books"))
_LANGUAGES = (
    ("France", "French", "Germany", "German"), ("Italy", "Italian", "Spain", "Spanish"),
    ("Japan", "Japanese", "China", "Chinese"), ("Russia", "Russian", "Greece", "Greek"),
    ("Poland", "Polish", "Turkey", "Turkish"),
)  # fmt: skip


def pair(template: str, clean: str, corrupt: str, followed: str, violated: str) -> Row:
    return {
        "clean": template.format(clean), "corrupt": template.format(corrupt), "followed": f" {followed}",
        "violated": f" {violated}",
    }  # fmt: skip


_CAPITALS = (
    ("France", "Paris", "Italy", "Rome"), ("Germany", "Berlin", "England", "London"), ("Japan", "Tokyo", "Russia", "Moscow"),
    ("Spain", "Madrid", "Greece", "Athens"),
)  # fmt: skip
_NAMES = (("John", "Mary"), ("James", "Sarah"), ("Tom", "Anna"), ("David", "Alice"), ("Paul", "Jane"))
FILM = "The film was really {}. In one word, my opinion of the film is:"
TARGETED = ("sentiment", "number", "language")
CONTRASTS: dict[str, list[Row]] = {
    "sentiment": [pair(FILM, good, bad, "good", "bad") for good, bad in _FILMS],
    "number": [pair("The {} near the old river", one, many, "is", "are") for one, many in _NOUNS],
    "language": [
        pair("In {}, the official language that people speak is", one, other, spoken, other_spoken)
        for one, spoken, other, other_spoken in _LANGUAGES
    ],
    "capital": [
        pair("The capital of {} is the city of", one, other, city, other_city)
        for one, city, other, other_city in _CAPITALS
    ],
    "gender": [pair("{} went home because", he, she, "he", "she") for he, she in _NAMES],
}
