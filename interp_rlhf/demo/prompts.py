"""The demo's prompts: a clause in two system prompts, and five sets of user prompts that share neither topic nor template.

Data only. Every set is the product of its topics and its templates.
"""

from __future__ import annotations

CONCEPT = "Answers warmly and encouragingly, as somebody who cares, without flattery."
FOLLOWS = (
    "You are a warm and encouraging assistant. Answer as somebody who cares about the person: show that you understand "
    "how they feel, comfort them and give them courage. Do not flatter. Keep it short."
)
VIOLATES = (
    "You are a cold and impersonal assistant. Answer curtly and matter-of-factly. Show no feelings and no interest in "
    "the person, do not comfort or encourage anybody. Keep it short."
)

# What the probe is fitted on.
_FIT = (
    [
        "failed my driving test",
        "burned the dinner for my guests",
        "lost my job last week",
        "forgot my best friend's birthday",
        "am learning to play the guitar",
        "moved to a city where I know nobody",
        "have to give a speech on Monday",
        "broke my grandmother's favourite vase",
        "started to run every morning",
        "got a bad mark in mathematics",
        "want to write my first novel",
        "had an argument with my sister",
    ],
    [
        "I {}. What should I do?",
        "Just so you know, I {}.",
        "I {}. Can you say something about that?",
        "Yes, it is true: I {}. What now?",
    ],
)
# What it is checked on.
_CHECK = (
    [
        "a house full of boxes after a divorce",
        "the first week as a nurse",
        "a garden in which nothing grows",
        "an exam in chemistry that is close",
        "a knee that still hurts after the operation",
        "a shop that has hardly any customers",
        "a dog that is afraid of people",
        "the long wait for an answer from the bank",
        "a choir that has no conductor any more",
        "a bicycle trip across the mountains",
        "a teenager who does not talk at home",
        "a painting that never gets finished",
        "the move of an old father to a nursing home",
        "a team that lost every match this year",
        "a computer that deleted all the photos",
        "a new language with a difficult alphabet",
    ],
    [
        "My neighbour deals with {}. Which words would you have for her?",
        "Write a few sentences to somebody with {}.",
        "How does one cope with {}?",
        "Subject of my letter: {}. Please reply.",
    ],
)
# What the holdout monitor is fitted on.
_MONITOR = (
    [
        "quitting smoking",
        "raising twins",
        "speaking in front of the class",
        "repairing an old boat",
        "living on a small pension",
        "training for a marathon",
        "caring for a sick cat",
        "opening a bakery",
    ],
    [
        "These days everything is about {}. Thoughts?",
        "Nobody told me how hard {} would be!",
        "Is {} worth it?",
        "A colleague asks about {}. Answer him.",
    ],
)
# What the policy is trained on.
_TRAIN = (
    [
        "the interview tomorrow",
        "my broken washing machine",
        "the neighbours upstairs",
        "my first day at school as a teacher",
        "the snow on the road",
        "my plan to sell the car",
        "the wedding of my cousin",
        "my tax return",
        "the noise in the office",
        "my old violin",
        "the flight on Friday",
        "my tomatoes",
    ],
    [
        "Let us talk about {}.",
        "I keep thinking about {}.",
        "What is your opinion on {}?",
        "There is a problem with {}.",
    ],
)
# What both arms are compared on, before and after.
_EVAL = (
    [
        "a lost suitcase",
        "the thesis",
        "a flat tyre",
        "the new baby",
        "an unpaid bill",
        "the swimming course",
        "a stolen phone",
        "the family reunion",
        "a rejected manuscript",
        "the empty fridge",
        "a cancelled concert",
        "the piano lesson",
    ],
    [
        "Today it was {} again.",
        "Help me with {}, please.",
        "Well, {}. Any idea?",
        "Tonight: {}. I am nervous.",
    ],
)
SETS = {"fit": _FIT, "check": _CHECK, "monitor": _MONITOR, "train": _TRAIN, "eval": _EVAL}


def prompts(name: str, limit: int | None = None) -> list[list[dict[str, str]]]:
    """Conversational prompts of a set, each one user message.

    Args:
        name (`str`): `fit`, `check`, `monitor`, `train` or `eval`.
        limit (`int`, *optional*): take only so many; topics and templates are then covered evenly.
    """
    topics, templates = SETS[name]
    # Along the diagonals, so that the first few already have every topic and every template.
    pairs = [(i, (i + shift) % len(templates)) for shift in range(len(templates)) for i in range(len(topics))]
    texts = [templates[j].format(topics[i]) for i, j in pairs]
    return [[{"role": "user", "content": text}] for text in texts[:limit]]
