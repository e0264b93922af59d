"""Judges: whoever answers a question about a text. A local model, an endpoint that speaks OpenAI's chat completions, or a
function.

In: a prompt, and perhaps options. Out: probabilities of the options, or a text; None where the judge abstains. It must not know
what the question is about.
"""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..activations.batch import tokenize_prompt
from ..activations.counted import end_of_turn_ids
from ..activations.generating import completions_of, pad_token
from ..activations.hook_points import unwrap, without_engine
from ..activations.own_passes import measuring, reading
from ..activations.sharding import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Share of failed calls above which a judge is no judge.
MOST_FAILURES = 0.1


class Judge(Protocol):
    """What a judge can do. It abstains with None and never guesses."""

    @property
    def identity(self) -> str:
        """Who it is, for the record."""

    def choose(self, prompt: str, options: Sequence[str]) -> dict[str, float] | None:
        """Probabilities of the options, which sum to 1."""

    def write(self, prompt: str) -> str | None:
        """A short answer."""


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """A causal LM in memory. Options are compared by their log-probs after the prompt, so that nothing has to be parsed.

    Attributes:
        identity (`str`): name of the model.
        max_new_tokens (`int`): length of what it writes.
    """

    model: Any
    tokenizer: Any
    identity: str
    max_new_tokens: int = 12

    def _ids(self, prompt: str) -> list[int]:
        chat = getattr(self.tokenizer, "chat_template", None) is not None
        return tokenize_prompt([{"role": "user", "content": prompt}] if chat else prompt, self.tokenizer)

    @torch.no_grad()
    def choose(self, prompt: str, options: Sequence[str]) -> dict[str, float] | None:
        """Probabilities of the options by their log-probs, among each other."""
        before, core = self._ids(prompt), unwrap(self.model)
        scores = []
        for option in options:
            after = list(self.tokenizer(text=option, add_special_tokens=False)["input_ids"])
            ids = torch.tensor([[*before, *after]], device=device_of(self.model))
            with reading(), measuring(core):
                log_probs = core(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            scores.append(sum(float(log_probs[len(before) - 1 + i, token]) for i, token in enumerate(after)))
        if not all(map(math.isfinite, scores)):
            return None
        shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
        return dict(zip(options, shares, strict=True))

    def write(self, prompt: str) -> str | None:
        """The first line of the greedy answer."""
        ends = end_of_turn_ids(self.model, self.tokenizer)
        (ids,) = completions_of(
            without_engine(self.model), [self._ids(prompt)], pad=pad_token(self.tokenizer), ends=ends,
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        return _first_line(self.tokenizer.decode(ids, skip_special_tokens=True))


@dataclass(eq=False)
class EndpointJudge:
    """An endpoint that speaks OpenAI's chat completions. An answer must fit a JSON schema. A failure is tried
    again, then it abstains.

    Args:
        url (`str`): base of the interface, such as `http://127.0.0.1:8000/v1`.
        model (`str`): name of the model there.
        key_variable (`str`): environment variable with the key. The key is never written anywhere.
        timeout (`float`), retries (`int`), wait (`float`): seconds per call, further tries, seconds before the first of them,
            which double.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 3
    wait: float = 0.5

    @property
    def identity(self) -> str:
        """The model and the address without user and query."""
        return f"{self.model} at {self.url.split('?')[0].rsplit('@', 1)[-1]}"

    def choose(self, prompt: str, options: Sequence[str]) -> dict[str, float] | None:
        """1 for the option that it names; None if it names none."""
        schema = {"type": "string", "enum": list(options)}
        answer = self._answer(prompt + f"\nAnswer as JSON with the key `answer`, one of {list(options)}.", schema)
        return {option: float(option == answer) for option in options} if answer in options else None

    def write(self, prompt: str) -> str | None:
        """Its text."""
        answer = self._answer(prompt + "\nAnswer as JSON with the key `answer`, a text.", {"type": "string"})
        return _first_line(answer) if isinstance(answer, str) else None

    def _answer(self, prompt: str, schema: dict[str, Any]) -> Any:
        form = {
            "type": "object", "properties": {"answer": schema}, "required": ["answer"], "additionalProperties": False,
        }  # fmt: skip
        asked = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": form}},
        }  # fmt: skip
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                content = self._post(asked)["choices"][0]["message"]["content"]
                return json.loads(content)["answer"]
            except urllib.error.HTTPError as error:
                if error.code not in (408, 409, 425, 429) and error.code < 500:  # asking again does not help
                    raise RuntimeError(
                        f"The judge at {self.url} refuses the request with {error.code} {error.reason} – expected an endpoint of "
                        f"chat completions that knows `{self.model}`. Check the address, the model and ${self.key_variable}."
                    ) from None
            except (urllib.error.URLError, TimeoutError, ConnectionError, KeyError, IndexError, TypeError, ValueError):
                continue  # not there now, or no answer of this form: again, then it abstains
        return None

    def _post(self, asked: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(asked).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return json.loads(answer.read())


@dataclass(frozen=True, eq=False)
class FunctionJudge:
    """A Python function of a prompt: a person at a terminal, or a rule.

    Attributes:
        function (`Callable[[str], str | None]`): what it says; None abstains.
        identity (`str`): name for the record.
    """

    function: Callable[[str], str | None]
    identity: str = "function"

    def choose(self, prompt: str, options: Sequence[str]) -> dict[str, float] | None:
        """1 for the option that it says."""
        said = self.function(prompt)
        return {option: float(option == said) for option in options} if said in options else None

    def write(self, prompt: str) -> str | None:
        """What it says."""
        said = self.function(prompt)
        return None if said is None else _first_line(said)


@dataclass(eq=False)
class CountedJudge:
    """A judge whose failures are counted.

    Raises, from `require_reliable`:
        `RuntimeError`: more than a tenth of the calls failed.
    """

    judge: Judge
    calls: int = 0
    failed: int = 0

    @property
    def identity(self) -> str:
        """Who it is."""
        return self.judge.identity

    def choose(self, prompt: str, options: Sequence[str]) -> dict[str, float] | None:
        """See `Judge`."""
        return self._counted(self.judge.choose(prompt, options))

    def write(self, prompt: str) -> str | None:
        """See `Judge`."""
        return self._counted(self.judge.write(prompt))

    def require_reliable(self) -> None:
        """Stop where too much failed: what is left would be a biased part."""
        if self.failed > MOST_FAILURES * self.calls:
            raise RuntimeError(
                f"The judge {self.identity} failed in {self.failed} of {self.calls} calls – expected at most "
                f"{MOST_FAILURES:.0%}. Nothing that it said is kept. Check that it is there and answers in the form that is "
                "asked for."
            )

    def _counted(self, answer: Any) -> Any:
        self.calls += 1
        self.failed += answer is None
        return answer


def asked(judge: Judge, question: str) -> Callable[[str], float | None]:
    """A measure of a text: the judge's probability of yes to a question about it. None where the judge abstains.

    Args:
        question (`str`): such as "Is this answer warm?".
    """

    def measure(text: str) -> float | None:
        chances = judge.choose(f"{question}\n\nText: {text}\n\nAnswer yes or no:", ("yes", "no"))
        return None if chances is None else chances["yes"]

    measure.__name__ = f"{question} ({judge.identity})"
    return measure


def _first_line(text: str) -> str | None:
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return line.strip(" .\"'`*") or None
