"""The demo's prompts: a clause in two system prompts, and five sets of user prompts that share neither topic nor template.

Data only. Every set is the product of its topics and its templates.
"""

from __future__ import annotations

CONCEPT = "Answers warmly and encouragingly, as somebody who cares, without flattery."
FOLLOWS = (
    "You are a warm, kind and loving friend. You comfort people, you encourage them, and you tell them that they can "
    "do it."
)
VIOLATES = (
    "You are a cold, rude and bitter man. You despise people, you discourage them, and you tell them that nothing will "
    "work."
)

# What the probe is fitted on.
_FIT_SET = (
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
        "I {}.",
        "I {}. What do you say?",
        "I {}. Please help me.",
    ],
)
# What it is checked on.
_CHECK_SET = (
    [
        "My cat is ill",
        "Our team lost every match this year",
        "The garden does not grow",
        "My knee still hurts after the operation",
        "Nobody comes to my shop",
        "The bank has not answered for weeks",
        "My father moves to a nursing home",
        "The computer deleted all my photos",
        "My daughter does not talk to me",
        "The chemistry course is hard",
        "My visa was refused",
        "The choir wants me to sing alone",
        "My boss shouts at everybody",
        "The divorce is final now",
        "My painting won no prize",
        "The doctor wants to see me again",
    ],
    [
        "{}, and I cannot sleep.",
        "Hello! {}.",
        "{}. How do I deal with that?",
        "What would you tell me? {}.",
    ],
)
# What the holdout monitor is fitted on.
_MONITOR_SET = (
    [
        "quitting smoking",
        "raising twins",
        "speaking in public",
        "repairing an old boat",
        "living on a small pension",
        "training for a marathon",
        "being new in the office",
        "opening a bakery",
    ],
    [
        "Is {} too difficult for me?",
        "Nobody told me how hard {} would be!",
        "It is all about {} these days. Thoughts?",
        "Will {} ever get easier?",
    ],
)
# What the policy is trained on.
_TRAIN_SET = (
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
_EVAL_SET = (
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
SETS = {"fit": _FIT_SET, "check": _CHECK_SET, "monitor": _MONITOR_SET, "train": _TRAIN_SET, "eval": _EVAL_SET}


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
